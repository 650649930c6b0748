"""PPO's losses and KL controllers: hand numbers on both sides of the clip, gradient facts, loops, and what cannot matter."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, tensor
from torch.testing import assert_close

from llamachat.config.section import identity
from ppo.config import Config
from ppo.losses import explained_variance, policy_loss, value_loss
from ppo.state import KlCoefficient

NOTHING = float("nan")
ONE = tensor([[True]])


def one_token(ratio: float, advantage: float) -> tuple[float, float, float]:
    """Loss, its gradient by the new log-probability, and whether the token counts as clipped."""
    new_11 = tensor([[math.log(ratio)]], requires_grad=True)
    terms = policy_loss(
        new_11, torch.zeros(1, 1), advantages_BR=tensor([[advantage]]), response_mask_BR=ONE, clip_range=0.2, tokens=1
    )
    terms.loss.backward()
    assert new_11.grad is not None
    return terms.loss.item(), float(new_11.grad), float(terms.clip_fraction)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0),  # where an update begins
        (1.1, 2.0, -2.2, -2.2, 0),  # inside: -r A, and d(-r A)/d log r = -r A
        (0.9, -2.0, 1.8, 1.8, 0),
        (1.5, 2.0, -2.4, 0.0, 1),  # better and already likelier by more than 1.2: -1.2 A, nothing more to gain
        (0.5, -2.0, 1.6, 0.0, 1),  # worse and already less likely than 0.8: -0.8 A
        (0.5, 2.0, -1.0, -1.0, 0),  # better but less likely: the bound does not stop its correction
        (1.5, -2.0, 3.0, 3.0, 0),
        *((ratio, 0.0, 0.0, 0.0, 0) for ratio in (0.5, 1.0, 1.5)),  # an advantage of zero moves nothing
    ],
)
def test_the_policy_loss_of_a_token_by_hand(
    ratio: float, advantage: float, loss: float, gradient: float, clipped: float
) -> None:
    assert one_token(ratio, advantage) == pytest.approx((loss, gradient, clipped), abs=1e-6)


def test_approximate_kl_by_hand() -> None:
    # r - 1 - log r of 2 and 1/2, over 4 tokens of the minibatch: (1 - log 2 - 1/2 + log 2) / 4
    terms = policy_loss(
        tensor([[2.0, 0.5]]).log(),
        torch.zeros(1, 2),
        advantages_BR=torch.zeros(1, 2),
        response_mask_BR=tensor([[True, True]]),
        clip_range=0.2,
        tokens=4,
    )
    assert_close(terms.approx_kl, tensor(0.125))


def test_before_the_first_step_the_ratio_is_one_and_the_kl_zero() -> None:
    logprobs_BR = torch.randn(2, 3)
    mask_BR = tensor([[True, True, True], [True, False, False]])
    advantages_BR = torch.randn(2, 3)
    terms = policy_loss(
        logprobs_BR,
        logprobs_BR.clone(),
        advantages_BR=advantages_BR,
        response_mask_BR=mask_BR,
        clip_range=0.2,
        tokens=4,
    )
    assert terms.approx_kl == terms.clip_fraction == 0
    assert_close(terms.loss, -advantages_BR[mask_BR].mean())


@pytest.mark.parametrize(
    ("new", "old", "target", "loss", "gradient", "clipped"),
    [
        (0.1, 0.0, 1.0, 0.405, -0.9, 0),  # inside: (0.1 - 1)^2 / 2, gradient V - G
        (0.5, 0.0, 1.0, 0.32, 0.0, 1),  # nearer than 0.2 from the old value allows: (0.2 - 1)^2 / 2, no gradient
        (0.5, 0.0, -1.0, 1.125, 1.5, 0),  # moved away from the return: the larger error is the true one
        (-0.5, 0.0, -1.0, 0.32, 0.0, 1),
    ],
)
def test_the_value_loss_of_a_token_by_hand(
    new: float, old: float, target: float, loss: float, gradient: float, clipped: float
) -> None:
    new_11 = tensor([[new]], requires_grad=True)
    terms = value_loss(
        new_11,
        tensor([[old]]),
        returns_BR=tensor([[target]]),
        response_mask_BR=ONE,
        value_clip_range=0.2,
        tokens=1,
    )
    terms.loss.backward()
    assert new_11.grad is not None
    got = (terms.loss.item(), float(new_11.grad), float(terms.clip_fraction))
    assert got == pytest.approx((loss, gradient, clipped), abs=1e-6)


def test_explained_variance_by_hand() -> None:
    returns_BR, mask_BR = tensor([[1.0, 3.0, NOTHING]]), tensor([[True, True, False]])
    cases = {
        (1.0, 3.0): 1.0,  # knows them
        (5.0, 7.0): 1.0,  # all but their mean: a constant error has no variance
        (2.0, 2.0): 0.0,  # says the same of all
        (3.0, 1.0): -3.0,  # errors -2 and 2: variance 4 over 1
    }
    for values, expected in cases.items():
        got = explained_variance(tensor([[*values, 9.0]]), returns_BR=returns_BR, response_mask_BR=mask_BR)
        assert got == pytest.approx(expected)
    alike_BR = torch.ones(1, 3)
    assert explained_variance(torch.randn(1, 3), returns_BR=alike_BR, response_mask_BR=alike_BR.bool()) == 0


# --- against loops, and what cannot matter

Row = tuple[list[float], ...]  # new, old, advantage (or new value, old value, return) of each token


def slow_policy_loss(rows: list[Row], clip_range: float) -> tuple[float, float, float]:
    loss = kl = clipped = tokens = 0.0
    for new, old, advantages in rows:
        for n, o, a in zip(new, old, advantages, strict=True):
            ratio = math.exp(n - o)
            bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
            loss -= min(ratio * a, bounded * a)
            kl += ratio - 1 - (n - o)
            clipped += bounded * a < ratio * a - 1e-9
            tokens += 1
    return loss / tokens, kl / tokens, clipped / tokens


def slow_value_loss(rows: list[Row], clip_range: float) -> float:
    losses = []
    for new, old, returns in rows:
        for n, o, g in zip(new, old, returns, strict=True):
            clipped = min(max(n, o - clip_range), o + clip_range)
            losses.append(max((n - g) ** 2, (clipped - g) ** 2) / 2)
    return sum(losses) / len(losses)


def batch(rows: list[Row], *, left: bool, more: int, fill: float) -> tuple[Tensor, ...]:
    """The three columns and the mask, padded with `fill` on one side to the longest row and `more` beyond."""
    width = max(len(row[0]) for row in rows) + more

    def padded(values: list[float], filler: float) -> list[float]:
        padding = [filler] * (width - len(values))
        return [*padding, *values] if left else [*values, *padding]

    columns = [tensor([padded(row[i], fill) for row in rows]) for i in range(3)]
    mask = tensor([padded([1.0] * len(row[0]), 0.0) for row in rows]).bool()
    return (*columns, mask)


def both_losses(parts: list[tuple[Tensor, ...]]) -> tuple[list[float], list[float]]:
    """Policy loss, KL, clip fraction and value loss, added over the parts; and the gradients by token, response by response."""
    tokens = sum(int(part[3].sum()) for part in parts)
    totals, gradients = [0.0] * 4, []
    for new_BR, old_BR, third_BR, mask_BR in parts:
        new_BR = new_BR.clone().requires_grad_()
        policy = policy_loss(
            new_BR, old_BR, advantages_BR=third_BR, response_mask_BR=mask_BR, clip_range=0.2, tokens=tokens
        )
        value = value_loss(
            new_BR, old_BR, returns_BR=third_BR, response_mask_BR=mask_BR, value_clip_range=0.2, tokens=tokens
        )
        (policy.loss + value.loss).backward()
        assert new_BR.grad is not None
        assert new_BR.grad[~mask_BR].abs().sum() == 0, "padding has no gradient"
        gradients += new_BR.grad[mask_BR].tolist()
        terms = (policy.loss, policy.approx_kl, policy.clip_fraction, value.loss)
        totals = [total + x.item() for total, x in zip(totals, terms, strict=True)]
    return totals, gradients


CELL = st.tuples(*[st.floats(-2, 2, width=16)] * 3)
ROWS = st.lists(st.lists(CELL, min_size=1, max_size=5), min_size=1, max_size=6).map(
    lambda rows: [tuple(list(column) for column in zip(*row, strict=True)) for row in rows]
)


@settings(deadline=None)
@given(ROWS, st.data())
def test_padding_order_and_micro_batches_change_no_loss_and_no_gradient(rows: list[Row], data: st.DataObject) -> None:
    expected, by_token = both_losses([batch(rows, left=False, more=0, fill=0.0)])
    assert expected[:3] == pytest.approx(slow_policy_loss(rows, 0.2), rel=1e-5, abs=1e-5)
    assert expected[3] == pytest.approx(slow_value_loss(rows, 0.2), rel=1e-5, abs=1e-5)

    fill = data.draw(st.sampled_from([0.0, -100.0, NOTHING, math.inf]))
    left, more = data.draw(st.booleans()), data.draw(st.integers(0, 3))
    size = data.draw(st.integers(1, len(rows)))
    cut = [batch(rows[i : i + size], left=left, more=more, fill=fill) for i in range(0, len(rows), size)]
    got, got_by_token = both_losses(cut)
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert got_by_token == pytest.approx(by_token, rel=1e-5, abs=1e-6)

    shuffled = random.Random(0).sample(rows, len(rows))
    assert both_losses([batch(shuffled, left=False, more=0, fill=0.0)])[0] == pytest.approx(
        expected, rel=1e-5, abs=1e-5
    )


def test_long_and_short_responses_count_by_their_tokens() -> None:
    """One response of 3 tokens with loss -1 each, one of 1 token with loss -5: 8 / 4 tokens, not a mean of means."""
    mask_BR = tensor([[True, True, True], [True, False, False]])
    advantages_BR = tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]])
    zeros_BR = torch.zeros(2, 3)
    terms = policy_loss(
        zeros_BR, zeros_BR, advantages_BR=advantages_BR, response_mask_BR=mask_BR, clip_range=0.2, tokens=4
    )
    assert_close(terms.loss, tensor(-2.0))


def test_what_is_watched_carries_no_gradient() -> None:
    new_BR, mask_BR = torch.randn(1, 3, requires_grad=True), torch.ones(1, 3, dtype=torch.bool)
    old_BR, third_BR = torch.randn(1, 3), torch.randn(1, 3)
    policy = policy_loss(new_BR, old_BR, advantages_BR=third_BR, response_mask_BR=mask_BR, clip_range=0.2, tokens=3)
    value = value_loss(new_BR, old_BR, returns_BR=third_BR, response_mask_BR=mask_BR, value_clip_range=0.2, tokens=3)
    assert policy.loss.requires_grad and value.loss.requires_grad
    figures = (policy.approx_kl, policy.clip_fraction, value.clip_fraction)
    assert not any(figure.requires_grad for figure in figures)


# --- the KL coefficient


def test_a_fixed_coefficient_stays() -> None:
    controller = KlCoefficient(0.01)
    assert controller.after(1e9) is controller
    assert controller.restored(controller.state()) == controller


@pytest.mark.parametrize(
    ("kl", "coef"),
    [
        (6.0, 0.1),  # on target
        (6.6, 0.101),  # error 0.1, gain 0.1: 1% more
        (5.4, 0.099),
        (60.0, 0.102),  # the error is held at 0.2
        (-1.0, 0.098),  # an estimate of KL may be negative
    ],
)
def test_an_adaptive_coefficient_by_hand(kl: float, coef: float) -> None:
    assert KlCoefficient(0.1, target=6.0, gain=0.1).after(kl).coef == pytest.approx(coef)


def test_a_controller_resumes_from_its_checkpoint() -> None:
    whole = KlCoefficient(0.1, target=6.0, gain=0.1)
    for kl in (3.0, 9.0, 12.0):
        whole = whole.after(kl)
    first = KlCoefficient(0.1, target=6.0, gain=0.1).after(3.0)
    rest = KlCoefficient(0.1, target=6.0, gain=0.1).restored(first.state())
    assert rest.after(9.0).after(12.0) == whole
    with pytest.raises(AssertionError, match="not finite"):
        whole.after(NOTHING)


# --- the section


def test_the_defaults_are_the_papers() -> None:
    """Llama 2, section 3.2.3, and its 7B model."""
    config = Config()
    stated = {
        "learning_rate": 1e-6,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-5,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "responses_per_iteration": 512,
        "responses_per_minibatch": 64,
        "epochs": 1,
        "clip_range": 0.2,
        "kl_coef": 0.01,
        "kl_control": "fixed",
        "iterations": 200,
    }
    assert {key: getattr(config, key) for key in stated} == stated


def test_what_costs_time_and_memory_alone_is_no_part_of_the_identity() -> None:
    of_the_run = {"save_every", "tokens_per_microbatch", "gradient_checkpointing"}
    assert set(Config.model_fields) - set(identity(Config())) == of_the_run


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"responses_per_minibatch": 48}, "is not a multiple of responses_per_minibatch"),
        ({"iterations": 5, "critic_warmup": 5}, "leaves none of the 5 iterations to the policy"),
        ({"responses_per_prompt": 3}, "is not a multiple of responses_per_prompt"),
        ({"advantages": "rloo"}, "set responses_per_prompt to 2 or more"),
        ({"advantages": "rloo", "responses_per_prompt": 2, "critic_warmup": 1}, "critic_warmup must be 0"),
        ({"clip_range": 0.0}, "greater than 0"),
    ],
)
def test_values_that_cannot_work_are_refused(values: dict[str, object], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        Config.model_validate(values)
