"""What is wrong with one line of a data file, and how a list of such problems is printed and counted.

A reader of data returns problems next to the rows that it could read, so that all of a file's are reported at once.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from sys import intern

SHOWN = 50  # kinds of problems that one error prints
SHOWN_LINES = 20  # numbers of lines that one kind of problem, or one warning, prints
LONGEST_REASON = 400  # characters; a reason quotes what was found, and that may be a whole page

LONGEST_NAME = 60  # characters of a key: what a file holds there may be a whole page too

CONVERT = "llamachat data convert"
_KEY_LENGTH = 160


@dataclass(frozen=True, slots=True)
class Problem:
    """One breach of the rules: the line (1 is the first; 0 the file as a whole), the field, what is wrong, the fix."""

    line: int
    field: str
    reason: str
    fix: str

    def at(self, path: str | Path) -> str:
        """The problem on one line of text, as an editor or a terminal can jump to it."""
        where = f"{path}:{self.line}" if self.line else str(path)
        return f"{where}: {self.field}: {self.reason} {self.fix}"


def problem(line: int, field: str, reason: str, fix: str) -> Problem:
    """A problem that shares its texts with equal ones: a file of a million lines may have the same fault in each."""
    if len(reason) > LONGEST_REASON:
        reason = reason[:LONGEST_REASON] + "..."
    return Problem(line, intern(shown_name(field)), intern(printable(reason)), intern(printable(fix)))


def printable(text: str) -> str:
    """The text as any terminal can show it: what a file holds may be half a character or steer the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown_name(name: str) -> str:
    """The name of a key as a terminal can show it."""
    return printable(name if len(name) <= 2 * LONGEST_NAME else f"{name[:LONGEST_NAME]}...{name[-LONGEST_NAME:]}")


def reason_key(fault: Problem) -> str:
    """The problem without its place, so that equal faults of many lines are counted as one kind."""
    field = re.sub(r"\[\d+\]", "[]", re.sub(r"^byte \d+", "text", re.sub(r"^column \d+", "JSON", fault.field)))
    reason = re.sub(r"\b(at (?:byte|character)|line|column) \d+", r"\1 N", fault.reason)
    return f"{field}: {reason}"[:_KEY_LENGTH]


def left_out(dropped: Mapping[str, int]) -> str:
    """What was left out of the records, as a part of a sentence; "" where nothing was."""
    counts = "; ".join(f"{count} x {reason}" for reason, count in sorted(dropped.items()))
    return f" ({counts})" if counts else ""


def folded(problems: Iterable[Problem], path: str | Path) -> list[str]:
    """A line of text for each kind of problem: the first one, how many lines have the same, and which."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for fault in problems:
        kinds.setdefault((reason_key(fault), fault.fix), []).append(fault)
    return [f"{same[0].at(path)}{_lines_of(same)}" for same in kinds.values()]


def _lines_of(same: Sequence[Problem]) -> str:
    lines = list(dict.fromkeys(fault.line for fault in same))
    return f" ({counted_lines(lines)})" if len(lines) > 1 else ""


def counted_lines(lines: Sequence[int]) -> str:
    """How many lines these are, and the numbers of the first ones."""
    if len(lines) == 1:
        return f"line {lines[0]}"
    numbers = ", ".join(map(str, lines[:SHOWN_LINES]))
    more = f" and {len(lines) - SHOWN_LINES} more" if len(lines) > SHOWN_LINES else ""
    return f"{len(lines)} lines: {numbers}{more}"


def report(problems: Sequence[Problem], path: str | Path) -> str:
    """The problems of one file, a line for each kind, and the command that fixes some of them where there is one."""
    lines = folded(problems, path)
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more (`llamachat data check {quote(str(path))}` names them all)."]
    command = convert_command(problems, path)
    return "\n".join([*lines, command] if command else lines)


def convert_command(problems: Iterable[Problem], path: str | Path, options: str = "") -> str:
    """The `data convert` command for this file, if it would fix one of its lines; else ""."""
    if not any(CONVERT in fault.fix for fault in problems if fault.line):
        return ""
    return f"Where that is the fix, the command is: {CONVERT} {quote(str(path))} {quote(str(converted_path(path)))}{options}"


def converted_path(path: str | Path) -> Path:
    """Where a converted copy of the file goes: next to it, its suffixes replaced."""
    old = Path(path)
    return old.with_name(f"{old.name.split('.')[0] or 'data'}.converted.jsonl")
