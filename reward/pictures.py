"""Pictures of an evaluation: accuracy of each part with its interval, calibration, and where the scores lie.

Colours are of Okabe and Ito's set, told apart by the colour-blind; series differ in marker or hatching too.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamachat.data.records import RATINGS
from llamachat.maths.intervals import Floats, proportion_interval
from llamachat.tracking.pictures import panel_grid, save_png, style_panel
from reward.evaluation import (
    DOMAINS,
    GATE,
    KIND_TITLES,
    Domain,
    Evaluation,
    outcome,
    sigmoid,
    source_names,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"
_COLOUR_OF: dict[Domain, str] = {"helpfulness": _BLUE, "safety": _GREEN}
_MARKER_OF: dict[Domain, str] = {"helpfulness": "o", "safety": "s"}
_PANEL_WIDTH = 5.2  # inches
_BINS = 8  # of calibration, equally full
_LEAST_IN_BIN = 10
_BARS = 30
_FAR = 0.005  # scores beyond these quantiles are drawn in the outermost bars


def draw_figures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `accuracy.png`, `calibration.png` and `scores.png`, those that there is something to draw for."""
    makers = {"accuracy": _accuracy, "calibration": _calibration, "scores": _scores}
    written = []
    for name, maker in makers.items():
        figure = maker(evaluation)
        if figure is not None:
            save_png(figure, folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    return written


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of the accuracy picture."""

    label: str
    value: float
    low: float
    high: float
    pairs: int | None
    colour: str
    marker: str


def _domains(evaluation: Evaluation) -> list[Domain]:
    return [domain for domain in DOMAINS if any(pair.domain == domain for pair in evaluation.pairs)]


def _panels(titles: Sequence[str], *, height: float, title: str) -> tuple["Figure", list[Any]]:
    figure, places = panel_grid(len(titles), panel=(_PANEL_WIDTH, height), title=title)
    for place, text in zip(places, titles, strict=True):
        style_panel(place, text, tick_points=9)
        place.set_axisbelow(True)
    return figure, places


def _accuracy(evaluation: Evaluation) -> "Figure | None":
    columns = {domain: _bars_of(evaluation, domain) for domain in _domains(evaluation)}
    if not columns:
        return None
    most = max(len(bars) for bars in columns.values())
    titles = [f"{domain} pairs" for domain in columns]
    figure, places = _panels(
        titles, height=1.5 + 0.34 * most, title=f"rm/{evaluation.which}: accuracy on test pairs, 95% intervals"
    )
    lowest = min(bar.low for bars in columns.values() for bar in bars)
    for place, bars in zip(places, columns.values(), strict=True):
        place.axvline(0.5, color=_GREY, linestyle="--", linewidth=1)
        for height, bar in enumerate(bars):
            place.plot([bar.low, bar.high], [height, height], color=bar.colour, linewidth=2, solid_capstyle="butt")
            place.plot(bar.value, height, marker=bar.marker, color=bar.colour, markersize=7, linestyle="none")
            count = "" if bar.pairs is None else f"  n={bar.pairs}"
            # Right of the panel, where no interval reaches.
            place.annotate(
                f"{bar.value:.3f}{count}",
                (1.015, height),
                xycoords=("axes fraction", "data"),
                fontsize=8.5,
                va="center",
                annotation_clip=False,
            )
        place.set_yticks(range(len(bars)), [bar.label for bar in bars])
        place.set_ylim(most - 0.4, -0.6)
        place.set_xlim(min(0.4, lowest - 0.02), 1.01)
        place.set_xlabel("chosen answer scores higher (dashed: a coin)", fontsize=9)
    return figure


def _bars_of(evaluation: Evaluation, domain: Domain) -> list[Bar]:
    place, figures = f"rm/{evaluation.which}/test/{domain}", evaluation.figures
    found = []

    def add(label: str, name: str, pairs: str | None, colour: str, marker: str = "o") -> None:
        if name in figures:
            count = None if pairs is None else int(figures[pairs])
            value, low, high = figures[name], figures[f"{name}_low"], figures[f"{name}_high"]
            found.append(Bar(label, value, low, high, count, colour, marker))

    add("all pairs", f"{place}/accuracy", f"{place}/pairs", _BLUE, "D")
    for rating in RATINGS:
        add(rating.replace("_", " "), f"{place}/accuracy_{rating}", f"{place}/pairs_{rating}", _BLUE)
    for kind, text in KIND_TITLES.items():
        add(text, f"{place}/accuracy_{kind}", f"{place}/pairs_{kind}", _GREEN, "s")
    for name in source_names(pair.source for pair in evaluation.pairs if pair.domain == domain).values():
        add(f"file {name}", f"{place}/{name}/accuracy", f"{place}/{name}/pairs", _GREY, "^")
    add("rule: longer wins", f"{place}/longer_wins", None, _ORANGE, "X")
    add("TF-IDF", f"{place}/tfidf", None, _ORANGE, "X")
    return found


def _calibration(evaluation: Evaluation) -> "Figure | None":
    titles = [
        *(["preferences: is the chance of the order right?"] if evaluation.pairs else []),
        *(["labelled answers: is sigmoid(score) the chance of safe?"] if evaluation.responses else []),
    ]
    if not titles:
        return None
    figure, places = _panels(titles, height=4.4, title=f"rm/{evaluation.which}: calibration on the test split")
    for place in places:
        place.plot([0, 1], [0, 1], color=_GREY, linestyle="--", linewidth=1, label="perfect")
    if evaluation.pairs:
        place = places[0]
        for domain in _domains(evaluation):
            pairs = [pair for pair in evaluation.pairs if pair.domain == domain]
            gaps = np.array([pair.chosen - pair.rejected for pair in pairs])
            # The order in which a pair is written says nothing: the model's own favourite, and whether it was right.
            prompts = [pair.prompt for pair in pairs]
            _reliability(
                place, sigmoid(np.abs(gaps)), outcome(gaps), groups=prompts, label=f"{domain} pairs", domain=domain
            )
        place.set_xlabel("sigmoid(score of favourite - score of other)", fontsize=9)
        place.set_ylabel("favourite is the chosen one", fontsize=9)
        place.set_xlim(0.49, 1.01)
        place.legend(fontsize=9, frameon=False, loc="lower right")
    if evaluation.responses:
        place = places[-1]
        chances = sigmoid([response.score for response in evaluation.responses])
        is_safe = np.array([response.is_safe for response in evaluation.responses], dtype=np.float64)
        _reliability(place, chances, is_safe, groups=range(len(chances)), label="labelled answers", domain="safety")
        place.axvline(GATE, color=_ORANGE, linestyle=":", linewidth=1.4, label=f"gate {GATE}")
        place.set_xlabel("sigmoid(score)", fontsize=9)
        place.set_ylabel("share of safe answers", fontsize=9)
        place.set_xlim(-0.01, 1.01)
        place.legend(fontsize=9, frameon=False, loc="best")
    for place in places:
        place.set_ylim(-0.02, 1.02)
    return figure


def _reliability(
    place: Any, chances: Floats, happened: Floats, *, groups: Sequence[Hashable], label: str, domain: Domain
) -> None:
    """Predicted chance against observed share in equally full bins, with intervals that keep groups together."""
    order = np.argsort(chances, kind="stable")
    bins = np.array_split(order, max(1, min(_BINS, len(order) // _LEAST_IN_BIN)))
    middles = np.array([chances[members].mean() for members in bins])
    shares = np.array([happened[members].mean() for members in bins])
    bounds = np.array(
        [proportion_interval(happened[members], groups=[groups[index] for index in members]) for members in bins]
    )
    errors = np.abs(bounds.T - shares)
    place.errorbar(
        middles,
        shares,
        yerr=errors,
        color=_COLOUR_OF[domain],
        marker=_MARKER_OF[domain],
        markersize=5.5,
        linewidth=1.4,
        elinewidth=1.2,
        capsize=2.5,
        label=f"{label} ({len(order)})",
    )


def _scores(evaluation: Evaluation) -> "Figure | None":
    groups: dict[str, dict[str, list[float]]] = {}
    for domain in _domains(evaluation):
        pairs = [pair for pair in evaluation.pairs if pair.domain == domain]
        groups[f"{domain} pairs"] = {
            "chosen": [pair.chosen for pair in pairs],
            "rejected": [pair.rejected for pair in pairs],
        }
    if evaluation.responses:
        groups["labelled answers"] = {
            "safe": [response.score for response in evaluation.responses if response.is_safe],
            "unsafe": [response.score for response in evaluation.responses if not response.is_safe],
        }
    if not groups:
        return None
    figure, places = _panels(
        list(groups), height=3.9, title=f"rm/{evaluation.which}: scores of test answers, before the sigmoid"
    )
    for place, series in zip(places, groups.values(), strict=True):
        _histograms(place, series)
    return figure


def _histograms(place: Any, series: dict[str, list[float]]) -> None:
    """The better class filled, the other hatched, on the same bars; lines at the means."""
    everything = np.concatenate([np.asarray(values, dtype=np.float64) for values in series.values()])
    low, high = np.quantile(everything, [_FAR, 1 - _FAR])
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, _BARS + 1)
    styles = ({"color": _BLUE, "alpha": 0.45}, {"edgecolor": _ORANGE, "fill": False, "hatch": "////", "linewidth": 1.2})
    for (name, values), style, colour in zip(series.items(), styles, (_BLUE, _ORANGE), strict=True):
        if values:
            average = float(np.mean(values))
            label = f"{name} ({len(values)}), mean {average:.2f}"
            # A share of its own class: safe answers are many times as many as unsafe ones.
            weights = np.full(len(values), 1 / len(values))
            place.hist(
                np.clip(values, low, high), bins=edges, weights=weights, histtype="stepfilled", label=label, **style
            )
            place.axvline(
                average, color=colour, linewidth=1.8, ymax=0.78, linestyle="-" if style is styles[0] else "--"
            )
    place.set_ylim(top=place.get_ylim()[1] * 1.25)  # room for the legend
    place.set_xlabel("score", fontsize=9)
    place.set_ylabel("share of its answers", fontsize=9)
    place.legend(fontsize=9, frameon=False, loc="upper left")
