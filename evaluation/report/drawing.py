"""The report's plots: 6.4 inches wide with text of at least 11 points, so that they are legible on a phone.

Colours are Okabe and Ito's colour-blind safe palette; series also differ in marker or line style. Each function draws
its arguments and writes one PNG.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaluation.report.paper import RATINGS
from llamachat.runs.reader import Curve, Measure
from llamachat.tracking.curves import Series, running_mean
from llamachat.tracking.pictures import panel_grid, save_png, style_panel

# Policy -> index in the run, so that a policy has the same colour, marker and number in every plot.
Places = Mapping[str, int]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#8a3ea8", "#b8860b", "#444444", "#CC79A7", "#56B4E9")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", "-.", ":")
_GREY = "#6b6b6b"
_WIDTH = 6.4  # inches
_PANEL = (4.8, 3.0)  # size of a training curve
_POINTS = 11.5
_SMOOTH_FROM = 20
_MOST_IN_PANEL = 8


@contextmanager
def _picture(
    path: Path, height: float, *, width: float = _WIDTH, x: str = "", y: str = "", columns: int = 2
) -> Iterator[Any]:
    """Axes of a plot that is saved when the block ends, with the legend above them, where it hides no point."""
    figure, (place,) = panel_grid(1, panel=(width, height))
    yield place
    where = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "borderaxespad": 0.2}
    place.legend(fontsize=_POINTS - 0.5, frameon=False, ncols=columns, **where)
    style_panel(place, x=x, y=y, points=_POINTS)
    save_png(figure, path)


def accuracy_by_rating(
    path: Path, rated: Mapping[str, Sequence[Measure | None]], paper_rows: Mapping[str, Sequence[float]], domain: str
) -> None:
    """Accuracy of each model by rating; the paper's models have open markers."""
    labels = [rating.replace("_", "\n") for rating in RATINGS]
    with _picture(path, 4.2, y=f"accuracy on {domain} pairs, %") as place:
        count = len(rated)
        for index, (which, measures) in enumerate(rated.items()):
            known = [(at, one) for at, one in enumerate(measures[:-1]) if one is not None]
            shift = 0.14 * (index - (count - 1) / 2)
            _shares(place, [at + shift for at, _ in known], [one for _, one in known], index, label=f"ours: {which}")
        for name, values in paper_rows.items():
            index = list(rated).index(name) if name in rated else len(rated)
            place.plot(
                range(len(RATINGS)), values[:-1], **_mark(index), linestyle="--", linewidth=1.2, alpha=0.8, markersize=8,
                markerfacecolor="white", label=f"paper: {name}",
            )  # fmt: skip
        place.axhline(50, color=_GREY, linewidth=1)
        place.set_xticks(range(len(RATINGS)), labels)


def at_a_glance(
    path: Path, panels: Mapping[str, tuple[Mapping[str, Measure], float, float | None]], places: Places
) -> None:
    """A row per policy in panels side by side: title -> figures by policy, their scale, and the value of a draw."""
    rows = [name for name in places if any(name in by_policy for by_policy, *_ in panels.values())]
    figure, axes = panel_grid(len(panels), panel=(3.9, 1.1 + 0.42 * len(rows)), share_y=True)
    for place, (title, (by_policy, scale, middle)) in zip(axes, panels.items(), strict=True):
        for name, one in by_policy.items():
            place.errorbar(
                [one.value * scale], [rows.index(name)], xerr=_errors([one], scale), **_mark(places[name]),
                markersize=8, elinewidth=1.6, capsize=3, linestyle="",
            )  # fmt: skip
        if middle is not None:
            place.axvline(middle * scale, color=_GREY, linewidth=1.2)
        style_panel(place, title, points=_POINTS, title_points=_POINTS)
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)  # the first policy on top
    save_png(figure, path)


