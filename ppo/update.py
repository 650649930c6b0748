"""The update: epochs over an iteration's minibatches, with one optimizer step of policy and critic per minibatch.

Shapes: 1 a packed row, N its response tokens. A minibatch's losses are sums over its rows divided by all its tokens, so
the row size affects memory and speed but not the step. Policy and critic have separate optimizers and gradient
clipping, so that a large value error does not shrink the policy's step.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llamachat import distributed
from llamachat.answers.packed import PackedRow
from llamachat.errors import DeviceMemoryError, DivergedError
from llamachat.maths.logprobs import token_logprobs
from llamachat.training.master_weights import MasterWeightOptimizer, adamw
from llamachat.training.out_of_memory import MicrobatchTooLargeError, in_room
from ppo.config import Config
from ppo.experience import Experience, Minibatch, minibatch_of
from ppo.losses import policy_loss, value_loss

if TYPE_CHECKING:
    from llamachat.models.roles import RoleBank, Trained

log = logging.getLogger(__name__)

LEAST_ROW_TOKENS = 16


Optimizers = Mapping["Trained", MasterWeightOptimizer]


def make_optimizers(bank: "RoleBank", config: Config) -> Optimizers:
    """AdamW over fp32 master copies of the bank's current trainable weights, at constant learning rates."""
    trained = bank.trainable()

    def adamw_of(params: Sequence[nn.Parameter], rate: float) -> MasterWeightOptimizer:
        return adamw(
            params,
            learning_rate=rate,
            weight_decay=config.weight_decay,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )

    rates: dict[Trained, float] = {"policy": config.learning_rate, "critic": config.critic_learning_rate}
    return {role: adamw_of(params, rates[role]) for role, params in trained.items()}


