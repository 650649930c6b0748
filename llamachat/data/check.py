"""`llamachat data check`: every bad line of a file with field, reason and fix, and what the good ones hold.

Reads the file once, line by line, and writes nothing. Warnings (repeated records, keys that nothing reads) do not change
the exit status; with problems it is 2.
"""

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamachat.chat_format.dialog import Dialog
from llamachat.chat_format.tokenizer import SPACE
from llamachat.config.section import from_home
from llamachat.config.sections import Split, hub_set
from llamachat.data.convert.turns import html_in
from llamachat.data.files import has_byte_order_mark, read_rows
from llamachat.data.loading import Turn, parse_rows, side_sizes, sides_of, user_turns
from llamachat.data.problems import Problem, convert_command, printable, problem, shown_name
from llamachat.data.records import REQUIRED, Kind, Preference, Prompt, Record, Row, digest_of, messages_of, nearest_key

_SHOWN_LINES = 20  # line numbers that one warning prints
_TEXT_NAMES = {"system": "system text", "user": "user turn", "assistant": "answer"}


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that breaks no rule but may not be meant, and the lines that have it; none for the file as a whole."""

    field: str
    reason: str
    fix: str
    lines: list[int]

    def at(self, path: str) -> str:
        """The warning on one line of text."""
        if not self.lines:
            return f"{path}: warning: {self.field}: {self.reason} {self.fix}"
        shown = ", ".join(str(line) for line in self.lines[:_SHOWN_LINES])
        more = f" and {len(self.lines) - _SHOWN_LINES} more" if len(self.lines) > _SHOWN_LINES else ""
        lines = "line" if len(self.lines) == 1 else "lines"
        return f"{path}:{self.lines[0]}: warning: {self.field}: {self.reason} {self.fix} ({lines} {shown}{more})"


@dataclass(slots=True)
class CheckReport:
    """What one file holds and what is wrong with it.

    Filled row by row, with numbers only of what is sound, so that a file of gigabytes is checked in little memory.
    """

    path: str
    kind: Kind | None
    num_records: int = 0
    problems: list[Problem] = field(default_factory=list)  # by line
    warnings: list[Warned] = field(default_factory=list)
    turns: Counter[int] = field(default_factory=Counter)  # messages without the system text -> records
    characters: dict[str, "array[int]"] = field(default_factory=dict)  # by what the text is: the length of each
    labels: Counter[str] = field(default_factory=Counter)  # "rating better", "is_safe true", ... -> records or messages
    num_duplicates: int = 0  # records that are the same as one before them
    num_empty: int = 0  # rows of a known set that hold no record
    _first_lines: dict[bytes, int] = field(default_factory=dict)
    _lines_by_kind: dict[Kind, "array[int]"] = field(default_factory=dict)
    _warned: dict[tuple[str, str], Warned] = field(default_factory=dict)
    _first_html: str | None = None
    _user_turns: list[tuple[Turn, ...]] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """2 where a line breaks the rules, else 0."""
        return 2 if self.problems else 0

    @property
    def num_bad_lines(self) -> int:
        """Lines with a problem; one line may have several."""
        return len({one.line for one in self.problems})

    def text(self) -> str:
        """The whole report: each problem and warning on a line, then what the file holds."""
        lines = [one.at(self.path) for one in self.problems]
        lines += [one.at(self.path) for one in self.warnings]
        command = convert_command(self.problems, self.path)
        lines += [command] if command else []
        return "\n".join([*lines, *self._summary()])

    def _summary(self) -> Iterator[str]:
        kinds = f"{self.kind}s" if self.kind else "records"
        bad = f"{self.num_bad_lines} bad line{'' if self.num_bad_lines == 1 else 's'}"
        yield f"{self.path}: {self.num_records} good {kinds}, {bad}, {self.num_duplicates} repeated"
        if self.num_empty:
            yield f"  rows of a known set without a record: {self.num_empty}"
        if self.turns:
            yield "  turns: " + ", ".join(f"{turns} in {count}" for turns, count in sorted(self.turns.items()))
        for name, counts in self.characters.items():
            ordered = sorted(counts)
            last = len(ordered) - 1
            yield (
                f"  {name}, characters: median {ordered[last // 2]}, 95% up to {ordered[int(last * 0.95)]}, "
                f"from {ordered[0]} to {ordered[last]} ({len(ordered)} texts)"
            )
        for name, count in sorted(self.labels.items()):
            yield f"  {name}: {count}"
        if self.num_records:
            spread = sides_of(self._user_turns, Split())
            yield f"  sides by the default data.split: {side_sizes(Counter(spread.sides))}"
            if spread.num_alike:
                yield f"  {spread.num_alike} conversations open as many others do; what the user says next decides on their side"

    def add(self, row: Row) -> None:
        """Count one row of the file."""
        self.problems += row.problems
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
        if first != row.line:
            self.num_duplicates += 1
            reason = f"is the same as on line {first}; it counts twice in training."
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

    def finish(self) -> None:
        """Once all rows are added: the kind that most are of, records of other kinds, warnings."""
        if self.kind is None:
            lines = self._lines_by_kind
            self.kind = max(lines, key=lambda kind: len(lines[kind]), default=None)
            self.problems += self._of_other_kinds()
        self.problems.sort(key=lambda one: one.line)
        file = Path(from_home(self.path))
        if self.num_records and hub_set(self.path) is None and has_byte_order_mark(file):
            reason = "is a byte order mark, which is skipped here; other readers of JSON Lines refuse it."
            self._warn(1, "byte 1", reason, "Save the file as UTF-8 without it.")
        warning = sides_of(self._user_turns, Split()).warning(Split())
        if warning is not None:
            fix = "Add conversations that begin otherwise, drop repeats, or set other shares."
            self._warned["split", warning] = Warned("data.split", warning, fix, [])
        self.warnings = sorted(self._warned.values(), key=lambda warned: warned.lines[:1])

    def _of_other_kinds(self) -> Iterator[Problem]:
        """Records of another kind than most: a file is read for one kind."""
        for other, lines in self._lines_by_kind.items():
            if other == self.kind or self.kind is None:
                continue
            keys = " and ".join(repr(key) for key in REQUIRED[self.kind])
            reason = f"is a {other} by its keys, but most records of this file are {self.kind}s; a file is read for one kind."
            fix = f"Move it to a file of {other}s, or write {keys} if it is a {self.kind}."
            yield from (problem(line, "record", reason, fix) for line in lines)


def check_path(path: str, kind: Kind | None, format: str, forbidden: Sequence[str]) -> CheckReport:
    """The report on one file; without `kind`, it is a file of the kind that most of its records are.

    `forbidden` are the texts that no message may hold (`ChatFormat.forbidden`).
    """
    report = CheckReport(path, kind)
    for row in parse_rows(read_rows(path), path=path, kind=kind, format=format, forbidden=forbidden):
        report.add(row)
    report.finish()
    return report


def _fix_of_unused(name: str) -> str:
    plain = name.rpartition(".")[2]
    near = nearest_key(plain)
    if near is None:
        return "Name it in the source's 'columns' if it is another name of a key."
    if near[0] == plain:
        return f"It is a key of a {near[1]}; take it out here, or move the record to a file of those."
    return f"The nearest known key is '{near[0]}' of a {near[1]}; rename it if that is meant."
