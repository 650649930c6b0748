"""Problems on the lines of a data file, and how to print and count them.

Readers return problems next to the valid rows, so that all problems of a file are reported at once.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from sys import intern

SHOWN = 50  # kinds of problems printed in one error
SHOWN_LINES = 20  # line numbers printed for one kind of problem or one warning
LONGEST_REASON = 400  # characters; a reason quotes the file, which may contain a whole page

LONGEST_NAME = 60  # characters of a key, which may be a whole page too

CONVERT = "llamachat data convert"
_KEY_LENGTH = 160


@dataclass(frozen=True, slots=True)
class Problem:
    """One violation of the rules: the line (from 1; 0 is the whole file), the field, the reason and the fix."""

    line: int
    field: str
    reason: str
    fix: str

    def at(self, path: str | Path) -> str:
        """Format the problem as one line that starts with `path:line`, so that editors and terminals can open it."""
        where = f"{path}:{self.line}" if self.line else str(path)
        return f"{where}: {self.field}: {self.reason} {self.fix}"


def problem(line: int, field: str, reason: str, fix: str) -> Problem:
    """Create a problem with interned texts, since a file may have the same one on a million lines."""
    if len(reason) > LONGEST_REASON:
        reason = reason[:LONGEST_REASON] + "..."
    return Problem(line, intern(shown_name(field)), intern(printable(reason)), intern(printable(fix)))


def printable(text: str) -> str:
    """Escape what a terminal cannot display, such as lone surrogates and control characters."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shown_name(name: str) -> str:
    """A key's name, escaped and shortened for a terminal."""
    return printable(name if len(name) <= 2 * LONGEST_NAME else f"{name[:LONGEST_NAME]}...{name[-LONGEST_NAME:]}")


def reason_key(fault: Problem) -> str:
    """The problem's kind: its text without the position, so that equal problems are counted together."""
    field = re.sub(r"\[\d+\]", "[]", re.sub(r"^byte \d+", "text", re.sub(r"^column \d+", "JSON", fault.field)))
    reason = re.sub(r"\b(at (?:byte|character)|line|column) \d+", r"\1 N", fault.reason)
    return f"{field}: {reason}"[:_KEY_LENGTH]


def left_out(dropped: Mapping[str, int]) -> str:
    """Describe the dropped records as part of a sentence; "" if there are none."""
    counts = "; ".join(f"{count} x {reason}" for reason, count in sorted(dropped.items()))
    return f" ({counts})" if counts else ""


def folded(problems: Iterable[Problem], path: str | Path) -> list[str]:
    """One line of text for each kind of problem: the first occurrence, the count and the line numbers."""
    kinds: dict[tuple[str, str], list[Problem]] = {}
    for fault in problems:
        kinds.setdefault((reason_key(fault), fault.fix), []).append(fault)
    return [f"{same[0].at(path)}{_lines_of(same)}" for same in kinds.values()]


def _lines_of(same: Sequence[Problem]) -> str:
    lines = list(dict.fromkeys(fault.line for fault in same))
    return f" ({counted_lines(lines)})" if len(lines) > 1 else ""


def counted_lines(lines: Sequence[int]) -> str:
    """The number of lines and the first line numbers."""
    if len(lines) == 1:
        return f"line {lines[0]}"
    numbers = ", ".join(map(str, lines[:SHOWN_LINES]))
    more = f" and {len(lines) - SHOWN_LINES} more" if len(lines) > SHOWN_LINES else ""
    return f"{len(lines)} lines: {numbers}{more}"


def report(problems: Sequence[Problem], path: str | Path) -> str:
    """One line for each kind of problem in a file, and the command that fixes some of them, if there is one."""
    lines = folded(problems, path)
    if len(lines) > SHOWN:
        lines[SHOWN:] = [f"and {len(lines) - SHOWN} more (`llamachat data check {quote(str(path))}` names them all)."]
    command = convert_command(problems, path)
    return "\n".join([*lines, command] if command else lines)


def convert_command(problems: Iterable[Problem], path: str | Path, options: str = "") -> str:
    """The `data convert` command for this file if it would fix any line, else ""."""
    if not any(CONVERT in fault.fix for fault in problems if fault.line):
        return ""
    return f"Where that is the fix, the command is: {CONVERT} {quote(str(path))} {quote(str(converted_path(path)))}{options}"


def converted_path(path: str | Path) -> Path:
    """The path of a converted copy: in the same folder, with other suffixes."""
    old = Path(path)
    return old.with_name(f"{old.name.split('.')[0] or 'data'}.converted.jsonl")
