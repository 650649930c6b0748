"""The training data of an iteration: answers with log-probabilities, values, scores, rewards and advantages.

Shapes: B responses, R response positions. Everything is computed before the update, in the same packed rows as the
update, so the ratio of new to old probabilities starts at exactly 1, even in bf16.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamachat import distributed
from llamachat.answers.packed import PackedRow, TokenSequence, packed_rows, response_mask
from llamachat.answers.responses import Response
from llamachat.answers.scorer import Scored
from llamachat.errors import RolloutError
from llamachat.maths.logprobs import k1, k3, response_kl, token_logprobs
from llamachat.maths.masked import masked_mean, whiten
from llamachat.scoring.combining import shape_scores
from llamachat.scoring.length import hold_length, ramp_to_limit
from ppo.advantages import gae, leave_one_out, token_rewards
from ppo.config import Config
from ppo.losses import explained_variance

if TYPE_CHECKING:
    from llamachat.config.sections import Scoring
    from llamachat.models.roles import Role, RoleBank

# Maximum gap between the engine's and the policy's log-probability of a token, in nats. Different number formats
# differ by tenths for rare tokens. Ours.
MOST_ENGINE_GAP = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """The responses of one optimizer step."""

    indices: tuple[int, ...]
    rows: tuple[PackedRow, ...]
    tokens: int  # response tokens, by which every loss is divided


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutputs:
    """Outputs of policy, reference and critic for the response tokens; 0 elsewhere."""

    response_mask_BR: Tensor
    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    kl_BR: Tensor  # of the policy to the reference, nats per token
    entropy_BR: Tensor
    values_BR: Tensor | None

    def response_kl(self) -> Tensor:
        """KL to the reference, nats per response, [B]."""
        return response_kl(self.kl_BR, response_mask_BR=self.response_mask_BR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One iteration, ready for the update."""

    sequences: tuple[TokenSequence, ...]
    minibatches: tuple[Minibatch, ...]
    response_mask_BR: Tensor
    old_logprobs_BR: Tensor
    advantages_BR: Tensor  # with GAE, whitened over the iteration
    rewards_BR: Tensor
    old_values_BR: Tensor | None  # the critic's predictions, if there is a critic,
    returns_BR: Tensor | None  # and its targets


def split_minibatches(
    sequences: Sequence[TokenSequence], *, responses_per_minibatch: int, row_tokens: int, device: torch.device
) -> tuple[Minibatch, ...]:
    """Minibatches of the sequences in their order, which is already random."""
    return tuple(
        minibatch_of(
            sequences,
            tuple(range(first, min(first + responses_per_minibatch, len(sequences)))),
            row_tokens=row_tokens,
            device=device,
        )
        for first in range(0, len(sequences), responses_per_minibatch)
    )


def minibatch_of(
    sequences: Sequence[TokenSequence], indices: tuple[int, ...], *, row_tokens: int, device: torch.device
) -> Minibatch:
    """The responses at these indices, packed into rows of `row_tokens`."""
    return Minibatch(
        indices=indices,
        rows=tuple(packed_rows(sequences, indices, row_tokens=row_tokens, device=device, shares=distributed.count())),
        tokens=sum(len(sequences[index].response) for index in indices),
    )


