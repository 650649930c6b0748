"""`llamachat data check`: report the problems of a data file by field, reason and fix, and summarize the valid records.

Reads the file once, line by line, and writes nothing. A problem that occurs on several lines is reported once. If
`llamachat data convert` repairs the first line with a problem, the fix says so. Warnings (repeated records, unknown keys)
do not change the exit status; problems make it 2.
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.chat_format.dialog import Dialog, Message, with_system
from llamachat.chat_format.tokenizer import SPACE
from llamachat.config.section import from_home
from llamachat.config.sections import Split, hub_set
from llamachat.data.convert.command import is_repairable
from llamachat.data.convert.turns import html_in
from llamachat.data.files import has_byte_order_mark, read_rows
from llamachat.data.loading import Sides, Turn, parse_rows, side_sizes, sides_of, user_turns
from llamachat.data.near_duplicates import SIMILARITY, WORDS, NearIndex, Sketch, sketch_of
from llamachat.data.problems import (
    CONVERT,
    Problem,
    convert_command,
    counted_lines,
    folded,
    printable,
    problem,
    reason_key,
    shown_name,
)
from llamachat.data.records import REQUIRED, Kind, Preference, Prompt, Record, Row, digest_of, messages_of, nearest_key
from llamachat.tables import plural

_TEXT_NAMES = {"system": "system text", "user": "user turn", "assistant": "answer"}


@dataclass(frozen=True, slots=True)
class Warned:
    """A warning: something that is valid but may be unintended. `lines` is empty for a warning about the whole file."""

    field: str
    reason: str
    fix: str
    lines: list[int]

    def at(self, path: str) -> str:
        """Format the warning as one line of text."""
        if not self.lines:
            return f"{path}: warning: {self.field}: {self.reason} {self.fix}"
        return f"{path}:{self.lines[0]}: warning: {self.field}: {self.reason} {self.fix} ({counted_lines(self.lines)})"


@dataclass(frozen=True, slots=True)
class TokenLimit:
    """The maximum length of a record in the recipe that will read it."""

    chat_format: ChatFormat
    max_tokens: int  # of a whole dialog, `base.max_tokens`
    max_prompt_tokens: int  # of a prompt, leaving room for an answer
    system: str | None  # prepended to records without a system text

    def count(self, record: Record) -> tuple[int, int, tuple[Message, ...]]:
        """The record's length in tokens, its limit and its messages; a pair counts with its longer answer."""
        messages = with_system(messages_of(record), self.system)
        if isinstance(record, Prompt):
            return len(self.chat_format.encode_prompt(messages)), self.max_prompt_tokens, messages
        answers = (record.chosen, record.rejected) if isinstance(record, Preference) else ()
        dialogs = [(*messages, answer) for answer in answers] or [messages]
        lengths = [len(self.chat_format.encode_dialog(one, train_on=TrainOn.LAST_ANSWER).input_ids) for one in dialogs]
        longest = lengths.index(max(lengths))
        return lengths[longest], self.max_tokens, dialogs[longest]


