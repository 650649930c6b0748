"""The figures of a study: means over seeds and paired differences with intervals, as JSON and Markdown.

A figure is shown in its unit (metrics.md), fractions in percent; one that the table of metrics lacks is shown
unchanged. Two variants are compared seed by seed: the same seed gives the same order of data, so the difference is
less noisy than either side. With a single seed no interval is shown.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llamachat.config.section import nearest
from llamachat.runs.atomic import write_json, write_text
from llamachat.tables import markdown_table, plural
from llamachat.tracking.metrics import find_metric
from pipelines.studies.definition import Plan, Study, Table
from reward.config import Config

Figures = Mapping[str, Mapping[int, Mapping[str, float]]]  # variant -> seed -> name of the figure -> value
CONFIDENCE = 0.95
# The figures of a study that names no tables.
_MAIN = re.compile(
    r"sft/eval_loss|rm/(helpfulness|safety|judge)/test/(helpfulness|safety)/accuracy"
    r"|[a-z]+/test/superiority|[a-z]+/test/final/(score|reward_helpfulness|reward_safety|judge|response_tokens)"
    r"|eval/[^/]+/(superiority|score|reward_helpfulness|reward_safety|judge|violation|harmful/refused|harmless/refused)"
)


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of the differences to the first row, seed by seed, with its 95% interval (Student's t over the seeds)."""

    mean: float
    low: float | None  # None for a single seed
    high: float | None


@dataclass(frozen=True, slots=True)
class Cell:
    """One figure of one variant."""

    mean: float
    by_seed: dict[int, float]
    difference: Difference | None  # None in the first row


