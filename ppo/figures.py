"""Figures of an iteration by their names in the table of metrics.

Shapes: B responses, R response positions.
"""

from collections.abc import Sequence

import torch

from llamachat.answers.responses import Response
from llamachat.answers.scorer import Scored
from llamachat.maths.logprobs import k3, response_kl
from llamachat.maths.masked import masked_mean, masked_variance
from ppo.experience import Experience, Measured


def iteration_figures(
    responses: Sequence[Response], measured: Measured, scored: Scored, experience: Experience, *, kl_coef: float
) -> dict[str, float]:
    """What one iteration was like, before its update."""
    mask_BR = measured.response_mask_BR
    kl_B = response_kl(measured.token_kl(), response_mask_BR=mask_BR)
    k3_BR = k3(measured.logprobs_BR, measured.ref_logprobs_BR, response_mask_BR=mask_BR)
    found = {f"ppo/reward/{name}": float(scores_B.mean()) for name, scores_B in scored.scores.by_model().items()}
    if scored.combined.has_gate:
        found["ppo/reward/gate_fraction"] = float(scored.combined.is_gated_B.float().mean())
    return found | {
        "ppo/reward/combined": float(scored.combined.scores_B.mean()),
        "ppo/reward/shaped": float(experience.rewards_BR.sum(dim=1).mean()),
        "ppo/kl_to_reference": float(kl_B.mean()),
        "ppo/kl_k3": float(response_kl(k3_BR, response_mask_BR=mask_BR).mean()),
        "ppo/kl_coef": kl_coef,
        "ppo/entropy": float(masked_mean(measured.entropy_BR, mask_BR)),
        "ppo/explained_variance": explained_variance(experience),
        "ppo/response_tokens": float(mask_BR.sum(dim=1).float().mean()),
        "ppo/truncated_fraction": sum(not response.is_finished for response in responses) / len(responses),
        "ppo/engine_gap": engine_gap(responses, measured),
    }


def explained_variance(experience: Experience) -> float:
    """1 - Var(return - value) / Var(return) over the iteration's tokens; 0 where all returns are alike."""
    mask_BR = experience.response_mask_BR
    spread = float(masked_variance(experience.returns_BR, mask_BR))
    left = float(masked_variance(experience.returns_BR - experience.old_values_BR, mask_BR))
    return 1.0 - left / spread if spread > 0 else 0.0


def engine_gap(responses: Sequence[Response], measured: Measured) -> float:
    """Mean distance of the engine's log-probabilities from those that training takes, nats a token."""
    mask_BR = measured.response_mask_BR
    sampled_BR = torch.zeros(mask_BR.shape)
    for index, response in enumerate(responses):
        sampled_BR[index, : len(response.logprobs)] = torch.tensor(response.logprobs)
    return float(masked_mean((sampled_BR.to(mask_BR.device) - measured.logprobs_BR).abs(), mask_BR))