@dataclass(slots=True)
class CheckReport:
    """The contents and problems of one file.

    Filled row by row. Valid rows only add to counts, so checking a file of several gigabytes takes little memory.
    """

    path: str
    kind: Kind | None
    forbidden: Sequence[str] = ()
    options: str = ""  # of the `data check` command, repeated in the `data convert` command of the fix
    limit: TokenLimit | None = None
    num_records: int = 0
    problems: list[Problem] = field(default_factory=list)  # sorted by line
    warnings: list[Warned] = field(default_factory=list)
    turns: Counter[int] = field(default_factory=Counter)  # number of messages without the system text -> records
    characters: dict[str, "array[int]"] = field(default_factory=dict)  # kind of text -> length of each
    labels: Counter[str] = field(default_factory=Counter)  # "rating better", "is_safe true", ... -> records or messages
    num_duplicates: int = 0  # records identical to an earlier one
    num_empty: int = 0  # rows of a known data set that contain no record
    num_shortened: int = 0  # longer than the limit: the oldest turns are dropped in training
    num_too_long: int = 0  # the last turns alone exceed the limit: excluded from training
    _first_lines: dict[bytes, int] = field(default_factory=dict)
    _lines_by_kind: dict[Kind, "array[int]"] = field(default_factory=dict)
    _warned: dict[tuple[str, str], Warned] = field(default_factory=dict)
    _first_html: str | None = None
    _user_turns: list[tuple[Turn, ...]] = field(default_factory=list)
    _sketches: dict[int, Sketch] = field(default_factory=dict)  # by record number; the first of identical records
    _tokens: "array[int]" = field(default_factory=lambda: array("Q"))
    _first_values: dict[tuple[str, str], object] = field(default_factory=dict)  # by kind of problem
    _spread: Sides | None = None

    @property
    def exit_status(self) -> int:
        """2 if the file has problems, else 0."""
        return 2 if self.problems else 0

    @property
    def num_bad_lines(self) -> int:
        """The number of lines with problems; one line may have several."""
        return len({one.line for one in self.problems})

    def text(self) -> str:
        """The full report: one line for each kind of problem and warning, then a summary of the contents."""
        lines = folded(self.problems, self.path)
        lines += [one.at(self.path) for one in self.warnings]
        command = convert_command(self.problems, self.path, self.options)
        lines += [command] if command else []
        return "\n".join([*lines, *self._summary()])

    def _summary(self) -> Iterator[str]:
        kinds = f"{self.kind}s" if self.kind else "records"
        if not self.num_records and all(not one.line for one in self.problems):
            return  # the problem with the whole file is already reported
        bad = plural(self.num_bad_lines, "bad line")
        yield f"{self.path}: {self.num_records} good {kinds}, {bad}, {self.num_duplicates} repeated"
        if self.num_empty:
            yield f"  rows of a known set without a record: {self.num_empty}"
        if self.turns:
            yield "  turns: " + ", ".join(f"{turns} in {count}" for turns, count in sorted(self.turns.items()))
        for name, counts in self.characters.items():
            yield f"  {name}, characters: {_spread_of(counts)} ({len(counts)} texts)"
        if self.limit is not None and self._tokens:
            most = self.limit.max_prompt_tokens if self.kind == "prompt" else self.limit.max_tokens
            yield f"  tokens: {_spread_of(self._tokens)}; at most {most} are read"
        for name, count in sorted(self.labels.items()):
            yield f"  {name}: {count}"
        if self._spread is not None:
            yield f"  sides by the default data.split: {side_sizes(Counter(self._spread.sides))}"
            if self._spread.num_alike:
                yield f"  {self._spread.num_alike} conversations begin like many others; the user's next turn decides on their split"
        if self.num_records and self.limit is None:
            yield "  tokens: not counted (`--config RECIPE` counts them and compares them with base.max_tokens)"

    def add(self, row: Row) -> None:
        """Count one row of the file."""
        self.problems += row.problems
        for fault in row.problems:
            if row.value is not None:
                self._first_values.setdefault((reason_key(fault), fault.fix), row.value)
        for name in dict.fromkeys(shown_name(re.sub(r"\[\d+\]", "[]", name)) for name in row.unused):
            self._warn(row.line, name, "is a key that nothing reads; it is left out.", _fix_of_unused(name))
        if row.kind is not None:
            self._lines_by_kind.setdefault(row.kind, array("Q")).append(row.line)
        if row.record is None:
            self.num_empty += not row.problems
            return
        self.num_records += 1
        self._user_turns.append(user_turns(row.record))
        first = self._first_lines.setdefault(digest_of(row.record), row.line)
        if first == row.line:
            self._sketches[self.num_records - 1] = sketch_of(row.record)
        else:
            self.num_duplicates += 1
            reason = "is the same as an earlier one; it counts twice in training."
            self._warn(row.line, "record", reason, "Drop it, or leave it if that is meant.")
        self._measure(row.record, row.line)

    def _warn(self, line: int, name: str, reason: str, fix: str) -> None:
        self._warned.setdefault((name, reason), Warned(name, reason, fix, [])).lines.append(line)

    def _measure(self, record: Record, line: int) -> None:
        texts = [(_TEXT_NAMES[message.role], message) for message in messages_of(record)]
        self.turns[sum(message.role != "system" for _, message in texts)] += 1
        if isinstance(record, Preference):
            texts += [("chosen answer", record.chosen), ("rejected answer", record.rejected)]
            names = ("rating", "chosen_is_safe", "rejected_is_safe")
        else:
            names = ("is_safe",) if isinstance(record, Dialog) else ("is_safety",)
        for name, message in texts:
            self.characters.setdefault(name, array("Q")).append(len(message.content))
        labels = {name: getattr(record, name) for name in names}
        if isinstance(record, Prompt):
            labels = {"is_safety": record.is_safety or None}
            self.labels.update(["with an id"] if record.id is not None else [])
        self.labels.update(f"{name} {str(value).lower()}" for name, value in labels.items() if value is not None)
        self.labels.update("answers with train false" for message in messages_of(record) if message.train is False)
        if any(SPACE in message.content for _, message in texts):
            reason = "holds U+2581, by which SentencePiece writes a space: the model reads a space in its place."
            self._warn(line, "content", reason, "Write another character if it is meant.")
        html = next(filter(None, (html_in(message.content) for _, message in texts)), None)
        if html is not None:
            self._first_html = self._first_html or html
            reason = f"is HTML ({printable(self._first_html)[:40]}), which is trained on unchanged."
            fix = "Take it out with `llamachat data convert --plain-text`, or leave it if the dialogs are about web pages."
            self._warn(line, "content", reason, fix)
        if self.limit is not None:
            self._measure_tokens(self.limit, record)

    def _measure_tokens(self, limit: TokenLimit, record: Record) -> None:
        count, most, messages = limit.count(record)
        self._tokens.append(count)
        if count > most:
            fits = limit.chat_format.shorten(messages, max_tokens=most) is not None
            self.num_shortened += fits
            self.num_too_long += not fits

    def finish(self) -> None:
        """Complete the report after the last row: the most common kind, records of other kinds, warnings."""
        self._name_repairs()
        if self.kind is None:
            lines = self._lines_by_kind
            self.kind = max(lines, key=lambda kind: len(lines[kind]), default=None)
            self.problems += self._of_other_kinds()
        self.problems.sort(key=lambda one: one.line)
        file = Path(from_home(self.path))
        if self.num_records and hub_set(self.path) is None and has_byte_order_mark(file):
            reason = "is a byte order mark, which is skipped here; other readers of JSON Lines refuse it."
            self._warn(1, "byte 1", reason, "Save the file as UTF-8 without it.")
        if self.num_shortened or self.num_too_long:
            reason = f"are more than the recipe reads: of {self.num_shortened} records the oldest turns are dropped, {self.num_too_long} are left out."
            self._warn_of_file("tokens", reason, "Raise base.max_tokens, or shorten the texts.")
        if self.num_records:
            self._check_split()
        self.warnings = sorted(self._warned.values(), key=lambda warned: warned.lines[:1])

    def _name_repairs(self) -> None:
        """Mention `data convert` in the fix of each problem whose first line it repairs."""
        repaired = {
            key
            for key, value in self._first_values.items()
            if CONVERT not in key[1] and is_repairable(value, self.kind, forbidden=self.forbidden)
        }
        self.problems = [
            replace(one, fix=f"{one.fix} (`{CONVERT}` does it.)") if (reason_key(one), one.fix) in repaired else one
            for one in self.problems
        ]

    def _check_split(self) -> None:
        """Check the default split: the size of each side, and near-duplicates across sides."""
        self._spread = spread = sides_of(self._user_turns, Split())
        if (warning := spread.warning(Split())) is not None:
            fix = "Add conversations that begin otherwise, drop repeats, or set other shares."
            self._warn_of_file("data.split", warning, fix)
        index = NearIndex(list(self._sketches.values()))
        is_held_out = [spread.sides[record] in ("test", "validation") for record in self._sketches]
        for number, is_out in enumerate(is_held_out):
            if not is_out:
                index.add(number)
        near = sum(is_out and index.find(number) is not None for number, is_out in enumerate(is_held_out))
        if near:
            reason = (
                f"{near} of {sum(is_held_out)} held-out records are nearly the same as one that is trained on"
                f" ({SIMILARITY:.0%} or more of their sequences of {WORDS} words): held-out figures will look too good."
            )
            fix = f"`{CONVERT} --drop-near-duplicates` keeps one of each such group."
            self._warn_of_file("data.split", reason, fix)

    def _warn_of_file(self, name: str, reason: str, fix: str) -> None:
        self._warned[name, reason] = Warned(name, reason, fix, [])

    def _of_other_kinds(self) -> Iterator[Problem]:
        """Problems for the records that are not of the file's kind."""
        for other, lines in self._lines_by_kind.items():
            if other == self.kind or self.kind is None:
                continue
            keys = " and ".join(repr(key) for key in REQUIRED[self.kind])
            reason = f"is a {other} by its keys, but most records of this file are {self.kind}s; a file is read for one kind."
            fix = f"Move it to a file of {other}s, or write {keys} if it is a {self.kind}."
            yield from (problem(line, "record", reason, fix) for line in lines)


