"""The curves of a step: as a picture with one panel per group of metrics, and as lines of text for a terminal.

Noisy figures are drawn twice: the raw points in a light colour, and a running mean. A metric with one value (the
loss of the base) is a dashed horizontal line. Both forms read only `metrics.jsonl`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from llamachat.runs.record import STEP, TIME, MetricsRecord
from llamachat.tables import plural, text_table
from llamachat.tracking.metrics import METRICS, Metric, find_metric
from llamachat.tracking.pictures import COLOURS, harmless, panel_grid, save_png, style_panel

_SMOOTH_FROM = 20
# Schedules and counters are exact: a running mean would distort them.
_EXACT_PANELS = {"learning rate", "progress", "trained tokens", "training time", "temperature", "memory"}
_FLAT = 0.02  # of the values: a smaller change is not worth showing
_BLOCKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_ASCII_BLOCKS = "_.-=+*%#"


@dataclass(frozen=True, slots=True)
class Series:
    """The values of one metric by step."""

    name: str
    metric: Metric
    axis: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


def read_series(metrics_path: Path) -> list[Series]:
    """Every metric of a record in the order of the table; a later line at the same step wins."""
    points: dict[
        tuple[str, str], dict[int, float]
    ] = {}  # two loops of a step may log the same name, each on its own axis
    for row in MetricsRecord(metrics_path).read():
        axis = next((name for name in row if name.endswith(f"/{STEP}")), STEP)
        for name in row:
            if name not in (STEP, TIME, axis):
                points.setdefault((name, axis), {})[int(row[STEP])] = row[name]
    series = []
    for (name, axis), by_step in points.items():
        # A record of another version of the table is still shown.
        metric = find_metric(name) or Metric(name, name, "", "", name)
        steps = tuple(sorted(by_step))
        series.append(Series(name, metric, axis, steps, tuple(by_step[step] for step in steps)))
    order = {name: place for place, name in enumerate(METRICS)}
    return sorted(series, key=lambda one: (order.get(one.metric.name, len(order)), one.name))


@harmless
def draw_curves(metrics_path: Path, png_path: Path, *, title: str | None = None) -> None:
    """Draw the record as a PNG, written to a side file and renamed; nothing is written if there is no curve."""
    panels = panels_of(read_series(metrics_path))
    # Metrics that were measured once are in summary.json, and have no curve.
    panels = {name: group for name, group in panels.items() if any(len(one.steps) > 1 for one in group)} or panels
    if not panels:
        return
    figure, places = _grid(len(panels), title or f"{metrics_path.parent.parent.name}: {metrics_path.parent.name}")
    for place, (name, group) in zip(places, panels.items(), strict=True):
        for one, colour in zip(group, cycle(COLOURS), strict=False):
            _draw_series(place, one, colour=colour, label=one.name.partition("/")[2], is_smoothed=_is_noisy(one))
        _frame_panel(place, name, group)
    save_png(figure, png_path)


def draw_overlays(metrics_paths: Sequence[Path], png_path: Path, *, labels: Sequence[str], title: str) -> Sequence[str]:
    """Draw the curves of the metrics that all these records have, one panel each, and return their names.

    A metric with a single value in all of them has no curve; without a curve nothing is written.
    """
    records = [{one.name: one for one in read_series(path)} for path in metrics_paths]
    shared = [name for name in records[0] if all(name in record for record in records[1:])]
    names = [name for name in shared if any(len(record[name].steps) > 1 for record in records)]
    if not names:
        return names
    figure, places = _grid(len(names), title)
    for place, name in zip(places, names, strict=True):
        group = [record[name] for record in records]
        is_smoothed = any(map(_is_noisy, group))  # the same kind of line for all runs, even if one is shorter
        for one, label, colour in zip(group, labels, COLOURS, strict=False):
            _draw_series(place, one, colour=colour, label=label, is_smoothed=is_smoothed)
        _frame_panel(place, name, group)
    save_png(figure, png_path)
    return names


def _grid(count: int, title: str) -> tuple[Any, list[Any]]:
    return panel_grid(count, panel=(5.4, 3.1), columns=3, title=title, title_inches=0.4)


def terminal_curves(metrics_path: Path, *, width: int = 100, is_ascii: bool = False) -> str:
    """One line per metric: first and last value, unit, and the curve in blocks; for a terminal without graphics."""
    series = read_series(metrics_path)
    if not series:
        return "  (no figures yet)\n"
    name_width = max(len("metric"), *(len(one.name) for one in series))
    curve_width = max(10, width - name_width - 2 - 3 * 12 - 3)
    rows = [
        (
            one.name,
            _short(one.values[0]),
            _short(one.values[-1]),
            one.metric.unit[:12],
            sparkline(one.values, curve_width, is_ascii=is_ascii),
        )
        for one in series
    ]
    lines = text_table([("metric", "first", "last", "unit", "curve"), *rows], align="<>><", indent="  ")
    lines.insert(1, "  " + "-" * (max(map(len, lines)) - 2))
    last_step = max(one.steps[-1] for one in series)
    lines.append(f"  {plural(sum(len(one.steps) for one in series), 'value')} up to step {last_step}")
    return "\n".join(lines) + "\n"


def sparkline(values: Sequence[float], width: int, *, is_ascii: bool = False) -> str:
    """The curve as at most `width` blocks, each the mean of its part of the values; a gap if none is finite."""
    blocks = _ASCII_BLOCKS if is_ascii else _BLOCKS
    count = min(width, len(values))
    shares = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [_mean([value for value in share if math.isfinite(value)]) for share in shares]
    finite = [mean for mean in means if mean is not None]
    if not finite:
        return " " * count
    low, span = min(finite), max(finite) - min(finite)
    # A constant is a line in the middle, not at the floor.
    heights = [None if mean is None else ((mean - low) / span if span > 0 else 0.5) for mean in means]
    return "".join(" " if height is None else blocks[round(height * (len(blocks) - 1))] for height in heights)


def panels_of(series: Sequence[Series]) -> dict[str, list[Series]]:
    """Panel title -> its series, which share an axis; figures of the step itself first, then optimizer, speed,
    memory."""
    panels: dict[str, list[Series]] = {}
    has_axes = len({one.axis for one in series}) > 1
    own = [one for one in series if one.axis.partition("/")[0] == one.name.partition("/")[0]]
    for one in [*own, *(one for one in series if one not in own)]:
        group = one.name.partition("/")[0]
        if one not in own:
            group = one.axis.rpartition("/")[0] if has_axes else ""
        panels.setdefault(f"{group}: {one.metric.panel}" if group else one.metric.panel, []).append(one)
    return panels


def _draw_series(place: Any, one: Series, *, colour: str, label: str, is_smoothed: bool) -> None:
    """Draw one curve: its points joined, or a running mean over them; a single value as a dashed horizontal line."""
    if len(one.steps) == 1:
        text = f"{label} {_short(one.values[0])}"
        place.axhline(one.values[0], color=colour, linestyle="--", linewidth=1.2, label=text)
    elif not is_smoothed:
        marker = "o" if len(one.steps) < _SMOOTH_FROM else None
        place.plot(one.steps, one.values, color=colour, linewidth=1.6, marker=marker, markersize=3.5, label=label)
    else:
        place.plot(one.steps, one.values, color=colour, linewidth=0, marker=".", markersize=3, alpha=0.25)
        place.plot(one.steps, running_mean(one.values), color=colour, linewidth=1.8, label=label)


def _is_noisy(one: Series) -> bool:
    return len(one.steps) >= _SMOOTH_FROM and one.metric.panel not in _EXACT_PANELS


def _frame_panel(place: Any, title: str, group: Sequence[Series]) -> None:
    """Title, axes with units, and the legend next to a panel, where it hides no curve."""
    units = sorted({one.metric.unit for one in group} - {"1", ""})
    style_panel(place, title, x=group[0].axis, y=", ".join(units))
    place.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    place.xaxis.get_major_locator().set_params(integer=True)
    low, high = place.get_ylim()
    largest = max(abs(low), abs(high))
    if high - low < _FLAT * largest:  # draw a constant as a constant, not its last digits
        place.set_ylim((low + high) / 2 - _FLAT * largest, (low + high) / 2 + _FLAT * largest)
    place.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=True)
    if units == ["fraction"]:  # explained variance can be below 0
        place.set_ylim(min(-0.03, low), max(1.03, high))


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the curve, truncated at both ends; values that are not finite are
    ignored."""
    half = max(2, len(values) // 40)
    means = (
        _mean([value for value in values[max(0, i - half) : i + half + 1] if math.isfinite(value)])
        for i in range(len(values))
    )
    return [math.nan if mean is None else mean for mean in means]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _short(value: float) -> str:
    if value != 0 and math.isfinite(value) and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
