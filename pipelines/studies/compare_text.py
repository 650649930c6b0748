"""A comparison for people: tables as Markdown, as plain text, and with rich in a terminal."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamachat.tracking.metrics import UnknownMetricError, metric_of
from pipelines.studies.changes import KINDS
from pipelines.studies.differences import Compared, Side

if TYPE_CHECKING:
    from pipelines.studies.compare import Comparison, SharedStep

_WIDTH = 110
_LONGEST = 48  # characters of a value on the screen; the file has all of them
# Variables of a metric's name that split a figure up; on the screen the whole is enough.
_DETAILS = ("<rating>", "<kind>", "<source>", "<temperature>", "<family>")


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first column is text, the others are read from the right."""

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]
    is_numeric: bool = False


Block = str | Table


def markdown(found: "Comparison") -> str:
    """compare.md: everything."""
    parts = [f"# {found.labels[0]} (A) and {found.labels[1]} (B)", ""]
    for heading, blocks in _sections(found, is_whole=True):
        parts += [f"## {heading}", ""]
        for block in blocks:
            parts += [block, ""] if isinstance(block, str) else [*_markdown_table(block), ""]
    return "\n".join(parts).rstrip("\n") + "\n"


def plain(found: "Comparison") -> str:
    """The same, less the details, as text in columns."""
    lines = []
    for heading, blocks in _sections(found, is_whole=False):
        lines += [heading]
        for block in blocks:
            told = textwrap.wrap(block, _WIDTH) if isinstance(block, str) else _columns(block)
            lines += [f"  {line}" for line in told]
        lines.append("")
    return "\n".join(lines)


def show_in_terminal(found: "Comparison") -> None:
    """The same as `plain`, with rich."""
    from rich import box
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(highlight=False)
    for heading, blocks in _sections(found, is_whole=False):
        console.print(Text(heading, style="bold"))
        for block in blocks:
            if isinstance(block, str):
                console.print(Padding(Text(block), (0, 0, 0, 2)))
                continue
            table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1))
            for number, head in enumerate(block.heads):
                is_right = block.is_numeric and number > 0
                table.add_column(head, justify="right" if is_right else "left", overflow="fold")
            for row in block.rows:
                is_told = block.is_numeric and row[-1].endswith("*")
                table.add_row(*map(Text, row), style="bold" if is_told else "")
            console.print(table)


def _sections(found: "Comparison", *, is_whole: bool) -> Iterator[tuple[str, list[Block]]]:
    a, b = found.runs
    yield "Runs", [f"A: {a}", f"B: {b}", "Differences are B less A."]
    yield "Configuration", _configuration(found, is_whole)
    for name, steps in zip("AB", found.only, strict=True):
        if steps:
            yield f"Only in {name}", [", ".join(steps)]
    same = [step.name for step in found.steps if step.is_same]
    if same:
        yield "The same in both", [f"{', '.join(same)}: every file of the artifact is equal."]
    for step in found.steps:
        if not step.is_same:
            yield step.name, _step(step, is_whole)
    yield "How to read the intervals", [_reading(found)]


def _configuration(found: "Comparison", is_whole: bool) -> list[Block]:
    if not found.changes:
        return ["No difference in the steps that both have."]
    compared = [step.name for step in found.steps]
    blocks: list[Block] = []
    for kind, meaning in KINDS.items():
        rows = [
            (
                f"`{change.key}`" if is_whole else change.key,
                _value(change.a, is_whole),
                _value(change.b, is_whole),
                "all" if list(change.steps) == compared and len(compared) > 1 else ", ".join(change.steps),
            )
            for change in found.changes
            if change.kind == kind
        ]
        if rows:
            blocks += [f"{meaning[0].upper()}{meaning[1:]}:", Table(("key", "A", "B", "steps"), rows)]
    return blocks