def check_path(
    path: str,
    kind: Kind | None,
    format: str,
    forbidden: Sequence[str],
    *,
    columns: Mapping[str, str] | None = None,
    limit: TokenLimit | None = None,
) -> CheckReport:
    """Check one file. Without `kind`, the file's kind is that of most of its records.

    No message may contain a text in `forbidden` (`ChatFormat.forbidden`). With `limit`, tokens are counted.
    """
    named = ",".join(f"{name}={column}" for name, column in (columns or {}).items())
    option_values = {"--kind": kind or "", "--format": "" if format == "auto" else format, "--columns": named}
    options = "".join(f" {option} {quote(value)}" for option, value in option_values.items() if value)
    report = CheckReport(path, kind, forbidden, options, limit)
    for row in parse_rows(read_rows(path), path=path, kind=kind, format=format, columns=columns, forbidden=forbidden):
        report.add(row)
    report.finish()
    return report


def _spread_of(values: "array[int]") -> str:
    ordered = sorted(values)
    last = len(ordered) - 1
    return f"median {ordered[last // 2]}, 95% up to {ordered[int(last * 0.95)]}, from {ordered[0]} to {ordered[last]}"


def _fix_of_unused(name: str) -> str:
    plain = name.rpartition(".")[2]
    near = nearest_key(plain)
    if near is None:
        return f"If it is another name of a key, give `--columns KEY={plain}`, and in a recipe the source's 'columns'."
    if near[0] == plain:
        return f"It is a key of a {near[1]}; take it out here, or move the record to a file of those."
    return f"The nearest known key is '{near[0]}' of a {near[1]}; rename it if that is meant."
