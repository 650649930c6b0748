"""The page before it is HTML or Markdown: sections of texts, tables, pictures and answers.

All texts are plain: what stands between backticks is shown as code, everything else as it is, escaped where it is
written. Numbers reach a page through `number`, `signed` and `percent`, so that both forms round alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

ABSENT = "-"


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: its figure or word, what is said beside it in small, and whether it is the best of its row."""

    text: str
    beside: str = ""
    is_best: bool = False
    is_paper: bool = False  # a number of the paper, not of this run


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column and first line name the others."""

    kind: ClassVar = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    name: str = ""  # by which it can be found in the page


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `missing` says what is not there and which command makes it."""

    kind: ClassVar = "text"
    text: str
    tone: Literal["plain", "missing"] = "plain"


@dataclass(frozen=True, slots=True)
class Points:
    """Sentences, one to a line."""

    kind: ClassVar = "points"
    lines: Sequence[str]
    tone: Literal["plain", "missing", "finding"] = "plain"


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG in the step's `figures/`; `alt` tells what is to be seen in it to those who cannot."""

    kind: ClassVar = "picture"
    path: Path
    alt: str
    caption: str


@dataclass(frozen=True, slots=True)
class Gallery:
    """Small pictures that unfold under a title."""

    kind: ClassVar = "gallery"
    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one policy said, and what is known of it."""

    policy: str
    text: str
    facts: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with the answers of all policies, side by side."""

    kind: ClassVar = "sample"
    title: str
    prompt: Sequence[tuple[str, str]]  # role and text of each message
    answers: Sequence[Answer]


Block = Table | Text | Points | Picture | Gallery | Sample


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page under a heading."""

    title: str
    name: str  # of its anchor
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Page:
    """The whole report."""

    title: str
    facts: Sequence[tuple[str, str]]  # of the run: what, and its value
    sections: Sequence[Section] = field(default_factory=tuple)

    @property
    def pictures(self) -> list[Picture]:
        """Those that stand by themselves, in their order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]


def number(value: float, *, digits: int = 2) -> str:
    """A figure, rounded; no minus before a zero."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def signed(value: float, *, digits: int = 2) -> str:
    """A difference, with its sign."""
    # An end of an interval that rounds to 0 keeps its side: "[-0.20, -0.00]" lies below 0.
    return f"{'-' if value < 0 else '+'}{abs(value):.{digits}f}"


def percent(value: float) -> str:
    """A fraction as percent."""
    return f"{number(100 * value, digits=1)}%"


def row(label: str, *texts: str) -> list[Cell]:
    """A line of plain cells under its name."""
    return [Cell(text) for text in (label, *texts)]


def paper_row(label: str, *texts: str) -> list[Cell]:
    """A line of the paper's numbers."""
    return [Cell(text, is_paper=True) for text in (label, *texts)]
