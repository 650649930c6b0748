"""Pictures of a step: how the safety model scores answers by how they were asked for (paper, figure 16 in shape)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from context_distillation.choosing import Choice
from llamachat.tracking.pictures import save_png

_BINS = 25
_MEANINGS = {
    "original": "no preprompt",
    "generic": "generic preprompt",
    "template": "answer template of the category",
    "kept": "kept, to be learnt",
}


def draw_scores(lists: Mapping[str, Sequence[float]], choices: Sequence[Choice], path: Path) -> None:
    """Left: shares of answers by safety score, as a probability. Right: best distilled answer against best plain one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    spread, pairs = figure.subplots(1, 2)
    colours = dict(zip(_MEANINGS, ("#5c5f66", "#1f5fa8", "#d1601f", "#2f8f4e"), strict=True))
    for name, scores in lists.items():
        values = [_probability(score) for score in scores]
        label = f"{_MEANINGS[name]}, mean {sum(values) / len(values):.2f}"
        weights = [1 / len(values)] * len(values)
        bins = [step / _BINS for step in range(_BINS + 1)]
        spread.hist(
            values, bins=bins, weights=weights, histtype="step", linewidth=1.6, color=colours[name], label=label
        )
    spread.set_xlabel("safety model's probability of safe", fontsize=8)
    spread.set_ylabel("share of answers", fontsize=8)
    for is_kept, colour, label in ((True, colours["kept"], "kept"), (False, colours["original"], "left out")):
        drawn = [choice for choice in choices if choice.is_kept is is_kept and choice.text]
        places = [_probability(choice.original_score) for choice in drawn]
        heights = [_probability(choice.score) for choice in drawn]
        pairs.scatter(places, heights, s=7, alpha=0.5, color=colour, label=f"{label}, {len(drawn)}", linewidths=0)
    pairs.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
    pairs.set_xlabel("best plain answer", fontsize=8)
    pairs.set_ylabel("best distilled answer", fontsize=8)
    for place in (spread, pairs):
        place.tick_params(labelsize=8)
        place.spines[["top", "right"]].set_visible(False)
        place.legend(fontsize=7.5, frameon=False)
    save_png(figure, path)


def _probability(score: float) -> float:
    """The logistic function; scores are logits."""
    return 1 / (1 + math.exp(-score)) if score >= 0 else math.exp(score) / (1 + math.exp(score))