def paired_difference(values: Sequence[float], others: Sequence[float]) -> Difference:
    """The mean of `values` minus `others`, pair by pair."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count == 1:
        return Difference(mean, None, None)
    from scipy.stats import t

    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * math.sqrt(variance / count)
    return Difference(mean, mean - half, mean + half)


def cell(figures: Figures, variant: str, first: str, metric: str) -> Cell | None:
    """A figure over the seeds that have it; None if none has."""
    own = _by_seed(figures, variant, metric)
    if not own:
        return None
    against = _by_seed(figures, first, metric)
    seeds = [seed for seed in own if seed in against]
    difference = None
    if variant != first and seeds:
        difference = paired_difference([own[seed] for seed in seeds], [against[seed] for seed in seeds])
    return Cell(math.fsum(own.values()) / len(own), own, difference)


def _by_seed(figures: Figures, variant: str, metric: str) -> dict[int, float]:
    return {seed: values[metric] for seed, values in figures.get(variant, {}).items() if metric in values}


def interval(values: Sequence[float]) -> Difference:
    """The mean with its 95% interval (Student's t)."""
    return paired_difference(values, [0.0] * len(values))


def unit_of(name: str) -> str:
    """The unit of a figure, or an empty text."""
    row = find_metric(name.rpartition(":")[2])
    return row.unit if row else ""


def tables_of(study: Study, figures: Figures) -> list[Table]:
    """The study's tables with every row named; if it names none, one table of the main figures of its runs."""
    everyone = tuple(study.variants)
    if study.tables:
        return [table if table.variants else table.model_copy(update={"variants": everyone}) for table in study.tables]
    names = dict.fromkeys(name for by_seed in figures.values() for values in by_seed.values() for name in values)
    columns = {name: name for name in names if _MAIN.fullmatch(name)}
    return [Table(title="All variants", variants=everyone, columns=columns)] if columns else []


def write_tables(plan: Plan, tables: Sequence[Table], figures: Figures, *, is_drawn: bool) -> str:
    """Write `study.json` and `study.md` with the results so far, and return the text."""
    study = plan.study
    index: dict[str, Any] = {
        "command": study.command,
        "seeds": list(study.seeds),
        "variants": {
            name: {**variant.model_dump(mode="json"), "figures": figures.get(name, {})}
            for name, variant in study.variants.items()
        },
        "tables": [
            {
                "title": table.title,
                "columns": {head: {"name": name, "unit": unit_of(name)} for head, name in table.columns.items()},
                "rows": {
                    name: {head: shown and asdict(shown) for head, shown in row.items()}
                    for name, row in _rows(table, figures).items()
                },
            }
            for table in tables
        ],
    }
    text = _page(plan, tables, figures, is_drawn=is_drawn)
    write_json(plan.run_dir / "study.json", index)
    write_text(plan.run_dir / "study.md", text)
    return text


def _page(plan: Plan, tables: Sequence[Table], figures: Figures, *, is_drawn: bool) -> str:
    study, done = plan.study, sum(map(len, figures.values()))
    lines = [
        f"# Study of `{plan.commands}`",
        "",
        f"{done} of {plural(len(plan.variants), 'run')}: {plural(len(study.variants), 'variant')}, seeds {', '.join(map(str, study.seeds))}."
        " Means over seeds, fractions in percent; the difference to the first row, seed by seed, is in brackets with its"
        " 95% interval (Student's t over the seeds).",
    ]
    if is_drawn:
        text = "Each point is the run of one seed; bars are 95% intervals of the mean (Student's t over the seeds)."
        lines += ["", "![figures by variant](study.png)", "", text]
    for table in tables:
        lines += _markdown(plan, table, figures)
    return "\n".join([*lines, *_absent(tables, figures), ""])


def _absent(tables: Sequence[Table], figures: Figures) -> Iterator[str]:
    """A line for each figure of a table that no run has."""
    known = {name for by_seed in figures.values() for values in by_seed.values() for name in values}
    for name in dict.fromkeys(name for table in tables for name in table.columns.values() if name not in known):
        near = nearest(name, sorted(known))
        yield f"\nNo run has the figure `{name}`. {f'Did you mean `{near}`?' if near else 'Its step was not run.'}"


def _rows(table: Table, figures: Figures) -> dict[str, dict[str, Cell | None]]:
    return {
        variant: {head: cell(figures, variant, table.variants[0], metric) for head, metric in table.columns.items()}
        for variant in table.variants
    }


def _markdown(plan: Plan, table: Table, figures: Figures) -> list[str]:
    lines = ["", f"## {table.title}"]
    if table.margins:
        margins = {variant: _margins(plan, variant) for variant in table.variants}
        heads = next(iter(margins.values()))
        lines += _grid(heads, [[variant, *(f"{m:.3g}" for m in row.values())] for variant, row in margins.items()])
    if table.columns:
        units = {head: unit_of(name) for head, name in table.columns.items()}
        in_words = {"fraction": " (%)", "": "", "1": ""}
        heads = [head if head == unit else head + in_words.get(unit, f" ({unit})") for head, unit in units.items()]
        rows = _rows(table, figures)
        lines += _grid(
            heads,
            [[variant, *(_shown(row[head], unit) for head, unit in units.items())] for variant, row in rows.items()],
        )
    return lines


def _grid(heads: Iterable[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["", *markdown_table([["variant", *(head.replace("_", " ") for head in heads)], *rows])]


def _shown(one: Cell | None, unit: str) -> str:
    if one is None:
        return "-"
    difference = one.difference
    text = _number(one.mean, unit)
    if difference is None:
        return text
    mean = _number(difference.mean, unit, sign="+")
    if difference.low is None or difference.high is None:
        return f"{text} ({mean})"
    return f"{text} ({mean}, {_number(difference.low, unit, sign='+')} to {_number(difference.high, unit, sign='+')})"


def _number(value: float, unit: str, sign: str = "") -> str:
    if unit == "fraction":
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.3g}" if abs(value) < 100 else f"{value:{sign}.0f}"


def _margins(plan: Plan, variant: str) -> Mapping[str, float]:
    """The margins by rating that a variant trains with (Llama 2 Table 27)."""
    from reward.loss import MARGINS

    recipe = next(recipe for (name, _), recipe in plan.variants.items() if name == variant)
    config = next(step.config for step in plan.steps(recipe, variant) if isinstance(step.config, Config))
    return {**MARGINS[config.margin]}
