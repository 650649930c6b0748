"""Tables as text: padded columns for a terminal, or Markdown; the fence of code in Markdown, and numbers in words."""

import re
from collections.abc import Sequence

_GAP = "  "


def text_table(rows: Sequence[Sequence[str]], *, align: str = "<", indent: str = "") -> list[str]:
    """Lines with the columns padded to their widest cell and two spaces apart; a short row ends early.

    `align` holds '<' (left) or '>' (right) for each column; the last one counts for all columns after it.
    """
    padded = _padded(rows, align)
    return [f"{indent}{_GAP.join(cells)}".rstrip() for cells in padded]


def markdown_table(rows: Sequence[Sequence[str]], *, align: str = "<", is_padded: bool = False) -> list[str]:
    """Lines of a Markdown table whose first row is the head; `is_padded` makes it readable in a terminal too."""
    count = len(rows[0])
    if is_padded:
        rule = f"|{'|'.join('-' * (width + 2) for width in _widths(rows))}|"
        rows = _padded(rows, align)
    else:
        rule = f"| {' | '.join({'<': '---', '>': '---:'}[_side(align, column)] for column in range(count))} |"
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], rule, *lines[1:]]


def fence(text: str) -> str:
    """The backticks around a text as code in Markdown: three, or more than stand anywhere in it."""
    return "`" * (1 + max(map(len, re.findall("`{3,}", text)), default=2))


def plural(count: int, noun: str, nouns: str = "") -> str:
    """The count and its noun: `1 pair`, `2 pairs`; `nouns` is a plural that does not end in s."""
    return f"{count} {noun if count == 1 else nouns or noun + 's'}"


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _padded(rows: Sequence[Sequence[str]], align: str) -> list[list[str]]:
    widths = _widths(rows)
    return [[f"{cell:{_side(align, column)}{widths[column]}}" for column, cell in enumerate(row)] for row in rows]


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    columns = max(map(len, rows), default=0)
    return [max(len(row[column]) for row in rows if column < len(row)) for column in range(columns)]


def _side(align: str, column: int) -> str:
    return align[min(column, len(align) - 1)]
