"""Masked sums and whitening: hand numbers, a loop that is plainly right, and what must not matter."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from llamachat.maths.masked import masked_mean, masked_sum, masked_variance, whiten

NOTHING = float("nan")
# Counted: 1, 3, 8. Mean 4, squared distances 9, 1, 16: variance 26 / 3.
X_BT = tensor([[1.0, 3.0, NOTHING], [math.inf, 8.0, -math.inf]])
MASK_BT = tensor([[True, True, False], [False, True, False]])


def test_means_by_hand_over_padding_that_is_no_number() -> None:
    assert masked_sum(X_BT, MASK_BT) == 12
    assert masked_mean(X_BT, MASK_BT) == 4
    assert_close(masked_variance(X_BT, MASK_BT), tensor(26 / 3))


def test_whitening_by_hand() -> None:
    deviation = math.sqrt(26 / 3)
    expected_BT = tensor([[-3 / deviation, -1 / deviation, 0.0], [0.0, 4 / deviation, 0.0]])
    assert_close(whiten(X_BT, MASK_BT), expected_BT)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6])
def test_whitening_what_is_all_alike_gives_zeros(value: float) -> None:
    assert_close(whiten(torch.full((3, 5), value), torch.ones(3, 5, dtype=torch.bool)), torch.zeros(3, 5))


def test_where_nothing_counts_everything_is_zero() -> None:
    none_BT = torch.zeros(2, 3, dtype=torch.bool)
    assert masked_sum(X_BT, none_BT) == masked_mean(X_BT, none_BT) == masked_variance(X_BT, none_BT) == 0
    assert torch.equal(whiten(X_BT, none_BT), torch.zeros(2, 3))


def test_padding_that_is_no_number_has_a_gradient_of_zero() -> None:
    x_BT = X_BT.clone().requires_grad_()
    for function in (masked_mean, masked_variance, lambda x, mask: whiten(x, mask).square().sum()):
        (gradient_BT,) = torch.autograd.grad(function(x_BT, MASK_BT), x_BT)
        assert gradient_BT.isfinite().all()
        assert gradient_BT[~MASK_BT].abs().sum() == 0
        if function is masked_mean:
            assert_close(gradient_BT, torch.where(MASK_BT, 1 / 3, 0.0))


def test_a_mask_of_numbers_or_of_another_shape_is_our_mistake() -> None:
    with pytest.raises(AssertionError):
        masked_sum(X_BT, MASK_BT.int())
    with pytest.raises(AssertionError):
        masked_sum(X_BT, MASK_BT[:, :1])


@given(
    st.lists(st.tuples(st.floats(-100, 100, width=32), st.booleans()), min_size=1, max_size=24),
    st.randoms(use_true_random=False),
)
def test_a_plain_loop_gives_the_same_in_any_order(cells: list[tuple[float, bool]], random) -> None:
    counted = [value for value, counts in cells if counts]
    mean = sum(counted) / len(counted) if counted else 0.0
    variance = sum((value - mean) ** 2 for value in counted) / len(counted) if counted else 0.0
    random.shuffle(cells)
    x_BT = tensor([[value for value, _ in cells]], dtype=torch.float64)
    mask_BT = tensor([[counts for _, counts in cells]])
    assert_close(float(masked_mean(x_BT, mask_BT)), mean, rtol=1e-9, atol=1e-9)
    assert_close(float(masked_variance(x_BT, mask_BT)), variance, rtol=1e-9, atol=1e-9)
    white = [(value - mean) / math.sqrt(variance + 1e-8) if counts else 0.0 for value, counts in cells]
    assert_close(whiten(x_BT, mask_BT), tensor([white], dtype=torch.float64), rtol=1e-6, atol=1e-6)
