"""Rewards per token and advantages: hand numbers, a double loop, and padding on either side."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from llamachat.maths.logprobs import k1, response_kl
from ppo.advantages import gae, last_indices, leave_one_out, token_rewards
from ppo.losses import policy_loss

NOTHING = float("nan")


def test_the_last_index_is_that_of_the_last_token_not_of_the_length() -> None:
    mask_BR = tensor([[True, True, False], [False, True, True], [True, False, False]])
    assert last_indices(mask_BR).tolist() == [1, 2, 0]
    with pytest.raises(AssertionError, match="at least one token"):
        last_indices(tensor([[True], [False]]))


def test_rewards_by_hand() -> None:
    # beta 0.1; the score joins the penalty of the last response token, never the padding behind it.
    rewards_BR = token_rewards(
        tensor([2.0, -1.0]),
        kl_BR=tensor([[0.5, -1.0, 0.2], [3.0, NOTHING, math.inf]]),
        response_mask_BR=tensor([[True, True, True], [True, False, False]]),
        kl_coef=0.1,
    )
    assert_close(rewards_BR, tensor([[-0.05, 0.1, 1.98], [-1.3, 0.0, 0.0]]))


def test_rewards_of_a_response_add_up_to_equation_4() -> None:
    torch.manual_seed(0)
    policy_BR, reference_BR, shaped_B = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4)
    mask_BR = torch.arange(6) < tensor([[6], [1], [3], [5]])
    kl_BR = k1(policy_BR, reference_BR, response_mask_BR=mask_BR)
    rewards_BR = token_rewards(shaped_B, kl_BR=kl_BR, response_mask_BR=mask_BR, kl_coef=0.01)
    kl_B = response_kl(kl_BR, response_mask_BR=mask_BR)
    assert_close(rewards_BR.sum(dim=1), shaped_B - 0.01 * kl_B)


@pytest.mark.parametrize(
    ("rewards", "values", "discount", "gae_lambda", "advantages", "returns"),
    [
        # delta_1 = 1 + 0 - 2 = -1;  delta_0 = 0 + 0.5 * 2 - 1 = 0;  A_0 = 0 + 0.5 * 0.5 * (-1) = -0.25
        ([0.0, 1.0], [1.0, 2.0], 0.5, 0.5, [-0.25, -1.0], [0.75, 1.0]),
        # The defaults: gamma 1, lambda 0.95. delta_2 = 1 - 0.4 = 0.6; delta_1 = 0.4 - 0.2 = 0.2;
        # delta_0 = -0.1 + 0.2 - 0.5 = -0.4. A_2 = 0.6; A_1 = 0.2 + 0.95 * 0.6 = 0.77; A_0 = -0.4 + 0.95 * 0.77 = 0.3315
        ([-0.1, 0.0, 1.0], [0.5, 0.2, 0.4], 1.0, 0.95, [0.3315, 0.77, 0.6], [0.8315, 0.97, 1.0]),
    ],
)
def test_steps_by_hand(
    rewards: list[float],
    values: list[float],
    discount: float,
    gae_lambda: float,
    advantages: list[float],
    returns: list[float],
) -> None:
    estimate = gae(
        tensor([[*rewards, NOTHING]]),
        values_BR=tensor([[*values, NOTHING]]),
        response_mask_BR=tensor([[True] * len(rewards) + [False]]),
        discount=discount,
        gae_lambda=gae_lambda,
    )
    assert_close(estimate.advantages_BR, tensor([[*advantages, 0.0]]))
    assert_close(estimate.returns_BR, tensor([[*returns, 0.0]]))


def test_lambda_one_gives_the_rewards_to_come_and_lambda_zero_one_step() -> None:
    torch.manual_seed(1)
    rewards_BR, values_BR = torch.randn(3, 5), torch.randn(3, 5)
    mask_BR = torch.ones(3, 5, dtype=torch.bool)
    estimate = gae(rewards_BR, values_BR=values_BR, response_mask_BR=mask_BR, discount=1.0, gae_lambda=1.0)
    assert_close(estimate.returns_BR, rewards_BR.flip(1).cumsum(1).flip(1))
    estimate = gae(rewards_BR, values_BR=values_BR, response_mask_BR=mask_BR, discount=1.0, gae_lambda=0.0)
    next_BR = torch.cat([values_BR[:, 1:], torch.zeros(3, 1)], dim=1)
    assert_close(estimate.returns_BR, rewards_BR + next_BR)


def slow_gae(
    rewards: list[float], values: list[float], discount: float, gae_lambda: float
) -> tuple[list[float], list[float]]:
    """The sum itself: A_t = sum over l of (gamma * lambda)^l * delta_{t+l} (Schulman et al. 2016, Eq. 16)."""
    count = len(rewards)
    deltas = [rewards[t] + discount * (values[t + 1] if t + 1 < count else 0.0) - values[t] for t in range(count)]
    advantages = [
        sum((discount * gae_lambda) ** step * deltas[t + step] for step in range(count - t)) for t in range(count)
    ]
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def padded(rows: list[list[float]], *, left: list[int], width: int, fill: float) -> Tensor:
    return tensor(
        [[fill] * n + row + [fill] * (width - n - len(row)) for row, n in zip(rows, left, strict=True)],
        dtype=torch.float32,
    )


NUMBERS = st.floats(-3, 3, width=32)


@given(
    st.lists(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6), min_size=1, max_size=4),
    st.floats(0.5, 1.0),
    st.floats(0.0, 1.0),
    st.data(),
)
def test_a_double_loop_gives_the_same_whatever_the_padding(
    rows: list[list[tuple[float, float]]], discount: float, gae_lambda: float, data: st.DataObject
) -> None:
    width = 6 + data.draw(st.integers(0, 3))
    left = [data.draw(st.integers(0, width - len(row))) for row in rows]
    fill = data.draw(st.sampled_from([0.0, 7.0, NOTHING, math.inf]))
    rewards, values = ([[cell[i] for cell in row] for row in rows] for i in (0, 1))
    estimate = gae(
        padded(rewards, left=left, width=width, fill=fill),
        values_BR=padded(values, left=left, width=width, fill=fill),
        response_mask_BR=padded([[1.0] * len(row) for row in rows], left=left, width=width, fill=0.0).bool(),
        discount=discount,
        gae_lambda=gae_lambda,
    )
    slow = [slow_gae(r, v, discount, gae_lambda) for r, v in zip(rewards, values, strict=True)]
    for index, got_BR in enumerate((estimate.advantages_BR, estimate.returns_BR)):
        expected_BR = padded([pair[index] for pair in slow], left=left, width=width, fill=0.0)
        assert_close(got_BR, expected_BR, rtol=1e-4, atol=1e-4)


def test_nothing_here_carries_a_gradient() -> None:
    values_BR = torch.randn(2, 3, requires_grad=True)
    mask_BR = torch.ones(2, 3, dtype=torch.bool)
    estimate = gae(torch.randn(2, 3), values_BR=values_BR, response_mask_BR=mask_BR, discount=1.0, gae_lambda=0.9)
    rewards_BR = token_rewards(torch.randn(2), kl_BR=values_BR, response_mask_BR=mask_BR, kl_coef=0.1)
    assert not (estimate.advantages_BR.requires_grad or estimate.returns_BR.requires_grad or rewards_BR.requires_grad)


def test_leave_one_out_by_hand() -> None:
    # Of the first prompt the others' means are 4, 3.5 and 1.5, of the second 1.5, 1.5 and 0.
    rewards_B = tensor([1.0, 2.0, 6.0, 0.0, 0.0, 3.0])
    assert_close(leave_one_out(rewards_B, responses_per_prompt=3), tensor([-3.0, -1.5, 4.5, -1.5, -1.5, 3.0]))
    # What all answers to a prompt are paid alike says nothing about any of them.
    moved_B = rewards_B + tensor([5.0, 5.0, 5.0, -2.0, -2.0, -2.0])
    assert_close(leave_one_out(moved_B, responses_per_prompt=3), leave_one_out(rewards_B, responses_per_prompt=3))


def test_leave_one_out_gives_the_gradient_of_the_expected_reward() -> None:
    """Over all pairs that two draws can give, by their probabilities: the loss's gradient is that of minus the mean reward."""
    logits_A = tensor([0.3, -0.5, 1.1]).requires_grad_()
    paid_A = tensor([1.0, 3.0, -2.0])
    (exact_A,) = torch.autograd.grad((logits_A.softmax(0) * paid_A).sum(), logits_A)
    estimated_A = torch.zeros(3)
    mask_BR = torch.ones((2, 1), dtype=torch.bool)
    for drawn in itertools.product(range(3), repeat=2):
        logprobs_B1 = logits_A.log_softmax(0)[list(drawn)].unsqueeze(1)
        advantages_B1 = leave_one_out(paid_A[list(drawn)], responses_per_prompt=2).unsqueeze(1)
        loss = policy_loss(
            logprobs_B1,
            logprobs_B1.detach(),
            advantages_BR=advantages_B1,
            response_mask_BR=mask_BR,
            clip_range=0.2,
            tokens=2,
        ).loss
        probability = float(logprobs_B1.detach().sum().exp())
        estimated_A -= probability * torch.autograd.grad(loss, logits_A)[0]
    assert_close(estimated_A, exact_A, rtol=1e-5, atol=1e-6)
