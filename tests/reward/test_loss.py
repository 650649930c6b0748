"""The losses of reward models, held to numbers worked out by hand."""

import math

import pytest
import torch
from torch import tensor

from llamachat.data.records import RATINGS
from reward.loss import MARGINS, centring_losses, ranking_losses, safety_auxiliary_losses


def test_ranking_losses_by_hand():
    # x = chosen - rejected - margin: 2 - 1 - 1 = 0, 0 - 1 - 0 = -1, 3 - 0 - 1/3 = 8/3; the loss is log(1 + e^-x).
    got_B = ranking_losses(tensor([2.0, 0.0, 3.0]), tensor([1.0, 1.0, 0.0]), margin_B=tensor([1.0, 0.0, 1 / 3]))
    expected_B = tensor([math.log(2), math.log(1 + math.e), math.log(1 + math.exp(-8 / 3))])
    torch.testing.assert_close(got_B, expected_B)


def test_a_margin_pushes_a_pair_that_is_already_in_order():
    # d loss / d chosen = -sigmoid(-(c - r - m)): -sigmoid(-1) = -0.268941 without margin, -sigmoid(2) = -0.880797 with 3.
    for margin, expected in ((0.0, -0.268941), (3.0, -0.880797)):
        chosen_B = tensor([1.0], requires_grad=True)
        ranking_losses(chosen_B, tensor([0.0]), margin_B=tensor([margin])).sum().backward()
        assert chosen_B.grad is not None and chosen_B.grad.item() == pytest.approx(expected, abs=1e-6)


def test_safety_auxiliary_losses_by_hand():
    # -log sigmoid(2) = 0.126928 for a safe answer at 2, -log(1 - sigmoid(2)) = 2.126928 for an unsafe one, log 2 at 0.
    got_N = safety_auxiliary_losses(tensor([2.0, 2.0, 0.0]), is_safe_N=tensor([1.0, 0.0, 1.0]))
    torch.testing.assert_close(got_N, tensor([0.126928, 2.126928, math.log(2)]), atol=1e-6, rtol=0)


def test_centring_losses_by_hand():
    got_B = centring_losses(tensor([1.0, -2.0, 0.5]), tensor([2.0, 2.0, 0.5]))  # 3^2, 0^2, 1^2
    assert got_B.tolist() == [9.0, 0.0, 1.0]


def test_margins_are_those_of_the_papers_table_27():
    assert {name: [table[rating] for rating in RATINGS] for name, table in MARGINS.items()} == {
        "none": [0, 0, 0, 0],
        "small": [1, 2 / 3, 1 / 3, 0],
        "large": [3, 2, 1, 0],
    }


def test_large_scores_give_finite_losses():
    far_B = tensor([1e4, -1e4])
    assert ranking_losses(far_B, -far_B, margin_B=torch.zeros(2)).tolist() == [0.0, 2e4]
    assert safety_auxiliary_losses(far_B, is_safe_N=tensor([1.0, 1.0])).tolist() == [0.0, 1e4]


@pytest.mark.parametrize("chosen", [torch.zeros(3, 1), torch.zeros(1), torch.zeros(())])
def test_shapes_that_would_broadcast_are_refused(chosen: torch.Tensor):
    right_B = torch.zeros(3)
    with pytest.raises(AssertionError):
        ranking_losses(chosen, right_B, margin_B=right_B)
    with pytest.raises(AssertionError):
        ranking_losses(right_B, right_B, margin_B=chosen)
    with pytest.raises(AssertionError):
        safety_auxiliary_losses(chosen, is_safe_N=right_B)
    with pytest.raises(AssertionError):
        centring_losses(chosen, right_B)
