"""Sums, means, variances and whitening over the positions selected by a mask; imports only torch.

Shapes: B sequences, T positions. Masks are boolean: True selects. Other positions are never read, so they
may be infinite or NaN; multiplying by a zero mask would propagate those, and their gradients.
"""

import torch
from torch import Tensor

# Added to the variance under the root, so that whitening equal values gives zeros and noise far below any real score
# difference (standard deviation under 1e-4) is not amplified.
VARIANCE_FLOOR = 1e-8


def masked_sum(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Sum over the selected positions, a scalar."""
    return _counted(x_BT, mask_BT).sum()


def masked_mean(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the selected positions, a scalar; 0 if there are none."""
    return masked_sum(x_BT, mask_BT) / mask_BT.sum().clamp(min=1)


def masked_variance(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Variance over the selected positions (divided by n, not n - 1); 0 if there are none."""
    counted_BT = _counted(x_BT, mask_BT)
    return masked_mean((counted_BT - masked_mean(counted_BT, mask_BT)).square(), mask_BT)


def whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Zero mean and unit variance over the selected positions; 0 elsewhere, and everywhere if all values are equal."""
    # In fp64: the mean of equal numbers is rounded too, and in fp32 that error far exceeds the floor's root.
    counted_BT = _counted(x_BT, mask_BT).double()
    scale = (masked_variance(counted_BT, mask_BT) + VARIANCE_FLOOR).rsqrt()
    white_BT = (counted_BT - masked_mean(counted_BT, mask_BT)) * scale
    return _counted(white_BT, mask_BT).to(x_BT.dtype)


def _counted(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    assert mask_BT.dtype == torch.bool and mask_BT.shape == x_BT.shape, "a boolean mask of the same shape"
    return torch.where(mask_BT, x_BT, 0.0)
