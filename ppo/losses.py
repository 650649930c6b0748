"""PPO's clipped losses and the figures of an update; imports only torch.

Shapes: B responses, R response positions. `tokens` is the number of response tokens in the whole minibatch: each loss
and figure is a sum over the given tokens, divided by `tokens`. Parts of a minibatch therefore add up to the minibatch,
however it is split, padded or ordered, and so do their gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llamachat.maths.masked import masked_sum, masked_variance


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """Only the loss has a gradient. Summed over parts, the figures are means over the minibatch's tokens."""

    loss: Tensor
    approx_kl: Tensor  # nats per token, between the policies before the update and now
    clip_fraction: Tensor


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """The loss, with a gradient, and the share of tokens whose error is clipped, without one."""

    loss: Tensor
    clip_fraction: Tensor


def policy_loss(
    new_logprobs_BR: Tensor,
    old_logprobs_BR: Tensor,
    *,
    advantages_BR: Tensor,
    response_mask_BR: Tensor,
    clip_range: float,
    tokens: int,
) -> PolicyLoss:
    """-min(r * A, clip(r, 1 - c, 1 + c) * A) over response tokens (Schulman et al. 2017, arXiv:1707.06347, Eq. 7).

    A token counts as clipped if the clipped term is the minimum, so that it has no gradient. `approx_kl` is the mean
    of r - 1 - log r.
    """
    assert tokens > 0
    log_ratio_BR = _log_ratios(new_logprobs_BR, old_logprobs_BR, response_mask_BR)
    ratio_BR = log_ratio_BR.exp()
    advantages_BR = torch.where(response_mask_BR, advantages_BR, 0.0)
    unclipped_BR = ratio_BR * advantages_BR
    clipped_BR = ratio_BR.clamp(1.0 - clip_range, 1.0 + clip_range) * advantages_BR
    with torch.no_grad():
        approx_kl = masked_sum(log_ratio_BR.expm1() - log_ratio_BR, response_mask_BR) / tokens
        clip_fraction = masked_sum((clipped_BR < unclipped_BR).float(), response_mask_BR) / tokens
    loss = -masked_sum(torch.minimum(unclipped_BR, clipped_BR), response_mask_BR) / tokens
    return PolicyLoss(loss, approx_kl, clip_fraction)


def value_loss(
    new_values_BR: Tensor,
    old_values_BR: Tensor,
    *,
    returns_BR: Tensor,
    response_mask_BR: Tensor,
    value_clip_range: float,
    tokens: int,
) -> ValueLoss:
    """max((V - G)^2, (V_clipped - G)^2) / 2 over response tokens, V_clipped within c of the value before the update.

    The paper names no value loss; this one is from the PPO code published by Schulman et al.
    """
    assert tokens > 0
    assert new_values_BR.shape == old_values_BR.shape == returns_BR.shape == response_mask_BR.shape
    new_BR, old_BR, returns_BR = (
        torch.where(response_mask_BR, x_BR.float(), 0.0) for x_BR in (new_values_BR, old_values_BR, returns_BR)
    )
    near_BR = new_BR.clamp(min=old_BR - value_clip_range, max=old_BR + value_clip_range)
    error_BR, near_error_BR = (new_BR - returns_BR).square(), (near_BR - returns_BR).square()
    with torch.no_grad():
        clip_fraction = masked_sum((near_error_BR > error_BR).float(), response_mask_BR) / tokens
    loss = 0.5 * masked_sum(torch.maximum(error_BR, near_error_BR), response_mask_BR) / tokens
    return ValueLoss(loss, clip_fraction)


@torch.no_grad()
def explained_variance(values_BR: Tensor, *, returns_BR: Tensor, response_mask_BR: Tensor) -> float:
    """1 - Var(return - value) / Var(return) over all response tokens of the batch; 0 if all returns are equal.

    1 means perfect predictions, 0 no better than a constant, negative worse than a constant. It is not a mean over
    parts: pass the whole batch.
    """
    variance = float(masked_variance(returns_BR, response_mask_BR))
    unexplained = float(masked_variance(returns_BR - values_BR, response_mask_BR))
    return 1.0 - unexplained / variance if variance > 0 else 0.0


def _log_ratios(new_logprobs_BR: Tensor, old_logprobs_BR: Tensor, response_mask_BR: Tensor) -> Tensor:
    assert new_logprobs_BR.shape == old_logprobs_BR.shape == response_mask_BR.shape
    assert response_mask_BR.dtype == torch.bool
    # Mask before the exponential: masking after it could still give NaN gradients in the padding.
    return torch.where(response_mask_BR, new_logprobs_BR.float() - old_logprobs_BR.float(), 0.0)
