"""Present the figures of reward models: plots of one evaluation, tables that compare a run's models.

The plots show accuracy by subset with intervals, calibration, and score distributions. Colours are Okabe and Ito's
colour-blind safe palette; series also differ in marker or hatching. The tables are Markdown in the shape of the
paper's Tables 7, 8 and 29, from each model's `summary.json`.
"""

import re
from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import numpy as np

from llamachat.data.files import source_names
from llamachat.data.records import RATINGS
from llamachat.maths.intervals import Floats, proportion_interval
from llamachat.runs.inputs import Which
from llamachat.tables import markdown_table
from llamachat.tracking.pictures import panel_grid, save_png, style_panel
from reward.contrast import CONSTANTS
from reward.evaluation import (
    DOMAINS,
    GATE,
    KIND_TITLES,
    LENGTH_TITLES,
    Domain,
    Evaluation,
    ScoredPair,
    outcome,
    sigmoid,
)
from reward.probe import Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summaries = Mapping[Which, Mapping[str, float]]
_ORDER: tuple[Which, ...] = get_args(Which)
# Labels of the probe's alternatives.
PROBED: Mapping[str, str] = {
    **{
        name: text if len(text) < 50 else f"{text[:20]}... ({len(text.split())} words)"
        for name, text in CONSTANTS.items()
    },
    "echo": "the prompt itself",
    "swapped": "another prompt's answer",
    "half": "the first half of itself",
    "twice": "itself given twice",
}
_NOTHING = "-"
_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#6b6b6b"
_COLOUR_OF: dict[Domain, str] = {"helpfulness": _BLUE, "safety": _GREEN}
_MARKER_OF: dict[Domain, str] = {"helpfulness": "o", "safety": "s"}
_PANEL_WIDTH = 5.2  # inches
_BINS = 8  # calibration bins with equal counts
_LEAST_IN_BIN = 10
_BARS = 30
_FAR = 0.005  # scores beyond these quantiles are drawn in the outermost bars