@torch.no_grad()
def model_outputs(
    bank: "RoleBank",
    sequences: Sequence[TokenSequence],
    rows: Sequence[PackedRow],
    *,
    temperature: float,
    with_values: bool,
) -> ModelOutputs:
    """Log-probabilities at the rollout temperature, entropies and values of every response token.

    Rows are distributed over processes.
    """
    mask_BR = response_mask(sequences, bank.device)
    outputs_4BR = torch.zeros((4, *mask_BR.shape), device=bank.device)
    logprobs_BR, ref_logprobs_BR, entropy_BR, values_BR = outputs_4BR.unbind()
    rows = distributed.shard(rows)

    def states(role: "Role", row: PackedRow) -> Tensor:
        return bank.states(role, row.batch, row.places_N)

    # One role at a time, since switching roles walks over all adapters.
    for row in rows:
        hidden_ND = states("policy", row)
        policy = token_logprobs(
            hidden_ND, row.tokens_N, head=bank.lm_head("policy"), temperature=temperature, with_entropy=True
        )
        assert policy.entropy is not None
        row.put(logprobs_BR, policy.logprobs)
        row.put(entropy_BR, policy.entropy)
        if with_values and bank.critic == "shared":
            row.put(values_BR, bank.values_of(hidden_ND))
    for row in rows:
        reference = token_logprobs(
            states("reference", row), row.tokens_N, head=bank.lm_head("reference"), temperature=temperature
        )
        row.put(ref_logprobs_BR, reference.logprobs)
    if with_values and bank.critic == "separate":
        for row in rows:
            row.put(values_BR, bank.values(row.batch, row.places_N))
    # Each token is in one row, and each row in one process, so the sum is that process's result.
    logprobs_BR, ref_logprobs_BR, entropy_BR, values_BR = distributed.all_reduce_sum(outputs_4BR).unbind()
    return ModelOutputs(
        response_mask_BR=mask_BR,
        logprobs_BR=logprobs_BR,
        ref_logprobs_BR=ref_logprobs_BR,
        kl_BR=k1(logprobs_BR, ref_logprobs_BR, response_mask_BR=mask_BR),
        entropy_BR=entropy_BR,
        values_BR=values_BR if with_values else None,
    )


def make_experience(
    responses: Sequence[Response],
    sequences: Sequence[TokenSequence],
    minibatches: tuple[Minibatch, ...],
    outputs: ModelOutputs,
    scored: Scored,
    *,
    config: Config,
    scoring: "Scoring",
    kl_coef: float,
    limit: int,
    start_tokens: float,
) -> Experience:
    """Per-token rewards (Llama 2, arXiv:2307.09288, Eq. 4) and advantages.

    `limit` is the maximum answer length and `start_tokens` the starting policy's mean length, both in tokens.
    """
    shaped_B = shaped_scores(responses, scored, config=config, scoring=scoring, limit=limit, start_tokens=start_tokens)
    mask_BR = outputs.response_mask_BR
    rewards_BR = token_rewards(
        shaped_B.to(mask_BR.device), kl_BR=outputs.kl_BR, response_mask_BR=mask_BR, kl_coef=kl_coef
    )
    returns_BR = None
    if config.advantages == "rloo":
        above_others_B = leave_one_out(rewards_BR.sum(dim=1), responses_per_prompt=config.responses_per_prompt)
        advantages_BR = torch.where(mask_BR, above_others_B.unsqueeze(1), 0.0)
    else:
        assert outputs.values_BR is not None, "the critic has been asked"
        advantages_BR, returns_BR = gae(
            rewards_BR,
            values_BR=outputs.values_BR,
            response_mask_BR=mask_BR,
            discount=config.discount,
            gae_lambda=config.gae_lambda,
        )
        advantages_BR = whiten(advantages_BR, mask_BR)
    return Experience(
        sequences=tuple(sequences),
        minibatches=minibatches,
        response_mask_BR=mask_BR,
        old_logprobs_BR=outputs.logprobs_BR,
        old_values_BR=outputs.values_BR,
        advantages_BR=advantages_BR,
        rewards_BR=rewards_BR,
        returns_BR=returns_BR,
    )


