"""One table of all benchmark sets and policies, for the terminal and the report."""

from collections.abc import Mapping, Sequence

from evaluation.report.facts import Facts
from evaluation.report.page import ABSENT, Cell, Points, Section, Table, measure_cell, percent
from llamachat.runs.reader import Benchmark
from llamachat.tables import text_table

Results = Mapping[str, Mapping[str, Benchmark]]  # policy -> set -> results


def benchmark_table(results: Results) -> tuple[list[str], list[list[Cell]], list[str]]:
    """Header, rows and notes: a row per figure under its set's title; columns for policies, then other models."""
    sets = {name: one for of_one in results.values() for name, one in of_one.items()}
    columns = list(dict.fromkeys(column for one in sets.values() for column in one.published))
    rows, notes = [], []
    for name, one in sorted(sets.items()):
        measured = [of_one.get(name) for of_one in results.values()]
        rows.append([Cell(one.title), *(Cell("") for _ in range(len(measured) + len(columns) + 1))])
        figures = dict.fromkeys(figure for of_one in measured if of_one for figure in of_one.figures)
        for figure in figures:
            cells = [of_one.figures.get(figure) if of_one else None for of_one in measured]
            count = next((str(cell.n) for cell in cells if cell and cell.n), "")
            published = [one.published.get(column, {}).get(figure) for column in columns]
            rows.append(
                [
                    Cell(f"  {figure}"),
                    Cell(count),
                    *(measure_cell(cell, percent) for cell in cells),
                    *(Cell(ABSENT if value is None else percent(value), is_paper=True) for value in published),
                ]
            )
        notes += [
            f"{of_one.title}, {policy}: {note}"
            for policy, of_one in zip(results, measured, strict=True)
            if of_one
            for note in of_one.notes
        ]
    return ["figure, with its 95% interval", "of", *results, *columns], rows, notes


def benchmarks(facts: Facts) -> Section | None:
    """Results of `llamachat benchmark` for the run's policies, on all sets that were run."""
    results = {step.name: measured for step in facts.policies if (measured := step.benchmarks)}
    if not results:
        return None
    head, rows, notes = benchmark_table(results)
    table = Table(
        "Published sets of questions, answered at temperature 0",
        head,
        rows,
        note="Measured by `llamachat benchmark`; docs/benchmarks.md says how, and whose the figures of other models are.",
        name="benchmarks",
    )
    return Section("Benchmarks", "benchmarks", [table, Points(notes)] if notes else [table])


def table_text(results: Results) -> str:
    """The table as text for a terminal."""
    head, rows, notes = benchmark_table(results)
    cells: list[Sequence[str]] = [head, *([f"{cell.text} {cell.beside}".rstrip() for cell in row] for row in rows)]
    return "\n".join([*text_table(cells, align="<>><" if len(results) == 1 else "<>"), "", *notes])