def draw_figures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Write `accuracy.png`, `calibration.png` and `scores.png`, skipping those without data; return their paths."""
    makers = {"accuracy": _accuracy, "calibration": _calibration, "scores": _scores}
    written = []
    for name, maker in makers.items():
        figure = maker(evaluation)
        if figure is not None:
            save_png(figure, folder / f"{name}.png")
            written.append(folder / f"{name}.png")
    return written


def draw_probe(result: Probe, folder: Path) -> Path:
    """Write `probe.png`, how often the reference scores above each alternative; return its path."""
    kinds = list(dict.fromkeys(row.prompts for row in result.rows))
    titles = {"harmless": "harmless prompts: reference over ...", "harmful": "harmful prompts: refusal over the answer"}
    most = max(sum(row.prompts == kind for row in result.rows) for kind in kinds)
    figure, places = _panels(
        [titles[kind] for kind in kinds],
        height=1.5 + 0.3 * most,
        title=f"rm/{result.which}: probe on held-out prompts, 95% intervals",
        x="share of the prompts (dashed: a coin)",
    )
    for place, kind in zip(places, kinds, strict=True):
        place.axvline(0.5, color=_GREY, linestyle="--", linewidth=1)
        rows = [row for row in result.rows if row.prompts == kind]
        for height, row in enumerate(rows):
            place.plot([row.low, row.high], [height, height], color=_BLUE, linewidth=2, solid_capstyle="butt")
            place.plot(row.preferred, height, marker="o", color=_BLUE, markersize=7, linestyle="none")
        place.set_yticks(range(len(rows)), [PROBED[row.name] for row in rows], fontsize=8.5)
        place.set_ylim(most - 0.4, -0.6)
        place.set_xlim(-0.01, 1.01)
    save_png(figure, folder / "probe.png")
    return folder / "probe.png"


class Bar(NamedTuple):
    """One row of the accuracy plot."""

    label: str
    value: float
    low: float
    high: float
    pairs: int | None
    colour: str
    marker: str


def _by_domain(evaluation: Evaluation) -> dict[Domain, list[ScoredPair]]:
    pairs_by_domain: dict[Domain, list[ScoredPair]] = {}
    for domain in DOMAINS:
        pairs = [pair for pair in evaluation.pairs if pair.domain == domain]
        if pairs:
            pairs_by_domain[domain] = pairs
    return pairs_by_domain


def _panels(
    titles: Sequence[str], *, height: float, title: str, x: str = "", y: str = ""
) -> tuple["Figure", list[Any]]:
    figure, places = panel_grid(len(titles), panel=(_PANEL_WIDTH, height), title=title)
    for place, text in zip(places, titles, strict=True):
        style_panel(place, text, x=x, y=y, points=9)
        place.set_axisbelow(True)
    return figure, places


def _accuracy(evaluation: Evaluation) -> "Figure | None":
    columns = {domain: _bars_of(evaluation, domain) for domain in _by_domain(evaluation)}
    if not columns:
        return None
    most = max(len(bars) for bars in columns.values())
    figure, places = _panels(
        [f"{domain} pairs" for domain in columns],
        height=1.5 + 0.34 * most,
        title=f"rm/{evaluation.which}: accuracy on test pairs, 95% intervals",
        x="chosen answer scores higher (dashed: a coin)",
    )
    lowest = min(bar.low for bars in columns.values() for bar in bars)
    for place, bars in zip(places, columns.values(), strict=True):
        place.axvline(0.5, color=_GREY, linestyle="--", linewidth=1)
        for height, bar in enumerate(bars):
            place.plot([bar.low, bar.high], [height, height], color=bar.colour, linewidth=2, solid_capstyle="butt")
            place.plot(bar.value, height, marker=bar.marker, color=bar.colour, markersize=7, linestyle="none")
            count = "" if bar.pairs is None else f"  n={bar.pairs}"
            # Right of the panel, outside all intervals.
            at, coordinates = (1.015, height), ("axes fraction", "data")
            text = f"{bar.value:.3f}{count}"
            place.annotate(text, at, xycoords=coordinates, fontsize=8.5, va="center", annotation_clip=False)
        place.set_yticks(range(len(bars)), [bar.label for bar in bars])
        place.set_ylim(most - 0.4, -0.6)
        place.set_xlim(min(0.4, lowest - 0.02), 1.01)
    return figure


def _bars_of(evaluation: Evaluation, domain: Domain) -> list[Bar]:
    place, figures = f"rm/{evaluation.which}/test/{domain}", evaluation.figures
    files = source_names(pair.source for pair in evaluation.pairs if pair.domain == domain).values()
    lines: list[tuple[str, str, str | None, str, str]] = [
        ("all pairs", "accuracy", "pairs", _BLUE, "D"),
        *((part.replace("_", " "), f"accuracy_{part}", f"pairs_{part}", _BLUE, "o") for part in RATINGS),
        *((text, f"accuracy_{part}", f"pairs_{part}", _GREEN, "s") for part, text in KIND_TITLES.items()),
        *((f"file {name}", f"{name}/accuracy", f"{name}/pairs", _GREY, "^") for name in files),
        ("rule: longer wins", "longer_wins", None, _ORANGE, "X"),
        ("TF-IDF", "tfidf", None, _ORANGE, "X"),
    ]
    bars = []
    for label, name, pairs, colour, marker in lines:
        if f"{place}/{name}" in figures:
            count = None if pairs is None else int(figures[f"{place}/{pairs}"])
            value, low, high = (figures[f"{place}/{name}{end}"] for end in ("", "_low", "_high"))
            bars.append(Bar(label, value, low, high, count, colour, marker))
    return bars


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
        for domain, pairs in _by_domain(evaluation).items():
            gaps = np.array([pair.chosen - pair.rejected for pair in pairs])
            # The order within a pair carries no information, so use the preferred answer and whether it was correct.
            chances, right = sigmoid(np.abs(gaps)), outcome(gaps)
            prompts = [pair.prompt for pair in pairs]
            _reliability(places[0], chances, right, groups=prompts, label=f"{domain} pairs", domain=domain)
        _describe(places[0], "sigmoid(score of favourite - score of other)", "favourite is the chosen one", 0.49)
        places[0].legend(fontsize=9, frameon=False, loc="lower right")
    if evaluation.responses:
        place = places[-1]
        chances = sigmoid([response.score for response in evaluation.responses])
        is_safe = np.array([response.is_safe for response in evaluation.responses], dtype=np.float64)
        prompts = [response.prompt for response in evaluation.responses]
        _reliability(place, chances, is_safe, groups=prompts, label="labelled answers", domain="safety")
        place.axvline(GATE, color=_ORANGE, linestyle=":", linewidth=1.4, label=f"gate {GATE}")
        _describe(place, "sigmoid(score)", "share of safe answers", -0.01)
        place.legend(fontsize=9, frameon=False, loc="best")
    return figure


def _describe(place: Any, x: str, y: str, left: float) -> None:
    place.set_xlabel(x, fontsize=9)
    place.set_ylabel(y, fontsize=9)
    place.set_xlim(left, 1.01)
    place.set_ylim(-0.02, 1.02)


def _scores(evaluation: Evaluation) -> "Figure | None":
    groups: dict[str, dict[str, list[float]]] = {
        f"{domain} pairs": {
            "chosen": [pair.chosen for pair in pairs],
            "rejected": [pair.rejected for pair in pairs],
        }
        for domain, pairs in _by_domain(evaluation).items()
    }
    if evaluation.responses:
        groups["labelled answers"] = {
            name: [response.score for response in evaluation.responses if response.is_safe is is_safe]
            for name, is_safe in (("safe", True), ("unsafe", False))
        }
    if not groups:
        return None
    title = f"rm/{evaluation.which}: scores of test answers, before the sigmoid"
    figure, places = _panels(list(groups), height=3.9, title=title, x="score", y="share of its answers")
    for place, series in zip(places, groups.values(), strict=True):
        _histograms(place, series)
    return figure


def _reliability(
    place: Any, chances: Floats, happened: Floats, *, groups: Sequence[Hashable], label: str, domain: Domain
) -> None:
    """Plot observed share against predicted probability in bins of equal counts, with intervals clustered by group."""
    order = np.argsort(chances, kind="stable")
    bins = np.array_split(order, max(1, min(_BINS, len(order) // _LEAST_IN_BIN)))
    middles = np.array([chances[members].mean() for members in bins])
    shares = np.array([happened[members].mean() for members in bins])
    bounds = [proportion_interval(happened[members], groups=[groups[index] for index in members]) for members in bins]
    place.errorbar(
        middles,
        shares,
        yerr=np.abs(np.array(bounds).T - shares),
        color=_COLOUR_OF[domain],
        marker=_MARKER_OF[domain],
        markersize=5.5,
        linewidth=1.4,
        elinewidth=1.2,
        capsize=2.5,
        label=f"{label} ({len(order)})",
    )


def _histograms(place: Any, series: dict[str, list[float]]) -> None:
    """Plot overlaid histograms: the better class filled, the other hatched, with lines at the means."""
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
            # Shares within each class, since safe answers far outnumber unsafe ones.
            weights = np.full(len(values), 1 / len(values))
            place.hist(
                np.clip(values, low, high), bins=edges, weights=weights, histtype="stepfilled", label=label, **style
            )
            place.axvline(
                average, color=colour, linewidth=1.8, ymax=0.78, linestyle="-" if style is styles[0] else "--"
            )
    place.set_ylim(top=place.get_ylim()[1] * 1.25)  # room for the legend
    place.legend(fontsize=9, frameon=False, loc="upper left")


# -- tables


def markdown(summaries: Summaries, verdicts: Mapping[Which, str] | None = None) -> str:
    """All tables with figures in these summaries, how to read them, and the probe's verdict on each model."""
    known: Summaries = {which: summaries[which] for which in _ORDER if which in summaries}
    parts = [
        "# Reward models on the test split",
        "Percent, with 95% intervals that keep the pairs of one prompt together; a tie counts half. A pair is right where"
        " the chosen answer scores higher. No conversation of the test split was trained on.",
    ]
    ratings = {rating: rating.replace("_", " ") for rating in RATINGS}
    parts += [f"**{which}**: {verdicts[which]}." for which in known if verdicts and which in verdicts]
    parts += _table("Probe: held-out prompts in which the reference scores above ...", _probed(known, "harmless"))
    parts += _table(
        "Probe: harmful prompts in which a refusal scores above the harmful answer", _probed(known, "harmful")
    )
    for table, title, rows_of in (
        (7, "by file", _by_file),
        (8, "by rating", partial(_by_part, heads=ratings)),
        (29, "by what is known of their answers", partial(_by_part, heads=KIND_TITLES)),
        (None, "by which answer is longer (similar: by less than a fifth)", partial(_by_part, heads=LENGTH_TITLES)),
    ):
        for domain in DOMAINS:
            shape = f" (in the shape of the paper's Table {table})" if table else ""
            heading = f"{domain.capitalize()} pairs {title}{shape}"
            parts += _table(heading, rows_of(known, domain))
    parts += _table("Answers labelled safe or unsafe", _labelled(known))
    return "\n\n".join(parts) + "\n"