def shaped_scores(
    responses: Sequence[Response],
    scored: Scored,
    *,
    config: Config,
    scoring: "Scoring",
    limit: int,
    start_tokens: float,
) -> Tensor:
    """Shaped scores, [B]: combined scores, whitened, lowered gradually near the length limit, with the length bounds
    applied."""
    is_finished_B = torch.tensor([response.is_finished for response in responses])
    lengths_B = torch.tensor([len(response.ids) for response in responses])
    shaped_B = ramp_to_limit(
        shape_scores(
            scored.combined.scores_B,
            is_finished_B=is_finished_B,
            shaping=scoring.shaping,
            unfinished_score=scoring.unfinished_score,
        ),
        lengths_B=lengths_B,
        limit=limit,
        ramp=config.unfinished_ramp,
        unfinished_score=scoring.unfinished_score,
    )
    if scoring.length is not None:
        shaped_B = hold_length(
            shaped_B, lengths_B=lengths_B, is_finished_B=is_finished_B, bound=scoring.length, start=start_tokens
        )
    return shaped_B


def iteration_figures(
    responses: Sequence[Response], outputs: ModelOutputs, scored: Scored, experience: Experience, *, kl_coef: float
) -> dict[str, float]:
    """Figures of one iteration before its update, by metric name."""
    mask_BR = outputs.response_mask_BR
    k3_BR = k3(outputs.logprobs_BR, outputs.ref_logprobs_BR, response_mask_BR=mask_BR)
    figures = {f"ppo/reward/{name}": float(scores_B.mean()) for name, scores_B in scored.scores.by_model().items()}
    if scored.combined.has_gate:
        figures["ppo/reward/gate_fraction"] = float(scored.combined.is_gated_B.float().mean())
    if experience.old_values_BR is not None and experience.returns_BR is not None:
        figures["ppo/explained_variance"] = explained_variance(
            experience.old_values_BR, returns_BR=experience.returns_BR, response_mask_BR=mask_BR
        )
    figures |= {
        "ppo/reward/combined": float(scored.combined.scores_B.mean()),
        "ppo/reward/shaped": float(experience.rewards_BR.sum(dim=1).mean()),
        "ppo/kl_to_reference": float(outputs.response_kl().mean()),
        "ppo/kl_k3": float(response_kl(k3_BR, response_mask_BR=mask_BR).mean()),
        "ppo/kl_coef": kl_coef,
        "ppo/entropy": float(masked_mean(outputs.entropy_BR, mask_BR)),
        "ppo/response_tokens": float(mask_BR.sum(dim=1).float().mean()),
        "ppo/truncated_fraction": sum(not response.is_finished for response in responses) / len(responses),
        "ppo/unclosed_fraction": sum(not response.is_closed for response in responses) / len(responses),
    }
    return figures | engine_gaps(responses, outputs)


def engine_gaps(responses: Sequence[Response], outputs: ModelOutputs) -> dict[str, float]:
    """Mean and maximum gap between log-probabilities of the engine and of the training forward pass, in nats."""
    mask_BR = outputs.response_mask_BR
    sampled_BR = torch.zeros(mask_BR.shape)
    for index, response in enumerate(responses):
        sampled_BR[index, : len(response.logprobs)] = torch.tensor(response.logprobs)
    gaps_BR = (sampled_BR.to(mask_BR.device) - outputs.logprobs_BR).abs() * mask_BR
    return {"ppo/engine_gap": float(masked_mean(gaps_BR, mask_BR)), "ppo/engine_gap_max": float(gaps_BR.max())}


def check_engine_gap(figures: Mapping[str, float], step: str) -> None:
    """Raise if a token was sampled from a distribution other than the policy's."""
    largest = figures["ppo/engine_gap_max"]
    if not largest <= MOST_ENGINE_GAP:
        raise RolloutError(
            f"{step}: the engine's log-probability of a sampled token differs by {largest:.3g} nats from the policy's, but at most "
            f"{MOST_ENGINE_GAP:g} are allowed (mean {figures['ppo/engine_gap']:.2g}). PPO learns only from the policy's own "
            "answers. With rollout.engine vllm, check the server's log and restart it; otherwise set rollout.engine to "
            "hugging_face. Then run the command again, which resumes from the last checkpoint."
        )
