"""The best and the median of N answers: against every subset, against drawing at random, and what must always hold."""

from itertools import combinations
from statistics import fmean, median

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamachat.answers.best_of_n import best_weights, expected_best, expected_median, median_weights

VALUES = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=7)  # few different ones: ties come by themselves


def row(values: list[float]) -> np.ndarray:
    return np.array([values], dtype=np.float64)


@given(VALUES)
def test_both_are_the_mean_over_all_subsets(values: list[float]) -> None:
    best, middle = expected_best(row(sorted(values)))[0], expected_median(row(values))[0]
    for n in range(1, len(values) + 1):
        subsets = list(combinations(values, n))
        assert best[n - 1] == pytest.approx(fmean(map(max, subsets)))
        assert middle[n - 1] == pytest.approx(fmean(map(median, subsets)))


def test_the_best_ranked_counts_also_where_its_value_is_not_the_highest() -> None:
    # Worst ranked first: of two of these three the best ranked is 5 (once) or 1 (twice), as the gate would have it.
    assert expected_best(row([9.0, 5.0, 1.0]))[0] == pytest.approx([5.0, (5.0 + 1.0 + 1.0) / 3, 1.0])


def test_drawing_many_answers_finds_the_same() -> None:
    # Of 64 uniform numbers the best of n has the mean n / (n + 1) whatever K they came from; prompts by the thousand.
    generator = np.random.default_rng(0)
    values_NK = np.sort(generator.random((4000, 64)), axis=1)
    best_K, median_K = (estimator(values_NK).mean(axis=0) for estimator in (expected_best, expected_median))
    n = np.arange(1, 65)
    assert best_K == pytest.approx(n / (n + 1), abs=0.005) and median_K == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize("count", [1, 2, 31, 256])
def test_the_weights_of_every_n_add_up_to_one(count: int) -> None:
    for weights in (best_weights(count), median_weights(count)):
        assert (weights >= 0).all() and weights.sum(axis=0) == pytest.approx(np.ones(count))