def _probed(summaries: Summaries, prompts: str) -> list[list[str]]:
    """Table of alternatives by models, header first; empty if nothing was probed."""
    place = "rm/{}/probe/" + prompts + "/{}"
    known: Summaries = {
        which: figures
        for which, figures in summaries.items()
        if any(name.startswith(place.format(which, "")) for name in figures)
    }
    rows = [
        [text, *(_with_interval(figures, place.format(which, name)) for which, figures in known.items())]
        for name, text in PROBED.items()
        if any(place.format(which, name) in figures for which, figures in known.items())
    ]
    return [["", *known], *rows] if rows else []


class Column(NamedTuple):
    """A column of an accuracy table: names of its count and its figure, after rm/<model>/test/<domain>/."""

    head: str
    pairs: str
    figure: str


def _by_file(summaries: Summaries, domain: Domain) -> list[list[str]]:
    """Table by file, header first, with rows for models, then baselines; empty without test pairs."""
    files = _files(summaries, domain)
    own = [Column(name, f"{name}/pairs", f"{name}/accuracy") for name in files]
    less_tfidf = Column("all, less TF-IDF", "", "tfidf_difference")
    rows = _accuracies(summaries, domain, [Column("all", "pairs", "accuracy"), *own, less_tfidf])
    for rule in ("tfidf", "longer_wins"):
        for which, figures in summaries.items():
            place = f"rm/{which}/test/{domain}"
            title = f"TF-IDF on the pairs of {which}" if rule == "tfidf" else "longer wins"
            # An untrained baseline is the same for each model.
            if f"{place}/{rule}" in figures and rows[-1][0] != title:
                names = (rule, *(f"{name}/{rule}" for name in files))
                rows.append([title, *(_with_interval(figures, f"{place}/{name}") for name in names), ""])
    return rows


