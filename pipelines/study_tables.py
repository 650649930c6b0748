"""The figures of a study: means over seeds, paired differences with intervals, as JSON and as Markdown.

Two variants are compared seed by seed: the same seed is the same order of data, so the difference is less noisy than
each side. With a single seed there is no interval, and none is shown.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llamachat.runs.atomic import write_json, write_text

if TYPE_CHECKING:
    from pipelines.study import Plan, Table

Figures = Mapping[str, Mapping[int, Mapping[str, float]]]  # variant -> seed -> name of the figure -> value
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean of the differences to the first row, seed by seed, with the 95% interval of Student's t over the seeds."""

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
    """Of `values` less `others`, pair by pair."""
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
    """A figure over the seeds that have it; None where none has."""
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


def write_tables(plan: "Plan", figures: Figures) -> str:
    """Write `study.json` and `study.md` of what is done so far; returns the latter."""
    study = plan.study
    tables = [
        {
            "title": table.title,
            "rows": {
                name: {head: found and asdict(found) for head, found in row.items()} for name, row in rows.items()
            },
        }
        for table, rows in ((table, _rows(table, figures)) for table in study.tables)
    ]
    index: dict[str, Any] = {
        "command": study.command,
        "seeds": list(study.seeds),
        "variants": {
            name: {**variant.model_dump(mode="json"), "figures": figures.get(name, {})}
            for name, variant in study.variants.items()
        },
        "tables": tables,
    }
    done = sum(map(len, figures.values()))
    text = "\n".join(
        [
            f"# Study of `{study.command}`",
            "",
            f"{done} of {len(plan.variants)} runs: {len(study.variants)} variants, seeds {', '.join(map(str, study.seeds))}."
            " Means over seeds, in percent; in brackets the difference to the first row, seed by seed, with its 95%"
            " interval (Student's t over the seeds).",
            *(line for table in study.tables for line in _markdown(plan, table, figures)),
            "",
        ]
    )
    write_json(plan.run_dir / "study.json", index)
    write_text(plan.run_dir / "study.md", text)
    return text


def _rows(table: "Table", figures: Figures) -> dict[str, dict[str, Cell | None]]:
    return {
        variant: {head: cell(figures, variant, table.variants[0], metric) for head, metric in table.columns.items()}
        for variant in table.variants
    }


def _markdown(plan: "Plan", table: "Table", figures: Figures) -> list[str]:
    lines = ["", f"## {table.title}"]
    if table.margins:
        margins = {variant: _margins(plan, variant) for variant in table.variants}
        lines += _grid([[variant, *(f"{m:.3g}" for m in row.values())] for variant, row in margins.items()], margins)
    if table.columns:
        rows = _rows(table, figures)
        lines += _grid([[variant, *map(_shown, row.values())] for variant, row in rows.items()], rows)
    return lines


def _grid(lines: Sequence[Sequence[str]], rows: Mapping[str, Mapping[str, object]]) -> list[str]:
    heads = ["variant", *(head.replace("_", " ") for head in next(iter(rows.values())))]
    return ["", *(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))]


def _shown(found: Cell | None) -> str:
    if found is None:
        return "-"
    text, difference = f"{100 * found.mean:.1f}", found.difference
    if difference is None:
        return text
    if difference.low is None or difference.high is None:
        return f"{text} ({100 * difference.mean:+.1f})"
    return f"{text} ({100 * difference.mean:+.1f}, {100 * difference.low:+.1f} to {100 * difference.high:+.1f})"


def _margins(plan: "Plan", variant: str) -> Mapping[str, float]:
    """The margins by rating that a variant trains with (Llama 2 Table 27)."""
    from reward.config import Config
    from reward.loss import MARGINS

    recipe = next(recipe for (name, _), recipe in plan.variants.items() if name == variant)
    config = plan.steps(recipe, variant)[0].config
    assert isinstance(config, Config), "the loader lets only reward models have margins"
    return {**MARGINS[config.margin]}