@dataclass(slots=True)
class Updater:
    """Runs updates; halves the row length when a row does not fit into device memory."""

    bank: "RoleBank"
    optimizers: Optimizers
    config: Config
    _: KW_ONLY
    temperature: float  # of the rollouts
    row_tokens: int
    step: str

    def update(self, experience: Experience, *, trains_policy: bool) -> dict[str, float]:
        """Run all optimizer steps of an iteration; return mean figures, those of the policy only if it is trained."""
        config, trained = self.config, self.bank.trainable()
        sums: dict[str, float] = defaultdict(float)
        for _ in range(config.epochs):
            for minibatch in experience.minibatches:
                figures = self.gradients(experience, minibatch, trains_policy=trains_policy)
                stepped: list[Trained] = [role for role in trained if role == "critic" or trains_policy]
                for role in stepped:
                    name = "optim/critic_grad_norm" if role == "critic" else "optim/grad_norm"
                    figures[name] = float(nn.utils.clip_grad_norm_(trained[role], config.max_grad_norm))
                self._check_finite(figures)
                for role in stepped:
                    self.optimizers[role].step()
                self._zero_grad()
                for name, value in figures.items():
                    sums[name] += value
        steps = config.epochs * len(experience.minibatches)
        return {name: total / steps for name, total in sums.items()}

    def gradients(self, experience: Experience, minibatch: Minibatch, *, trains_policy: bool) -> dict[str, float]:
        """Accumulate the minibatch's gradients, with rows distributed over processes; return losses and figures."""
        rows = minibatch.rows

        def backward(part: Sequence[PackedRow]) -> list[dict[str, float]]:
            return [self._row(experience, row, trains_policy=trains_policy, tokens=minibatch.tokens) for row in part]

        while True:
            self._zero_grad()
            try:
                by_row = in_room(lambda: distributed.scatter_map(rows, backward))  # noqa: B023  # called at once
                break
            except MicrobatchTooLargeError as error:
                reason = str(error)
            except torch.OutOfMemoryError as error:
                raise self._too_large_for_one_of_several(error) from None
            self._zero_grad()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            rows = self._smaller(experience, minibatch, rows, reason)
        trained = self.bank.trainable()
        distributed.sum_gradients([*trained.get("critic", ()), *(trained["policy"] if trains_policy else ())])
        return {name: sum(figures[name] for figures in by_row) for name in by_row[0]}

    def _row(self, experience: Experience, row: PackedRow, *, trains_policy: bool, tokens: int) -> dict[str, float]:
        """Forward and backward of one row for policy and critic; losses are divided by the minibatch's `tokens`."""
        bank, config = self.bank, self.config
        mask_1N = torch.ones((1, len(row.places_N)), dtype=torch.bool, device=bank.device)
        is_shared = bank.critic == "shared"
        figures: dict[str, Tensor] = {}
        loss: Tensor | None = None
        hidden_ND: Tensor | None = None
        if trains_policy or is_shared:
            with torch.set_grad_enabled(trains_policy):
                hidden_ND = bank.states("policy", row.batch, row.places_N)
        if trains_policy:
            assert hidden_ND is not None
            new = token_logprobs(hidden_ND, row.tokens_N, head=bank.lm_head("policy"), temperature=self.temperature)
            clipped = policy_loss(
                new.logprobs.unsqueeze(0),
                row.taken(experience.old_logprobs_BR),
                advantages_BR=row.taken(experience.advantages_BR),
                response_mask_BR=mask_1N,
                clip_range=config.clip_range,
                tokens=tokens,
            )
            loss = clipped.loss
            figures["ppo/policy_loss"] = clipped.loss.detach()
            figures["ppo/approx_kl"] = clipped.approx_kl
            figures["ppo/clip_fraction"] = clipped.clip_fraction
            if not is_shared:
                loss.backward()  # before the critic's pass: one role's activations at a time
        if not bank.has_critic:
            return _numbers(figures)
        assert experience.old_values_BR is not None and experience.returns_BR is not None
        values_N = (
            bank.values_of(hidden_ND) if is_shared and hidden_ND is not None else bank.values(row.batch, row.places_N)
        )
        errors = value_loss(
            values_N.unsqueeze(0),
            row.taken(experience.old_values_BR),
            returns_BR=row.taken(experience.returns_BR),
            response_mask_BR=mask_1N,
            value_clip_range=config.value_clip_range,
            tokens=tokens,
        )
        if is_shared and loss is not None:
            (loss + config.value_coef * errors.loss).backward()
        else:
            errors.loss.backward()
        figures["ppo/value_loss"] = errors.loss.detach()
        figures["ppo/value_clip_fraction"] = errors.clip_fraction
        return _numbers(figures)

    def _smaller(
        self, experience: Experience, minibatch: Minibatch, rows: Sequence[PackedRow], reason: str
    ) -> Sequence[PackedRow]:
        longest = max(len(experience.sequences[index].ids) for index in minibatch.indices)
        if max(row.input_ids_1T.shape[1] for row in rows) <= longest or self.row_tokens // 2 < LEAST_ROW_TOKENS:
            raise DeviceMemoryError(
                f"{self.step}: the device has too little memory for a single response ({reason}). A response is never "
                "split, so its forward and backward must fit. Set ppo.gradient_checkpointing=true, ppo.critic=shared, "
                "tuning.method to qlora, or a smaller rollout.max_new_tokens."
            )
        self.row_tokens //= 2
        log.warning(
            "%s: the device has too little memory for rows of %d tokens. Continuing with %d; the responses of each step stay"
            " the same. Set ppo.tokens_per_microbatch=%d to start with that.",
            self.step,
            2 * self.row_tokens,
            self.row_tokens,
            self.row_tokens,
        )
        return minibatch_of(
            experience.sequences, minibatch.indices, row_tokens=self.row_tokens, device=self.bank.device
        ).rows

    def _too_large_for_one_of_several(self, error: torch.OutOfMemoryError) -> DeviceMemoryError:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return DeviceMemoryError(
            f"{self.step}: one of {distributed.count()} devices has too little memory for a row of {self.row_tokens} tokens "
            f"({reason}). The others are in the middle of the same step, so rows are not shortened automatically. Set "
            f"ppo.tokens_per_microbatch={self.row_tokens // 2}, ppo.gradient_checkpointing=true, ppo.critic=shared or "
            "tuning.method to qlora, and run the same command again."
        )

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def _check_finite(self, figures: Mapping[str, float]) -> None:
        wrong = next((name for name, value in figures.items() if not math.isfinite(value)), None)
        if wrong is not None:
            self._zero_grad()
            raise DivergedError(
                f"{self.step}: {wrong} is {figures[wrong]}. No step was taken: further steps would not repair the "
                "weights. Set a lower ppo.learning_rate and ppo.critic_learning_rate or a higher ppo.kl_coef, and start"
                " the step again with `--overwrite`."
            )


def _numbers(figures: Mapping[str, Tensor]) -> dict[str, float]:
    """The figures as Python numbers, with a single GPU synchronisation."""
    return dict(zip(figures, torch.stack([*figures.values()]).tolist(), strict=True))
