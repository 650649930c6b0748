"""What an iteration learns from: answers with log-probabilities, values, scores, rewards and advantages.

Shapes: B responses, R response positions. Everything is measured before the update, in the very rows that the update
will run: so the ratio of new to old probabilities begins at 1, in bf16 too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamachat import distributed
from llamachat.answers.packed import PackedRow, TokenSequence, packed_rows, response_mask, sequence_of
from llamachat.answers.responses import Response
from llamachat.answers.scorer import Scored
from llamachat.maths.logprobs import k1, token_logprobs
from llamachat.maths.masked import whiten
from llamachat.scoring.shaping import Shaped, shape_scores
from ppo.advantages import gae, token_rewards
from ppo.config import Config

if TYPE_CHECKING:
    from llamachat.config.sections import Scoring
    from llamachat.models.roles import Role, RoleBank


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """The responses of one optimizer step."""

    indices: tuple[int, ...]
    rows: tuple[PackedRow, ...]
    tokens: int  # response tokens, by which every loss is divided


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What policy, reference and critic say of the response tokens; 0 elsewhere."""

    response_mask_BR: Tensor
    logprobs_BR: Tensor
    ref_logprobs_BR: Tensor
    entropy_BR: Tensor
    values_BR: Tensor | None

    def token_kl(self) -> Tensor:
        """KL to the reference, nats a token, [B, R]."""
        return k1(self.logprobs_BR, self.ref_logprobs_BR, response_mask_BR=self.response_mask_BR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One iteration, ready to be learnt from."""

    sequences: tuple[TokenSequence, ...]
    minibatches: tuple[Minibatch, ...]
    response_mask_BR: Tensor
    old_logprobs_BR: Tensor
    old_values_BR: Tensor
    advantages_BR: Tensor  # whitened over the iteration
    returns_BR: Tensor
    rewards_BR: Tensor
    shaped: Shaped


def cut(
    sequences: Sequence[TokenSequence], *, responses_per_minibatch: int, row_tokens: int, device: torch.device
) -> tuple[Minibatch, ...]:
    """Minibatches of the sequences in their order, which is random already."""
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
    """These responses in rows of so many tokens."""
    return Minibatch(
        indices=indices,
        rows=tuple(packed_rows(sequences, indices, row_tokens=row_tokens, device=device, shares=distributed.count())),
        tokens=sum(len(sequences[index].response) for index in indices),
    )


@torch.no_grad()
def measure(
    bank: "RoleBank",
    sequences: Sequence[TokenSequence],
    rows: Sequence[PackedRow],
    *,
    temperature: float,
    with_values: bool,
) -> Measured:
    """Log-probabilities at the temperature of the rollout, entropy and values of every response token.

    Several processes share the rows.
    """
    mask_BR = response_mask(sequences, bank.device)
    found_4BR = torch.zeros((4, *mask_BR.shape), device=bank.device)
    logprobs_BR, ref_logprobs_BR, entropy_BR, values_BR = found_4BR.unbind()
    rows = distributed.shard(rows)

    def states(role: "Role", row: PackedRow) -> Tensor:
        return bank.hidden(role, row.batch)[0, row.places_N]

    # A role at a time, since changing it costs a walk over the adapters.
    for row in rows:
        hidden_ND = states("policy", row)
        found = token_logprobs(
            hidden_ND, row.tokens_N, head=bank.lm_head("policy"), temperature=temperature, with_entropy=True
        )
        assert found.entropy is not None
        row.put(logprobs_BR, found.logprobs)
        row.put(entropy_BR, found.entropy)
        if with_values and bank.critic == "shared":
            row.put(values_BR, bank.values_of(hidden_ND))
    for row in rows:
        found = token_logprobs(
            states("reference", row), row.tokens_N, head=bank.lm_head("reference"), temperature=temperature
        )
        row.put(ref_logprobs_BR, found.logprobs)
    if with_values and bank.critic == "separate":
        for row in rows:
            row.put(values_BR, bank.values(row.batch, row.places_N))
    # A token is in one row, and a row in one process: the sum is what that process found.
    logprobs_BR, ref_logprobs_BR, entropy_BR, values_BR = distributed.all_reduce_sum(found_4BR).unbind()
    return Measured(
        response_mask_BR=mask_BR,
        logprobs_BR=logprobs_BR,
        ref_logprobs_BR=ref_logprobs_BR,
        entropy_BR=entropy_BR,
        values_BR=values_BR if with_values else None,
    )


def make_experience(
    responses: Sequence[Response],
    minibatches: tuple[Minibatch, ...],
    measured: Measured,
    scored: Scored,
    *,
    config: Config,
    scoring: "Scoring",
    kl_coef: float,
) -> Experience:
    """Rewards of every token (Llama 2, arXiv:2307.09288, Eq. 4), and what they are against the critic's expectation."""
    assert measured.values_BR is not None
    shaped = shape_scores(
        scored.combined.scores_B,
        is_finished_B=torch.tensor([response.is_finished for response in responses]),
        shaping=scoring.shaping,
        unfinished_score=scoring.unfinished_score,
    )
    mask_BR = measured.response_mask_BR
    rewards_BR = token_rewards(
        shaped.scores_B.to(mask_BR.device), kl_BR=measured.token_kl(), response_mask_BR=mask_BR, kl_coef=kl_coef
    )
    estimate = gae(
        rewards_BR,
        values_BR=measured.values_BR,
        response_mask_BR=mask_BR,
        discount=config.discount,
        gae_lambda=config.gae_lambda,
    )
    return Experience(
        sequences=tuple(sequence_of(response) for response in responses),
        minibatches=minibatches,
        response_mask_BR=mask_BR,
        old_logprobs_BR=measured.logprobs_BR,
        old_values_BR=measured.values_BR,
        advantages_BR=whiten(estimate.advantages_BR, mask_BR),
        returns_BR=estimate.returns_BR,
        rewards_BR=rewards_BR,
        shaped=shaped,
    )
