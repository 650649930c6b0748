"""Intervals and detection figures against scikit-learn, scipy, hand-worked numbers and simulated coverage."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, mannwhitneyu
from sklearn.metrics import balanced_accuracy_score, precision_score, recall_score, roc_auc_score

from llamachat.maths import intervals
from llamachat.maths.intervals import (
    Difference,
    auroc,
    balanced_accuracy,
    bootstrap_interval,
    detection,
    paired_bootstrap,
    proportion_interval,
    superiority,
    wilson,
)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (8, 10), (10, 10), (1, 1), (263, 428)])
def test_wilson_equals_scipy(successes: int, n: int) -> None:
    wanted = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    assert (wilson(0, n)[0], wilson(n, n)[1]) == (0.0, 1.0), "no speck of rounding is left"


def test_outcomes_without_groups_have_wilsons_interval() -> None:
    outcomes = [1.0] * 30 + [0.0] * 20
    assert proportion_interval(outcomes) == pytest.approx(wilson(30, 50))
    assert proportion_interval(outcomes, groups=range(50)) == pytest.approx(wilson(30, 50))


def test_copies_of_an_outcome_say_nothing_new() -> None:
    # Ten copies each of 6 + 4 prompts: with m copies the design effect is m * G / (G - 1), so G - 1 = 9 are left.
    outcomes = [1.0] * 60 + [0.0] * 40
    groups = [index // 10 for index in range(100)]
    assert proportion_interval(outcomes, groups=groups) == pytest.approx(wilson(0.6 * 9, 9))


def test_equal_outcomes_count_their_groups() -> None:
    assert proportion_interval([1.0] * 12, groups=[index // 4 for index in range(12)]) == pytest.approx(wilson(3, 3))
    assert proportion_interval([1.0, 0.0], groups=["a", "a"]) == pytest.approx(wilson(0.5, 1))


def test_the_interval_of_grouped_outcomes_covers_the_truth() -> None:
    """Prompts of five pairs that share their luck: plain Wilson covers far less than it says, ours what it says."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(80), 5).tolist()
    ours = plain = 0
    for _ in range(400):
        chances = np.repeat(rng.beta(1.2, 0.8, 80), 5)  # mean 0.6
        outcomes = (rng.random(400) < chances).astype(float)
        low, high = proportion_interval(outcomes, groups=groups)
        ours += low <= 0.6 <= high
        low, high = wilson(outcomes.sum(), 400)
        plain += low <= 0.6 <= high
    assert 0.92 <= ours / 400 <= 0.98
    assert plain / 400 < 0.85


scored = st.lists(st.tuples(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 3.0]), st.booleans()), min_size=2, max_size=40)


@settings(max_examples=60, deadline=None)
@given(scored)
def test_auroc_equals_scikit_learn_with_ties(rows: list[tuple[float, bool]]) -> None:
    scores, labels = [score for score, _ in rows], [label for _, label in rows]
    if len(set(labels)) == 2:
        assert auroc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    else:
        assert math.isnan(auroc(scores, labels))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_detection_equals_scikit_learn(rows: list[tuple[bool, bool]]) -> None:
    named, member = [name for name, _ in rows], [truth for _, truth in rows]
    result = detection(named, member)
    wanted = (
        recall_score(member, named) if any(member) else math.nan,
        precision_score(member, named) if any(named) else math.nan,
    )
    assert (result.recall, result.precision) == pytest.approx(wanted, nan_ok=True)
    balanced = balanced_accuracy_score(member, named) if len(set(member)) == 2 else math.nan
    assert balanced_accuracy(named, member) == pytest.approx(balanced, nan_ok=True)


def test_bootstrap_of_a_mean_is_that_of_normal_theory() -> None:
    values = np.random.default_rng(1).normal(2.0, 1.0, 400)
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap_interval(values) == (low, high), "the draws are seeded"


