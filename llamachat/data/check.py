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

from llamachat.chat_format.dialog import Dialog, Message
from llamachat.data.convert.turns import html_in
from llamachat.data.files import has_byte_order_mark, read_rows
from llamachat.data.loading import parse_rows
from llamachat.data.problems import Problem, convert_command, printable, problem
from llamachat.data.records import REQUIRED, Kind, Preference, Prompt, Record, Row, asked, digest_of, nearest_key

_SHOWN_LINES = 20  # line numbers that one warning prints


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that breaks no rule but may not be meant, and the lines that have it."""

    field: str
    reason: str
    fix: str
    lines: list[int]

    def at(self, path: str) -> str:
        """The warning on one line of text."""
        shown = ", ".join(str(line) for line in self.lines[:_SHOWN_LINES])
        more = f" and {len(self.lines) - _SHOWN_LINES} more" if len(self.lines) > _SHOWN_LINES else ""
        lines = "line" if len(self.lines) == 1 else "lines"
        return f"{path}:{self.lines[0]}: warning: {self.field}: {self.reason} {self.fix} ({lines} {shown}{more})"


@dataclass(frozen=True, slots=True)
class Spread:
    """How a count spreads over records or messages."""

    number: int
    smallest: int
    median: int
    most: int  # the 95th of a hundred is not above it
    largest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What one file holds and what is wrong with it."""

    path: str
    kind: Kind | None
    num_records: int
    problems: list[Problem]  # by line
    warnings: list[Warned]
    num_duplicates: int
    turns: dict[int, int]  # messages without the system text -> records
    characters: dict[str, Spread]  # by what the text is
    labels: dict[str, int]  # "rating better", "is_safe true", "train false", ... -> records or messages

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
        if self.turns:
            yield "  turns: " + ", ".join(f"{turns} in {count}" for turns, count in sorted(self.turns.items()))
        for name, spread in self.characters.items():
            yield (
                f"  {name}, characters: median {spread.median}, 95% up to {spread.most}, "
                f"from {spread.smallest} to {spread.largest} ({spread.number} texts)"
            )
        for name, count in sorted(self.labels.items()):
            yield f"  {name}: {count}"


@dataclass(slots=True)
class _Tally:
    """What is gathered line by line; numbers only, so that a file of gigabytes is checked in little memory."""

    problems: list[Problem] = field(default_factory=list)
    unused: dict[str, list[int]] = field(default_factory=dict)
    lines_by_kind: dict[Kind, "array[int]"] = field(default_factory=dict)
    first_lines: dict[bytes, int] = field(default_factory=dict)
    repeats: dict[int, list[int]] = field(default_factory=dict)
    turns: Counter[int] = field(default_factory=Counter)
    characters: dict[str, "array[int]"] = field(default_factory=dict)
    labels: Counter[str] = field(default_factory=Counter)
    html_lines: list[int] = field(default_factory=list)
    first_html: str = ""
    num_records: int = 0


def check_path(path: str, kind: Kind | None, format: str, forbidden: Sequence[str]) -> CheckReport:
    """The report on one file; without `kind`, it is a file of the kind that most of its records are.

    `forbidden` are the texts that no message may hold (`ChatFormat.forbidden`).
    """
    tally = _Tally()
    for row in parse_rows(read_rows(path), path=path, kind=kind, format=format, forbidden=forbidden):
        _count(row, tally)
    own_kind = kind or max(tally.lines_by_kind, key=lambda name: len(tally.lines_by_kind[name]), default=None)
    problems = [*tally.problems, *(() if kind else _mixed(tally, own_kind))]
    return CheckReport(
        path=path,
        kind=own_kind,
        num_records=tally.num_records,
        problems=sorted(problems, key=lambda one: one.line),
        warnings=sorted(_warnings(tally, path), key=lambda warned: warned.lines[0]),
        num_duplicates=sum(map(len, tally.repeats.values())),
        turns=dict(tally.turns),
        characters={name: _spread(sorted(counts)) for name, counts in tally.characters.items()},
        labels=dict(tally.labels),
    )