def ppo_overview(path: Path, panels: Mapping[str, Sequence[tuple[str, Series]]]) -> None:
    """PPO curves in panels side by side: title -> label and curve of each line."""
    figure, axes = panel_grid(len(panels), panel=(3.5, 3.3))
    for place, (title, lines) in zip(axes, panels.items(), strict=True):
        for index, (label, one) in enumerate(lines):
            if len(one.steps) < _SMOOTH_FROM:
                _line(place, one.steps, one.values, index, label=label)
            else:
                place.plot(
                    one.steps, one.values, color=_colour(index), linewidth=0, marker=".", markersize=3, alpha=0.25
                )
                place.plot(one.steps, running_mean(one.values), color=_colour(index), linewidth=2, label=label)
        unit = lines[0][1].metric.unit
        style_panel(place, title, x="iteration", y=unit, points=_POINTS, title_points=_POINTS)
        place.legend(fontsize=_POINTS - 1.5, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.45, -0.2))
    figure.set_layout_engine("constrained", w_pad=0.12)  # room for the labels next to the legends
    save_png(figure, path)


def best_and_median(path: Path, curves: Sequence[Curve], places: Places) -> None:
    """Figure 7: reward of the best and the median of N answers, one line each per policy."""
    with _picture(path, 4.2, x="N, answers to a prompt", y="combined score, deviations") as place:
        for curve in curves:
            index = places[curve.policy]
            counts = range(1, len(curve.best) + 1)
            place.fill_between(counts, curve.best_low, curve.best_high, color=_colour(index), alpha=0.15, linewidth=0)
            _line(place, counts, curve.best, index, label=f"{curve.policy}: best")
            place.plot(
                counts, curve.median, color=_colour(index), linestyle=":", linewidth=2, label=f"{curve.policy}: median"
            )
        place.xaxis.get_major_locator().set_params(integer=True)


def by_temperature(path: Path, policy: str, curves: Sequence[Curve], places: Places) -> None:
    """Figure 8: reward of the best of N answers at each temperature."""
    with _picture(path, 4.0, x=f"N, answers of {policy} to a prompt", y="best of N, deviations") as place:
        for index, curve in enumerate(sorted(curves, key=lambda one: one.temperature)):
            _line(
                place, range(1, len(curve.best) + 1), curve.best, places[policy], mark=index,
                label=f"temperature {curve.temperature:g}", line=_LINES[index % len(_LINES)],
            )  # fmt: skip
        place.xaxis.get_major_locator().set_params(integer=True)


def dots(
    path: Path,
    rows: Sequence[str],
    series: Mapping[str, Mapping[str, Measure]],
    *,
    places: Places,
    what: str,
    middle: float | None = None,
) -> None:
    """Shares in percent with intervals: a row per policy in its colour, with a marker per series."""
    height = 1.6 + 0.28 * len(series) + len(rows) * (0.3 + 0.2 * len(series))
    with _picture(path, height, x=what, columns=1) as place:
        for index, (name, by_row) in enumerate(series.items()):
            shift = 0.2 * (index - (len(series) - 1) / 2)
            for row, one in by_row.items():
                _shares(place, [rows.index(row) + shift], [one], places[row], mark=index, is_across=True)
            place.plot([], [], color=_GREY, marker=_MARKERS[index % len(_MARKERS)], linestyle="", label=name)
        if middle is not None:
            place.axvline(100 * middle, color=_GREY, linewidth=1.2)
        place.set_yticks(range(len(rows)), rows)
        place.set_ylim(len(rows) - 0.5, -0.5)  # the first policy on top


def plane(
    path: Path, points: Mapping[str, tuple[Measure, Measure]], *, places: Places, across: str, up: str,
    middle: float | None = None, scale: float = 1,
) -> None:  # fmt: skip
    """Figure 11's plane: a marker with intervals for each policy, connected in the order of the run."""
    with _picture(path, 4.8, x=across, y=up, columns=3) as place:
        pairs = list(points.values())
        across_by, up_by = ([one.value * scale for one in ends] for ends in zip(*pairs, strict=True))
        place.plot(across_by, up_by, color=_GREY, linewidth=1, alpha=0.6)
        for name, (x, y) in points.items():
            index = places[name]
            place.errorbar(
                [x.value * scale], [y.value * scale], xerr=_errors([x], scale), yerr=_errors([y], scale),
                **_mark(index), markersize=9, capsize=3, elinewidth=1.2, linestyle="", label=f"{index + 1} {name}",
            )  # fmt: skip
            place.annotate(
                str(index + 1), (x.value * scale, y.value * scale), xytext=(7, 7), textcoords="offset points",
                fontsize=_POINTS, weight="bold",
            )  # fmt: skip
        if middle is not None:
            place.axvline(middle * scale, color=_GREY, linewidth=1, linestyle=":")
            place.axhline(middle * scale, color=_GREY, linewidth=1, linestyle=":")


