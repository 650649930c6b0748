"""Answers for people: rows to read, histograms of scores and lengths, two policies' histograms as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from llamachat.answers.evaluation import Evaluation
from llamachat.tracking.pictures import save_png

_BINS = 30
_MEANINGS = {
    "reward_helpfulness": "helpfulness score",
    "reward_safety": "safety score",
    "score": "combined, in deviations of the start",
    "judge": "judge's score",
}


def sample_rows(evaluation: Evaluation, prompts: Sequence[str], *, count: int) -> list[dict[str, object]]:
    """Answers for people to read with every score, at even distances over the prompts."""
    stride = max(1, len(prompts) // count)
    scores = evaluation.scores()
    return [
        {
            "prompt": prompts[index],
            "answer": evaluation.texts[index],
            "tokens": evaluation.tokens[index],
            "finished": evaluation.finished[index],
            **{name: round(values[index], 4) for name, values in scores.items()},
        }
        for index in range(0, len(prompts), stride)[:count]
    ]


def histograms(evaluation: Evaluation) -> Mapping[str, Sequence[float]]:
    """Scores and lengths of held-out answers, by the names of their histograms."""
    return {**evaluation.scores(), "response_tokens": evaluation.tokens}


def draw_comparison(start: Evaluation, final: Evaluation, path: Path) -> None:
    """Histograms of scores and lengths on test prompts, of the first policy and the final one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    before, after = start.scores(), final.scores()
    panels = [(_MEANINGS[name], before[name], after[name]) for name in _MEANINGS if name in after]
    panels.append(("tokens", [float(n) for n in start.tokens], [float(n) for n in final.tokens]))
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False).flatten()
    for place, (meaning, old, new) in zip(axes, panels, strict=True):
        low, high = min(*old, *new), max(*old, *new)
        bins = [low + (high - low) * step / _BINS for step in range(_BINS + 1)] if high > low else 1
        place.hist(old, bins=bins, alpha=0.55, color="#5c5f66", label=f"start, mean {_mean(old):.2f}")
        place.hist(new, bins=bins, alpha=0.55, color="#1f5fa8", label=f"final, mean {_mean(new):.2f}")
        place.set_title(meaning, fontsize=10, loc="left")
        place.set_ylabel("answers", fontsize=8)
        place.tick_params(labelsize=8)
        place.spines[["top", "right"]].set_visible(False)
        place.legend(fontsize=7.5, frameon=False)
    save_png(figure, path)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
