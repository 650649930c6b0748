"""The ramp before the length limit and the soft bound on the mean length, by hand."""

import math

import pytest
import torch
from torch import tensor

from llamachat.config.sections import LengthBound
from llamachat.scoring.length import hold_length, ramp_to_limit


def ramped(shaped: list[float], lengths: list[int], *, ramp: float = 0.4, unfinished: float = -1.0) -> list[float]:
    return ramp_to_limit(
        tensor(shaped), lengths_B=tensor(lengths), limit=10, ramp=ramp, unfinished_score=unfinished
    ).tolist()


def test_the_ramp_by_hand() -> None:
    # From 6 tokens to 11: a fifth of the way to -1 with each token; a score of 1 has 2 to lose.
    assert ramped([1.0] * 6, [1, 6, 7, 8, 9, 10]) == pytest.approx([1.0, 1.0, 0.6, 0.2, -0.2, -0.6])
    assert ramped([0.0, -3.0, -1.0], [8, 10, 10]) == pytest.approx([-0.4, -3.0, -1.0]), "what is lower stays"
    assert ramped([2.0], [10], unfinished=0.5) == pytest.approx([2.0 - 0.8 * 1.5])
    # A cut answer has its score already, whatever its length.
    assert ramped([-1.0], [10]) == [-1.0]


def test_without_a_ramp_a_finished_answer_keeps_its_score() -> None:
    assert ramped([1.0, 0.3, -1.0], [1, 10, 10], ramp=0.0) == pytest.approx([1.0, 0.3, -1.0])


def test_ending_at_the_last_token_is_never_worth_less_than_being_cut() -> None:
    for ramp in (0.0, 0.1, 0.5, 0.9):
        assert ramped([0.7], [10], ramp=ramp)[0] > -1.0


BOUND = LengthBound(shortest=0.5, longest=2.0, coef=3.0)


def length_terms(lengths: list[int], start: float, finished: list[bool] | None = None) -> list[float]:
    """The term alone, on scores of 0."""
    is_finished_B = tensor(finished or [True] * len(lengths))
    shaped_B = torch.zeros(len(lengths))
    return hold_length(
        shaped_B, lengths_B=tensor(lengths), is_finished_B=is_finished_B, bound=BOUND, start=start
    ).tolist()


@pytest.mark.parametrize("start", [5.0, 10.0, 20.0])
def test_within_the_bounds_length_counts_nothing(start: float) -> None:
    assert length_terms([5, 10, 15], start) == [0.0, 0.0, 0.0]


def test_past_a_bound_by_hand() -> None:
    # A mean of 10 where 2 x 2.5 are the most: twice too long, log 2. Half the mean gains half of 3 log 2.
    much = 3 * math.log(2)
    assert length_terms([5, 10, 15], 2.5) == pytest.approx([much / 2, 0.0, -much / 2])
    # A mean of 10 where 0.5 x 40 are the least: what is longer gains; more than twice the mean counts as twice.
    assert length_terms([1, 2, 27], 40.0) == pytest.approx([-0.9 * much, -0.8 * much, much])


def test_a_cut_answer_loses_by_its_length_and_never_gains() -> None:
    much = 3 * math.log(2)
    assert length_terms([5, 15], 2.5, [False, False]) == pytest.approx([0.0, -much / 2])
    assert length_terms([5, 15], 40.0, [False, False]) == pytest.approx([-much / 2, 0.0])


def test_a_score_plus_the_term() -> None:
    scores_B = hold_length(
        tensor([1.0, -1.0]), lengths_B=tensor([5, 15]), is_finished_B=tensor([True, True]), bound=BOUND, start=2.5
    )
    assert scores_B.tolist() == pytest.approx([1 + 1.5 * math.log(2), -1 - 1.5 * math.log(2)])