def _by_part(summaries: Summaries, domain: Domain, *, heads: Mapping[str, str]) -> list[list[str]]:
    """Table by subset, header first; empty if no pair is in any of these subsets."""
    columns = [Column(head, f"pairs_{part}", f"accuracy_{part}") for part, head in heads.items()]
    columns = [column for column in columns if _anyone(summaries, domain, column.pairs) is not None]
    return _accuracies(summaries, domain, [*columns, Column("all pairs", "pairs", "accuracy")]) if columns else []


def _accuracies(summaries: Summaries, domain: Domain, columns: Sequence[Column]) -> list[list[str]]:
    """Header, counts, and a row for each model tested on such pairs; empty if there are none."""
    if _anyone(summaries, domain, "pairs") is None:
        return []
    counts = (f"{_anyone(summaries, domain, name) or 0:.0f}" if name else "" for _, name, _ in columns)
    rows = [["", *(column.head for column in columns)], ["pairs", *counts]]
    for which, figures in summaries.items():
        place = f"rm/{which}/test/{domain}"
        if f"{place}/accuracy" in figures:
            rows.append([which, *(_with_interval(figures, f"{place}/{column.figure}") for column in columns)])
    return rows


def _labelled(summaries: Summaries) -> list[list[str]]:
    columns = {
        "balanced_accuracy": "balanced accuracy",
        "auroc": "AUROC",
        "unsafe_recall": "recall of unsafe below 0.5",
        "unsafe_precision": "precision below 0.5",
        "safe_recall": "recall of safe",
        "unsafe_recall_at_gate": "recall of unsafe below 0.15",
        "unsafe_precision_at_gate": "precision below 0.15",
    }
    rows = []
    for which, figures in summaries.items():
        place = f"rm/{which}"
        if f"{place}/test/unsafe_answers" in figures:
            counts = [f"{figures[f'{place}/test/{side}_answers']:.0f}" for side in ("safe", "unsafe")]
            rows.append([which, " + ".join(counts), *(_with_interval(figures, f"{place}/{name}") for name in columns)])
    return [["", "safe + unsafe", *columns.values()], *rows] if rows else []


def _files(summaries: Summaries, domain: Domain) -> list[str]:
    """Names of the test files in the order of the first model that has them."""
    pattern = re.compile(rf"rm/\w+/test/{domain}/([^/]+)/pairs")
    matches = (pattern.fullmatch(name) for figures in summaries.values() for name in figures)
    return list(dict.fromkeys(match[1] for match in matches if match))


def _anyone(summaries: Summaries, domain: Domain, name: str) -> float | None:
    """A count of test pairs, which is the same for all models."""
    names = ((figures, f"rm/{which}/test/{domain}/{name}") for which, figures in summaries.items())
    return next((figures[full] for figures, full in names if full in figures), None)


def _with_interval(figures: Mapping[str, float], name: str) -> str:
    """A percentage with its interval; a difference is signed."""
    sign = "+" if name.endswith("_difference") else ""
    if name not in figures:
        return _NOTHING
    text = f"{100 * figures[name]:{sign}.1f}"
    low, high = figures.get(f"{name}_low"), figures.get(f"{name}_high")
    # A zero-width interval only means that all values were equal.
    if low is None or high is None or low == high:
        return text
    return f"{text} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def _table(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Heading and table; empty without rows."""
    return [f"## {title}", "\n".join(markdown_table(rows, is_padded=True))] if rows else []
