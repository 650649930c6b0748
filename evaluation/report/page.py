"""The page: sections of texts, tables, plots and answers, as a self-contained HTML file and as Markdown.

All texts are plain: text in backticks is shown as code, everything else verbatim and escaped on output. Numbers are
formatted with `number`, `signed` and `percent`, so that both forms round the same way.
"""

import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from llamachat.runs.reader import Measure
from llamachat.tables import fence

ABSENT = "-"
_CODE = re.compile(r"`([^`]+)`")


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: its text, a remark in small print, and whether it is the best of its row."""

    text: str
    beside: str = ""
    is_best: bool = False
    is_paper: bool = False  # from the paper, not this run


@dataclass(frozen=True, slots=True)
class Table:
    """A table with a header row and a header column."""

    kind: ClassVar = "table"
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    name: str = ""  # its anchor in the page


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; in tone `missing`, it says what is missing and which command makes it."""

    kind: ClassVar = "text"
    text: str
    tone: Literal["plain", "missing", "glossary"] = "plain"


@dataclass(frozen=True, slots=True)
class Points:
    """A list of sentences, one per line."""

    kind: ClassVar = "points"
    lines: Sequence[str]
    tone: Literal["plain", "missing", "finding"] = "plain"


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG in the step's `figures/`; `alt` is its description for screen readers."""

    kind: ClassVar = "picture"
    path: Path
    alt: str
    caption: str
    is_wide: bool = False  # full page width; other plots are two to a row if there is room


@dataclass(frozen=True, slots=True)
class Gallery:
    """Small plots in a collapsible section."""

    kind: ClassVar = "gallery"
    title: str
    pictures: Sequence[Picture]


@dataclass(frozen=True, slots=True)
class Answer:
    """One policy's answer, with its scores and remarks."""

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
    name: str  # its anchor
    blocks: Sequence[Block]


@dataclass(frozen=True, slots=True)
class Page:
    """The whole report."""

    title: str
    facts: Sequence[tuple[str, str]]  # facts about the run: label and value
    sections: Sequence[Section] = field(default_factory=tuple)

    @property
    def pictures(self) -> list[Picture]:
        """The plots outside galleries, in order."""
        return [block for section in self.sections for block in section.blocks if isinstance(block, Picture)]


def number(value: float, *, digits: int = 2) -> str:
    """A rounded figure, never "-0"."""
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def signed(value: float, *, digits: int = 2) -> str:
    """A difference, with its sign."""
    # An end of an interval that rounds to 0 keeps its sign: "[-0.20, -0.00]" is below 0.
    return f"{'-' if value < 0 else '+'}{abs(value):.{digits}f}"


def percent(value: float) -> str:
    """A fraction as percent."""
    return f"{number(100 * value, digits=1)}%"


def bare_percent(value: float) -> str:
    """A fraction in percent without the percent sign, as in the paper's tables."""
    return number(100 * value, digits=1)


def measure_cell(
    measure: Measure | None, form: Callable[[float], str], *, after: str = "", is_best: bool = False
) -> Cell:
    """A figure with its interval in brackets and a remark after it."""
    if measure is None:
        return Cell(ABSENT, after)
    interval = measure.interval
    ends = f"[{form(interval[0])}, {form(interval[1])}]" if interval else ""
    return Cell(form(measure.value), f"{ends} {after}".strip(), is_best)


def measure_row(label: str, measures: Iterable[Measure | None], form: Callable[[float], str]) -> list[Cell]:
    """A labelled row of figures with intervals."""
    return [Cell(label), *(measure_cell(one, form) for one in measures)]


def with_interval(measure: Measure, form: Callable[[float], str]) -> str:
    """'+0.42 [+0.34, +0.50]'."""
    cell = measure_cell(measure, form)
    return f"{cell.text} {cell.beside}".strip()


def row(label: str, *texts: str) -> list[Cell]:
    """A labelled row of plain cells."""
    return [Cell(text) for text in (label, *texts)]


def paper_row(label: str, *texts: str) -> list[Cell]:
    """A labelled row of the paper's numbers."""
    return [Cell(text, is_paper=True) for text in (label, *texts)]


def html(page: Page) -> str:
    """The page as HTML with embedded plots; all text is escaped."""
    return _environment(is_escaped=True).get_template("report.html.jinja").render(page=page)


def markdown(page: Page, folder: Path) -> str:
    """The page as Markdown; plot paths are relative to `folder`."""
    return _environment(is_escaped=False).get_template("report.md.jinja").render(page=page, folder=folder)


def _environment(*, is_escaped: bool) -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup, escape

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=is_escaped,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not is_escaped,
    )
    environment.filters |= {"fenced": _fenced, "plain": _plain}
    environment.filters["data_uri"] = lambda path: (
        f"data:image/png;base64,{b64encode(path.read_bytes()).decode('ascii')}"
    )
    environment.filters["coded"] = lambda text: Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))
    return environment


def _fenced(text: str) -> str:
    """A code block with a fence longer than any in the text, so that Markdown and HTML in it are literal."""
    return f"{fence(text)}text\n{text}\n{fence(text)}"


def _plain(text: str) -> str:
    """One line of text with HTML tags escaped for Markdown."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