def _count(row: Row, tally: _Tally) -> None:
    tally.problems += row.problems
    for name in row.unused:
        tally.unused.setdefault(printable(re.sub(r"\[\d+\]", "[]", name)), []).append(row.line)
    if row.kind is not None:
        tally.lines_by_kind.setdefault(row.kind, array("Q")).append(row.line)
    if row.record is None:
        return
    tally.num_records += 1
    first = tally.first_lines.setdefault(digest_of(row.record), row.line)
    if first != row.line:
        tally.repeats.setdefault(first, []).append(row.line)
    _measure(row.record, tally)
    html = next(filter(None, map(html_in, _texts(row.record))), None)
    if html is not None:
        tally.first_html = tally.first_html or html
        tally.html_lines.append(row.line)


def _texts(record: Record) -> Iterator[str]:
    answers = (record.chosen, record.rejected) if isinstance(record, Preference) else ()
    return (message.content for message in (*asked(record), *answers))


def _measure(record: Record, tally: _Tally) -> None:
    _measure_messages(asked(record), tally)
    if isinstance(record, Preference):
        for name, message in (("chosen answer", record.chosen), ("rejected answer", record.rejected)):
            tally.characters.setdefault(name, array("Q")).append(len(message.content))
        names = ("rating", "chosen_is_safe", "rejected_is_safe")
    else:
        names = ("is_safe",) if isinstance(record, Dialog) else ("is_safety",)
    labels = {name: getattr(record, name) for name in names}
    if isinstance(record, Prompt):
        labels["is_safety"] = record.is_safety or None
        if record.id is not None:
            tally.labels["with an id"] += 1
    tally.labels.update(f"{name} {str(value).lower()}" for name, value in labels.items() if value is not None)


def _measure_messages(messages: tuple[Message, ...], tally: _Tally) -> None:
    tally.turns[sum(message.role != "system" for message in messages)] += 1
    names = {"system": "system text", "user": "user turn", "assistant": "answer"}
    for message in messages:
        tally.characters.setdefault(names[message.role], array("Q")).append(len(message.content))
        if message.train is False:
            tally.labels["answers with train false"] += 1


def _mixed(tally: _Tally, kind: Kind | None) -> Iterator[Problem]:
    """Records of another kind than most: a file is read for one kind."""
    for other, lines in tally.lines_by_kind.items():
        if other == kind or kind is None:
            continue
        keys = " and ".join(repr(key) for key in REQUIRED[kind])
        for line in lines:
            yield problem(
                line,
                "record",
                f"is a {other} by its keys, but most records of this file are {kind}s; a file is read for one kind.",
                f"Move it to a file of {other}s, or write {keys} if it is a {kind}.",
            )


def _warnings(tally: _Tally, path: str) -> Iterator[Warned]:
    for first, lines in tally.repeats.items():
        yield Warned(
            "record",
            f"is the same as on line {first}; it counts twice in training.",
            "Drop it, or leave it if that is meant.",
            lines,
        )
    for name, lines in tally.unused.items():
        plain = name.rpartition(".")[2]
        near = nearest_key(plain)
        fix = f"The nearest known key is '{near[0]}' of a {near[1]}; rename it if that is meant." if near else ""
        if near and near[0] == plain:
            fix = f"It is a key of a {near[1]}; take it out here, or move the record to a file of those."
        yield Warned(
            name,
            "is a key that nothing reads; it is left out.",
            fix or "Name it in the source's 'columns' if it is another name of a key.",
            list(dict.fromkeys(lines)),
        )
    if tally.html_lines:
        reason = f"is HTML ({printable(tally.first_html)[:40]}), which is learnt as it is."
        fix = "Take it out with `llamachat data convert --plain-text`, or leave it if the dialogs are about web pages."
        yield Warned("content", reason, fix, tally.html_lines)
    if tally.num_records and Path(path).is_file() and has_byte_order_mark(Path(path)):
        reason = "is a byte order mark, which is skipped here; other readers of JSON Lines refuse it."
        yield Warned("byte 1", reason, "Save the file as UTF-8 without it.", [1])


def _spread(ordered: list[int]) -> Spread:
    last = len(ordered) - 1
    return Spread(len(ordered), ordered[0], ordered[last // 2], ordered[int(last * 0.95)], ordered[last])
