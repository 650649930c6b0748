"""Sums, means, variances and whitening over the positions that count; imports torch alone.

Shapes: B sequences, T positions. A mask is boolean and True where a position counts. What lies elsewhere is never read,
so it may be infinite or not a number: a product with zero would carry that on, and its gradient too.
"""

import torch
from torch import Tensor

# Under the root of a variance, so that whitening values that are all alike gives zeros, and noise far below any score
# (a deviation under 1e-4) is not blown up to one.
VARIANCE_FLOOR = 1e-8


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over the counted positions, a scalar."""
    return _counted(x_BT, mask_BT).sum()


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the counted positions, a scalar; 0 where none counts."""
    return masked_sum(x_BT, mask_BT) / mask_BT.sum().clamp(min=1)


def masked_variance(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean squared distance from the mean of the counted positions (divided by n, not n - 1); 0 where none counts."""
    counted_BT = _counted(x_BT, mask_BT)
    return masked_mean((counted_BT - masked_mean(counted_BT, mask_BT)).square(), mask_BT)


def whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Zero mean and unit variance over the counted positions; 0 elsewhere, and everywhere where all are alike."""
    # In fp64: the mean of equal numbers is rounded too, and in fp32 that error is far above the floor's root.
    counted_BT = _counted(x_BT, mask_BT).double()
    scale = (masked_variance(counted_BT, mask_BT) + VARIANCE_FLOOR).rsqrt()
    white_BT = (counted_BT - masked_mean(counted_BT, mask_BT)) * scale
    return _counted(white_BT, mask_BT).to(x_BT.dtype)


def _counted(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    assert mask_BT.dtype == torch.bool and mask_BT.shape == x_BT.shape, "a boolean mask of the same shape"
    return torch.where(mask_BT, x_BT, 0.0)
