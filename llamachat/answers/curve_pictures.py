"""Pictures of answers by their number: the best and the median of N answers (paper, figure 7), and the best of N by temperature (8)."""

from collections.abc import Sequence
from pathlib import Path

from llamachat.answers.curves import Curve
from llamachat.tracking.pictures import save_png

_LABEL = "reward, deviations of the first policy"


def draw_best_of_n(curves: Sequence[Curve], path: Path) -> None:
    """Best, with its 95% interval over prompts, and median against N: one panel a policy, at one temperature each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8 * len(curves), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for place, curve in zip(figure.subplots(1, len(curves), squeeze=False, sharey=True).flatten(), curves, strict=True):
        numbers = range(1, len(curve.best) + 1)
        place.fill_between(numbers, curve.best_low, curve.best_high, color="#1f5fa8", alpha=0.15, linewidth=0)
        place.plot(numbers, curve.best, color="#1f5fa8", linewidth=1.8, label=f"best of N, {curve.best[-1]:+.2f}")
        place.plot(numbers, curve.median, color="#d1601f", linewidth=1.8, label=f"median, {curve.median[-1]:+.2f}")
        _dress(place, f"{curve.policy}, temperature {curve.temperature:g}", len(curve.best))
    save_png(figure, path)


def draw_temperatures(curves: Sequence[Curve], path: Path) -> None:
    """Best of N against N, a line for each temperature, a panel for each policy."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    policies = list(dict.fromkeys(curve.policy for curve in curves))
    figure = Figure(figsize=(4.8 * len(policies), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for place, policy in zip(
        figure.subplots(1, len(policies), squeeze=False, sharey=True).flatten(), policies, strict=True
    ):
        own = sorted((curve for curve in curves if curve.policy == policy), key=lambda curve: curve.temperature)
        for index, curve in enumerate(own):
            colour = colormaps["viridis"](index / max(1, len(own) - 1) * 0.92)
            label = f"T {curve.temperature:g}: {curve.reward:+.2f}"
            place.plot(range(1, len(curve.best) + 1), curve.best, color=colour, linewidth=1.6, label=label)
        _dress(place, policy, len(own[0].best))
    save_png(figure, path)


def _dress(place: object, title: str, most: int) -> None:
    from matplotlib.axes import Axes

    assert isinstance(place, Axes)
    place.set_title(title, fontsize=10, loc="left")
    place.set_xlabel("answers to a prompt (N)", fontsize=8)
    place.set_ylabel(_LABEL, fontsize=8)
    if most > 16:
        place.set_xscale("log")
    place.tick_params(labelsize=8)
    place.grid(visible=True, alpha=0.25, linewidth=0.6)
    place.spines[["top", "right"]].set_visible(False)
    place.legend(fontsize=7.5, frameon=False)