def _step(step: "SharedStep", is_whole: bool) -> list[Block]:
    blocks: list[Block] = [
        f"Not finished in {name}." for name, is_finished in zip("AB", step.is_finished, strict=True) if not is_finished
    ]
    shown = [one for one in step.figures if is_whole or not _is_detail(one.name)]
    if shown:
        rows = [_row(one, is_whole) for one in shown]
        blocks.append(Table(("figure", "A", "B", "B - A (95% interval)"), rows, is_numeric=True))
    else:
        blocks.append("No final figure that both have.")
    remarks = list(dict.fromkeys(one.remark for one in shown if one.remark))
    blocks += [f"({number}) {remark}" for number, remark in enumerate(remarks, start=1)]
    if len(shown) < len(step.figures):
        blocks.append(f"{len(step.figures) - len(shown)} more, by rating, file or temperature, are in compare.md.")
    if step.picture:
        blocks.append(f"![curves of {step.name}]({step.picture})" if is_whole else f"curves: {step.picture}")
    return [_numbered(block, remarks, shown) if isinstance(block, Table) else block for block in blocks]


def _numbered(table: Table, remarks: Sequence[str], shown: Sequence[Compared]) -> Table:
    """The remarks as numbers at the figures' names."""
    marks = [f" ({remarks.index(one.remark) + 1})" if one.remark else "" for one in shown]
    rows = [(row[0] + mark, *row[1:]) for row, mark in zip(table.rows, marks, strict=True)]
    return Table(table.heads, rows, table.is_numeric)


def _row(one: Compared, is_whole: bool) -> tuple[str, ...]:
    if not is_whole:  # 100 columns hold no more
        return one.name, _number(one.a.value), _number(one.b.value), _gap(one)
    unit = f", {one.unit}" if one.unit not in ("", "1") else ""
    return f"`{one.name}`{unit}", _side(one.a), _side(one.b), _gap(one)


def _side(side: Side) -> str:
    if side.low is None or side.high is None:
        return _number(side.value)
    return f"{_number(side.value)} ({_number(side.low)} to {_number(side.high)})"


def _gap(one: Compared) -> str:
    if one.difference is None:
        return "-"
    text = _number(one.difference, sign="+")
    if one.low is None or one.high is None:
        return text
    paired = ", paired" if one.how == "paired" else ""
    mark = " *" if one.leaves_out_zero else ""
    return f"{text} ({_number(one.low, sign='+')} to {_number(one.high, sign='+')}{paired}){mark}"


def _number(value: float, *, sign: str = "") -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000 or (abs(value) > 1 and value == round(value)):
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.1e}" if abs(value) < 0.0005 else f"{value:{sign}.3f}"


def _reading(found: "Comparison") -> str:
    intervals = [one for step in found.steps for one in step.figures if one.low is not None]
    if not intervals:
        return "Neither run holds what an interval could be made of; one seed each says little of small differences."
    told = sum(one.leaves_out_zero for one in intervals)
    return (
        f"{told} of {len(intervals)} intervals leave out 0 (*); about {max(1, round(len(intervals) / 20))} would do so by"
        " chance. Paired ones compare answers to the same prompts; the others are made of both runs' intervals as if they"
        " were independent, which is too wide where the same prompts were asked. All cover the choice of test prompts, not"
        " that of the seed: two runs of one recipe with other seeds differ too, and by how much only more seeds tell."
    )


def _is_detail(name: str) -> bool:
    try:
        row = metric_of(name).name
    except UnknownMetricError:
        return False
    return any(part in row for part in _DETAILS)


def _value(text: str, is_whole: bool) -> str:
    if is_whole:
        return text.replace("|", "\\|")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _markdown_table(table: Table) -> list[str]:
    rules = ["---", *(["---:"] if table.is_numeric else ["---"]) * (len(table.heads) - 1)]
    return [f"| {' | '.join(row)} |" for row in (table.heads, rules, *table.rows)]


def _columns(table: Table) -> list[str]:
    rows = [table.heads, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.heads))]
    return ["  ".join(_cell(row, column, widths, table) for column in range(len(row))).rstrip() for row in rows]


def _cell(row: Sequence[str], column: int, widths: Sequence[int], table: Table) -> str:
    is_right = table.is_numeric and column > 0
    return f"{row[column]:{'>' if is_right else '<'}{widths[column]}}"