def test_bootstrap_leaves_draws_without_a_figure_out() -> None:
    # With one positive among 6, a third of the draws (5/6)^6 has none and no area under a curve.
    rows = np.array([[3.0, 1], [1, 0], [2, 0], [4, 0], [0, 0], [5, 0]])
    low, high = bootstrap_interval(rows, lambda drawn: auroc(drawn[:, 0], drawn[:, 1] == 1))
    assert 0 <= low < 0.6 < high <= 1
    assert all(map(math.isnan, bootstrap_interval(rows[1:], lambda drawn: auroc(drawn[:, 0], drawn[:, 1] == 1))))


def test_a_paired_difference_knows_what_both_share() -> None:
    """The noise that two rules have in common is in neither interval of their difference."""
    common = np.random.default_rng(2).normal(0.0, 10.0, 300)
    difference = paired_bootstrap(common + 0.25, common)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.25, 0.25, 0.25), abs=1e-9)


def test_a_paired_difference_draws_groups_whole() -> None:
    gaps = np.random.default_rng(3).normal(0.1, 1.0, 100)
    alone = paired_bootstrap(gaps, np.zeros(100))
    half = 1.96 * gaps.std() / 10
    assert (alone.low, alone.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half), abs=0.03)
    # Nine copies of each in its group change nothing; nine independent items each would divide the width by 3.
    copied = paired_bootstrap(np.repeat(gaps, 9), np.zeros(900), groups=np.repeat(np.arange(100), 9).tolist())
    assert (copied.value, copied.low, copied.high) == pytest.approx((alone.value, alone.low, alone.high), abs=1e-9)


def test_one_prompt_has_no_interval() -> None:
    """Not [0.25, 0.25], which says that chance is excluded."""
    for difference in (
        paired_bootstrap([1.0, 0.5], [0.5, 0.5], groups=["one", "one"]),
        superiority([1.0], [0.5]),
        Difference(0.25, *bootstrap_interval([0.25, 0.25], groups=[1, 1])),
    ):
        assert math.isnan(difference.low) and math.isnan(difference.high)
        assert difference.named("x") == {"x": difference.value}
    assert paired_bootstrap([1.0, 0.5], [0.5, 0.5]).named("x").keys() == {"x", "x_low", "x_high"}


def test_superiority_by_hand_and_against_mann_whitney() -> None:
    # 2 > 1, 2 < 3, 3 > 1, 3 = 3. Drawn twice, the first item alone gives 1 and the second 1/2.
    result = superiority([2.0, 3.0], [1.0, 3.0])
    assert (result.value, result.low, result.high) == (2.5 / 4, 0.5, 1.0)
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 9, 60).tolist(), rng.integers(0, 7, 60).tolist()
    assert superiority(a, b).value == pytest.approx(mannwhitneyu(a, b).statistic / 60**2)


def test_the_interval_of_superiority_covers_the_truth_in_19_of_20_experiments() -> None:
    """Two answers to each prompt that share the prompt's difficulty; the truth is a half."""
    rng, covered = np.random.default_rng(7), 0
    for seed in range(200):
        prompts = rng.normal(size=60)
        result = superiority(prompts + rng.normal(size=60), prompts + rng.normal(size=60), draws=400, seed=seed)
        covered += result.low <= 0.5 <= result.high
    assert 0.9 <= covered / 200 <= 0.985


def test_differences_of_equally_many_items_share_their_draws_and_equal_those_that_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(1).random((3, 100))
    intervals._kept_counts.cache_clear()
    shared = [paired_bootstrap(values[0], other) for other in values[1:]]
    assert intervals._kept_counts.cache_info().hits == 1
    monkeypatch.setattr(intervals, "_MOST_KEPT", 0)
    assert shared == [paired_bootstrap(values[0], other) for other in values[1:]]


def test_the_interval_of_a_mean_is_that_of_any_statistic_that_returns_the_mean() -> None:
    values = np.random.default_rng(2).random(101)
    assert bootstrap_interval(values) == bootstrap_interval(values, lambda rows: float(np.mean(rows)))
