"""Per-token rewards, advantages and returns, computed from scores; imports only torch.

Shapes: B responses, R response positions; P prompts with K responses each. A mask is True on response tokens,
including EOS. Responses may be padded on either side: masked positions are skipped. Nothing here has a gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Advantages(NamedTuple):
    """Advantage of each token and the return, which is the critic's target; 0 outside the mask."""

    advantages_BR: Tensor
    returns_BR: Tensor


def last_indices(mask_BR: Tensor) -> Tensor:
    """Index of the last response token of each row, [B]. No row is empty, since EOS counts."""
    assert mask_BR.dtype == torch.bool and bool(mask_BR.any(dim=1).all()), "a response has at least one token"
    positions_R = torch.arange(mask_BR.shape[1], device=mask_BR.device)
    return torch.where(mask_BR, positions_R, -1).amax(dim=1)


@torch.no_grad()
def token_rewards(shaped_B: Tensor, *, kl_BR: Tensor, response_mask_BR: Tensor, kl_coef: float) -> Tensor:
    """-beta * KL on every response token and the shaped score on the last one, [B, R]; 0 elsewhere.

    Their sum over a response is Llama 2 (arXiv:2307.09288), Eq. 4: R~c - beta * KL. The paper does not say where the
    score goes; the reward model reads its score at the last token, so it is added there, not on the padding after it.
    """
    penalty_BR = torch.where(response_mask_BR, -kl_coef * kl_BR, 0.0)
    last_index_B1 = last_indices(response_mask_BR).unsqueeze(1)
    return penalty_BR.scatter_add(1, last_index_B1, shaped_B.to(penalty_BR.dtype).unsqueeze(1))


@torch.no_grad()
def gae(
    rewards_BR: Tensor, *, values_BR: Tensor, response_mask_BR: Tensor, discount: float, gae_lambda: float
) -> Advantages:
    """Generalized advantage estimation (Schulman et al. 2016, Eq. 16) and its returns, advantage + value.

    delta_t = r_t + gamma * V_{t+1} - V_t;  A_t = delta_t + gamma * lambda * A_{t+1}. After the last token both are 0,
    even for a truncated response: `unfinished_score` already penalises truncation. The paper names no estimator;
    this one is ours.
    """
    assert response_mask_BR.dtype == torch.bool
    assert rewards_BR.shape == values_BR.shape == response_mask_BR.shape
    rewards_BR, values_BR = rewards_BR.float(), values_BR.float()
    next_value_B = next_advantage_B = torch.zeros_like(values_BR[:, 0])
    columns = []
    for rewards_B, values_B, counts_B in zip(
        reversed(rewards_BR.unbind(1)),
        reversed(values_BR.unbind(1)),
        reversed(response_mask_BR.unbind(1)),
        strict=True,
    ):
        delta_B = rewards_B + discount * next_value_B - values_B
        advantage_B = delta_B + discount * gae_lambda * next_advantage_B
        columns.append(torch.where(counts_B, advantage_B, 0.0))
        next_advantage_B = torch.where(counts_B, advantage_B, next_advantage_B)
        next_value_B = torch.where(counts_B, values_B, next_value_B)
    advantages_BR = torch.stack(columns[::-1], dim=1)
    return Advantages(advantages_BR, torch.where(response_mask_BR, advantages_BR + values_BR, 0.0))


@torch.no_grad()
def leave_one_out(rewards_B: Tensor, *, responses_per_prompt: int) -> Tensor:
    """Each response's reward minus the mean of the other responses to its prompt, [B]; these are adjacent.

    RLOO (Ahmadian et al. 2024, arXiv:2402.14740, Eq. 8): the others' mean does not depend on the response, so it is an
    unbiased baseline without a critic. A prompt's advantages sum to 0. The paper names no estimator; this one is ours.
    """
    assert responses_per_prompt >= 2, "a response is compared with others"
    rewards_PK = rewards_B.float().view(-1, responses_per_prompt)
    others_PK = (rewards_PK.sum(dim=1, keepdim=True) - rewards_PK) / (responses_per_prompt - 1)
    return (rewards_PK - others_PK).flatten()
