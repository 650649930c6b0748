"""A study as one picture: a panel for each figure of its tables, by variant or by the number that the variants
change."""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from llamachat.tracking.pictures import COLOURS, panel_grid, save_png, style_panel
from pipelines.studies.definition import Plan, Study, Table
from pipelines.studies.tables import Figures, interval, unit_of

_WIDE = 8.0  # ratio of the largest to the smallest number from which the axis is logarithmic


def draw_study(plan: Plan, tables: Sequence[Table], figures: Figures) -> bool:
    """Write `study.png` of the tables' figures; returns whether there was anything to draw."""
    panels = [
        (table, head, name)
        for table in tables
        for head, name in table.columns.items()
        if any(name in values for by_seed in figures.values() for values in by_seed.values())
    ]
    if not panels:
        return False
    figure, places = panel_grid(len(panels), panel=(4.4, 3.2), columns=3)
    recipe = plan.shared.sections.model_dump(mode="json")
    for place, (table, head, name) in zip(places, panels, strict=True):
        _draw_panel(place, plan.study, table, (head, name), figures, numbers_of(plan.study, table.variants, recipe))
    save_png(figure, plan.run_dir / "study.png")
    return True


def numbers_of(study: Study, variants: Sequence[str], recipe: Mapping[str, Any]) -> dict[str, float]:
    """The number of each variant: the one that all the keys it changes contain; otherwise nothing."""
    keys = _keys(study, variants)
    numbers = {}
    for name in variants:
        values = study.variants[name].values
        set_to = [values[key] if key in values else _at(recipe, key) for key in keys]
        are_numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in set_to)
        if not set_to or not are_numbers or len({*set_to}) > 1:
            return {}
        numbers[name] = float(set_to[0])
    return numbers if len({*numbers.values()}) > 1 else {}


def _keys(study: Study, variants: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(key for name in variants for key in study.variants[name].values))


def _at(recipe: Any, key: str) -> Any:
    """The recipe's own value of a dotted key; None if it has none."""

    def below(holder: Any, part: str) -> Any:
        if isinstance(holder, list):
            return holder[int(part)] if part.isdecimal() and int(part) < len(holder) else None
        return holder.get(part) if isinstance(holder, dict) else None

    return reduce(below, key.split("."), recipe)


def _draw_panel(
    place: Any,
    study: Study,
    table: Table,
    figure: tuple[str, str],
    figures: Figures,
    numbers: Mapping[str, float],
) -> None:
    head, name = figure
    unit = unit_of(name)
    scale = 100.0 if unit == "fraction" else 1.0
    by_variant = {
        variant: [scale * values[name] for values in figures.get(variant, {}).values() if name in values]
        for variant in table.variants
    }
    at = {variant: numbers.get(variant, float(index)) for index, variant in enumerate(table.variants)}
    shown = sorted((variant for variant in table.variants if by_variant[variant]), key=at.__getitem__)
    for variant in shown:
        values = by_variant[variant]
        place.plot([at[variant]] * len(values), values, ".", color="#5c5f66", markersize=4, zorder=3)
    means = [interval(by_variant[variant]) for variant in shown]
    place.errorbar(
        [at[variant] for variant in shown],
        [one.mean for one in means],
        yerr=[math.nan if one.high is None else one.high - one.mean for one in means],  # no bar for a single seed
        color=COLOURS[0],
        fmt="o-" if numbers else "o",
        markersize=5,
        linewidth=1.6,
        capsize=3,
    )
    _label_axis(place, study, table, at, numbers)
    style_panel(place, head, y={"fraction": "%", "1": ""}.get(unit, unit))


def _label_axis(place: Any, study: Study, table: Table, at: Mapping[str, float], numbers: Mapping[str, float]) -> None:
    keys = _keys(study, table.variants)
    place.set_xlabel(study.axis or ", ".join(keys), fontsize=8)
    if not numbers:
        place.set_xticks(list(at.values()), list(at), rotation=20, ha="right")
        place.set_xlim(-0.5, len(at) - 0.5)
        return
    if min(numbers.values()) > 0 and max(numbers.values()) >= _WIDE * min(numbers.values()):
        place.set_xscale("log", base=2)
        place.minorticks_off()
    place.set_xticks(list(numbers.values()), [f"{number:g}" for number in numbers.values()])
