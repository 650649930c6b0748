"""Detect a collapsed policy: one identical answer, a small vocabulary, very short or very long answers.

Answers are compared with those of iteration 0 to the same prompts. A bound counts as crossed if the figure exceeds it
and has changed by more than three standard errors over prompts since iteration 0, which rules out chance.
"""

import math
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llamachat.answers.evaluation import Evaluation
from llamachat.maths.intervals import Floats, commonest_count, distinct_pairs
from ppo.config import CollapseGuard

_ERRORS = 3.0  # standard errors


def change_figures(now: Evaluation, start: Evaluation) -> dict[str, float]:
    """Ratios of length and distinct-2 to those of iteration 0, keyed by the last part of their metric names."""
    return {
        "distinct_2_ratio": distinct_pairs(now.texts) / max(distinct_pairs(start.texts), 1e-9),
        "length_ratio": sum(now.tokens) / sum(start.tokens),
    }


def collapses(now: Evaluation, start: Evaluation, guard: CollapseGuard) -> list[str]:
    """One sentence, with the configuration key, for each bound that the answers cross."""
    n, crossed = len(now.texts), []
    count, count_before = commonest_count(now.texts), commonest_count(start.texts)
    gain = (count - count_before) / n
    if gain > guard.commonest_answer and gain > _ERRORS * math.sqrt(_variance(count, n) + _variance(count_before, n)):
        crossed.append(
            f"{count} of {n} answers are identical, {count_before} at iteration 0 (commonest_answer:"
            f" {guard.commonest_answer:g})"
        )
    figures = change_figures(now, start)
    ratio = figures["distinct_2_ratio"]
    distinct = _without_each(now.texts) - _without_each(start.texts)
    # Scaled by n - 1, the standard error of these leave-one-out values is the jackknife's.
    if ratio < guard.distinct_2 and _is_beyond_chance(
        ratio - 1.0, (n - 1) * distinct, start=distinct_pairs(start.texts)
    ):
        crossed.append(f"distinct-2 is {ratio:.2f} of that at iteration 0 (distinct_2: {guard.distinct_2:g})")
    ratio = figures["length_ratio"]
    gaps = np.asarray(now.tokens, dtype=np.float64) - np.asarray(start.tokens, dtype=np.float64)
    if _is_beyond_chance(ratio - 1.0, gaps, start=sum(start.tokens) / n):
        for key, is_crossed in (("shortest", ratio < guard.shortest), ("longest", ratio > guard.longest)):
            if is_crossed:
                crossed.append(
                    f"answers are {ratio:.2f} times as long as at iteration 0 ({key}: {getattr(guard, key):g})"
                )
    return crossed


def _variance(count: int, n: int) -> float:
    """Variance of the proportion count / n."""
    return count * (n - count) / n**3


def _is_beyond_chance(change: float, values: Floats, *, start: float) -> bool:
    """Whether a relative change exceeds three standard errors; `values` are per prompt, in the unit of `start`."""
    n = len(values)
    return n > 1 and abs(change) * start > _ERRORS * float(np.std(values, ddof=1)) / math.sqrt(n)


def _without_each(texts: Sequence[str]) -> NDArray[np.float64]:
    """Leave-one-out distinct-2, one value per text (the jackknife, whose variance is biased upwards)."""
    pairs = [Counter(pairwise(text.split())) for text in texts]
    texts_with = Counter(pair for one in pairs for pair in one)  # number of texts that contain each pair
    total = sum(sum(one.values()) for one in pairs)
    remaining = [total - sum(one.values()) for one in pairs]
    distinct = [len(texts_with) - sum(texts_with[pair] == 1 for pair in one) for one in pairs]
    return np.array([kinds / count if count else 0.0 for kinds, count in zip(distinct, remaining, strict=True)])
