"""The reward of the best of N answers, by N and temperature (Llama 2, arXiv:2307.09288, section 3.2.3, figures 7 and
8).

The best of N grows with N and the median does not. Both are estimated without bias from K answers: the mean over all
subsets of size N, which is exact and has minimum variance (the estimator of pass@k, Chen et al., arXiv:2107.03374, for
values instead of passes). Rewards are combined scores in standard deviations of a starting policy's answers to the
test prompts. Shapes: N prompts, K answers to each, one column for each n from 1 to K.
"""

from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llamachat.answers.groups import Group, Sampler, batches_of, sample_groups
from llamachat.answers.session import AnswerSession
from llamachat.data.prompts import EncodedPrompt
from llamachat.runs.reader import Curve
from llamachat.scoring.standardising import Constants
from llamachat.tracking.pictures import COLOURS, harmless, panel_grid, save_png, style_panel

Floats = NDArray[np.float64]

_FIRST_SEED = 500_000  # of these batches, beyond those of a round


def measure_curve(
    session: AnswerSession,
    prompts: Sequence[EncodedPrompt],
    *,
    policy: str,
    temperature: float,
    samples: int,
    constants: Constants,
    sampler: Sampler | None = None,
) -> Curve:
    """The curve of `samples` answers to each prompt at a temperature, of the session's policy or of the sampler's."""
    groups: list[Group] = []
    for number, batch in enumerate(batches_of(prompts, samples)):
        sampling = session.sampling(_FIRST_SEED + number, temperature=temperature)
        groups += sample_groups(session, batch, [(sampling, samples)], constants, sampler=sampler)
    return curve_of(groups, policy=policy, temperature=temperature)


def curve_of(groups: Sequence[Group], *, policy: str, temperature: float) -> Curve:
    """The curve of these prompts' answers; answers that could not win rank below all others."""
    ranked_NK, values_NK = (np.array(rows) for rows in zip(*(_ranked(group) for group in groups), strict=True))
    best_NK = expected_best(ranked_NK)
    drawn = np.random.default_rng(0).integers(0, len(best_NK), (1000, len(best_NK)))
    low_K, high_K = np.quantile(best_NK[drawn].mean(axis=1), [0.025, 0.975], axis=0)
    return Curve(
        policy=policy,
        temperature=temperature,
        best=best_NK.mean(axis=0).tolist(),
        best_low=low_K.tolist(),
        best_high=high_K.tolist(),
        median=expected_median(values_NK).mean(axis=0).tolist(),
    )


def _ranked(group: Group) -> tuple[list[float], list[float]]:
    """Rewards from the worst ranked answer to the best, and in the original order.

    An answer that cannot win counts as the prompt's worst: otherwise a long truncated one would count in favour of its
    temperature.
    """
    floor = min(group.standardised)
    can_win = [done and good for done, good in zip(group.finished, group.allowed, strict=True)]
    values = [value if wins else floor for value, wins in zip(group.standardised, can_win, strict=True)]
    worst_first = [place for wins in (False, True) for place in reversed(group.order) if can_win[place] is wins]
    return [values[place] for place in worst_first], values


def expected_best(ranked_NK: Floats) -> Floats:
    """E[value of the best ranked of n of the K answers] for n = 1 .. K, by prompt, [N, K]; worst ranked first."""
    return ranked_NK @ best_weights(ranked_NK.shape[1])


def expected_median(values_NK: Floats) -> Floats:
    """E[median of n of the K values] for n = 1 .. K, by prompt, [N, K]; for even n the mean of the middle two."""
    return np.sort(values_NK, axis=1) @ median_weights(values_NK.shape[1])


def best_weights(count: int) -> Floats:
    """Weight of the i-th worst of K answers (rows) in the expected best of n (columns): C(i - 1, n - 1) / C(K, n)."""
    return np.array([[comb(i - 1, n - 1) / comb(count, n) for n in range(1, count + 1)] for i in range(1, count + 1)])


def median_weights(count: int) -> Floats:
    """Weight of the i-th smallest of K values (rows) in the expected median of n (columns)."""

    def weight(i: int, n: int) -> float:
        middle = {(n + 1) // 2, n // 2 + 1}  # positions in an ordered subset, from 1
        ways = sum(comb(i - 1, j - 1) * comb(count - i, n - j) for j in middle)
        return ways / (comb(count, n) * len(middle))

    return np.array([[weight(i, n) for n in range(1, count + 1)] for i in range(1, count + 1)])


@harmless
def draw_best_of_n(curves: Sequence[Curve], path: Path) -> None:
    """Best (with its 95% interval over prompts) and median against N: one panel per policy, at one temperature each."""
    figure, places = panel_grid(len(curves), panel=(4.8, 3.6), share_y=True)
    for place, curve in zip(places, curves, strict=True):
        numbers = range(1, len(curve.best) + 1)
        place.fill_between(numbers, curve.best_low, curve.best_high, color=COLOURS[0], alpha=0.15, linewidth=0)
        place.plot(numbers, curve.best, color=COLOURS[0], linewidth=1.8, label=f"best of N, {curve.best[-1]:+.2f}")
        place.plot(numbers, curve.median, color=COLOURS[1], linewidth=1.8, label=f"median, {curve.median[-1]:+.2f}")
        _style(place, f"{curve.policy}, temperature {curve.temperature:g}", len(curve.best))
    save_png(figure, path)


@harmless
def draw_temperatures(curves: Sequence[Curve], path: Path) -> None:
    """Best of N against N: a line per temperature, a panel per policy."""
    from matplotlib import colormaps

    policies = list(dict.fromkeys(curve.policy for curve in curves))
    figure, places = panel_grid(len(policies), panel=(4.8, 3.8), share_y=True)
    for place, policy in zip(places, policies, strict=True):
        own = sorted((curve for curve in curves if curve.policy == policy), key=lambda curve: curve.temperature)
        for index, curve in enumerate(own):
            colour = colormaps["viridis"](index / max(1, len(own) - 1) * 0.92)
            label = f"T {curve.temperature:g}: {curve.reward:+.2f}"
            place.plot(range(1, len(curve.best) + 1), curve.best, color=colour, linewidth=1.6, label=label)
        _style(place, policy, len(own[0].best))
    save_png(figure, path)


def _style(place: Any, title: str, most: int) -> None:
    style_panel(
        place, title, x="answers per prompt (N)", y="reward, standard deviations of the first policy", has_legend=True
    )
    if most > 16:
        place.set_xscale("log")