def by_turn(
    path: Path, kept: Mapping[str, Mapping[int, Measure]], chance: Mapping[str, Mapping[int, Measure]], places: Places
) -> None:
    """As in Table 30: share of dialogs that keep the instruction at each turn; the chance level is dotted."""
    with _picture(path, 4.2, x="turn", y="instruction kept, %") as place:
        for name, by in kept.items():
            index = places.get(name, len(places))  # the policy before a step has no index
            turns = sorted(by)
            _shares(place, turns, [by[turn] for turn in turns], index, label=name, line="-")
            if by_chance := chance.get(name):
                turns = sorted(by_chance)
                values = [100 * by_chance[turn].value for turn in turns]
                label = "without instruction (dotted)" if name == next(iter(chance)) else None
                place.plot(turns, values, color=_colour(index), linestyle=":", linewidth=1.8, label=label)
        place.set_xticks(sorted({turn for by in kept.values() for turn in by}))
        place.set_ylim(-3, 103)


def training_curve(path: Path, group: Sequence[Series]) -> None:
    """One panel of a step's metrics; noisy figures as light points with a running mean."""
    height = _PANEL[1] + 0.2 * (min(len(group), _MOST_IN_PANEL) - 1)
    units = ", ".join(sorted({one.metric.unit for one in group} - {"1", ""}))
    with _picture(path, height, width=_PANEL[0], x=group[0].axis, y=units, columns=1) as place:
        for index, one in enumerate(group[:_MOST_IN_PANEL]):
            label = one.name.partition("/")[2]
            if len(one.steps) == 1:
                place.axhline(one.values[0], color=_colour(index), linestyle="--", label=label)
            elif len(one.steps) < _SMOOTH_FROM:
                _line(place, one.steps, one.values, index, label=label)
            else:
                colour, line = _colour(index), _LINES[index % len(_LINES)]
                place.plot(one.steps, one.values, color=colour, linewidth=0, marker=".", markersize=3, alpha=0.25)
                mean = running_mean(one.values)
                place.plot(one.steps, mean, color=colour, linestyle=line, linewidth=2, label=label)
        # Matplotlib's default format puts a power of ten above the axis, where the legend is.
        place.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _shares(
    place: Any, at: Sequence[float], measures: Sequence[Measure], index: int, *, mark: int | None = None,
    label: str | None = None, line: str = "", is_across: bool = False,
) -> None:  # fmt: skip
    """Markers of shares in percent with intervals, vertical or horizontal."""
    values, errors = [100 * one.value for one in measures], _errors(measures, 100)
    ends = {"x": values, "y": at, "xerr": errors} if is_across else {"x": at, "y": values, "yerr": errors}
    place.errorbar(
        **ends,
        **_mark(index, mark),
        markersize=7,
        linestyle=line,
        linewidth=1.6,
        elinewidth=1.4,
        capsize=3,
        label=label,
    )


def _errors(measures: Sequence[Measure], scale: float) -> list[list[float]]:
    """Lower and upper error bars; 0 without an interval, never negative even if rounding put a mean outside."""
    spans = [one.interval or (one.value, one.value) for one in measures]
    return [
        [max(0.0, one.value - low) * scale for one, (low, _) in zip(measures, spans, strict=True)],
        [max(0.0, high - one.value) * scale for one, (_, high) in zip(measures, spans, strict=True)],
    ]


def _line(
    place: Any,
    x: Sequence[float],
    y: Sequence[float],
    index: int,
    *,
    label: str,
    line: str = "-",
    mark: int | None = None,
) -> None:
    every = max(1, len(x) // 8)
    place.plot(x, y, **_mark(index, mark), linestyle=line, linewidth=2, markersize=5, markevery=every, label=label)


def _colour(index: int) -> str:
    return _COLOURS[index % len(_COLOURS)]


def _mark(index: int, mark: int | None = None) -> dict[str, str]:
    """The colour of this index, and its marker or that of another index."""
    return {"color": _colour(index), "marker": _MARKERS[(index if mark is None else mark) % len(_MARKERS)]}
