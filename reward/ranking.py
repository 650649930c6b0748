"""Reward model training: TRL's `RewardTrainer` on packed rows, with the paper's losses and held-out pairs.

TRL provides the loop, gradient accumulation, clipping and arguments. Ours are the batches (packed instead of padded
rows), the loss (margin, safety labels, exact over an optimizer step) and the figures, averaged over pairs, not batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import RewardConfig, RewardTrainer

from llamachat import distributed
from llamachat.chat_format import ChatFormat
from llamachat.data.packing import StepPlan
from llamachat.data.pairs import PairExample
from llamachat.models.scoring_head import score_rows, scores_and_states
from llamachat.runs.inputs import StepInputs, Which
from llamachat.tracking.tracker import Tracker
from llamachat.training.out_of_memory import warn_of_halving
from llamachat.training.session import Evaluated
from llamachat.training.trainer import AtomicCheckpoints, make_optimizer
from reward.batches import Batches, plan_batches, smaller
from reward.config import CPU_ROW_TOKENS, Config
from reward.loss import centring_losses, language_losses, ranking_losses, safety_auxiliary_losses
from reward.pairs import Examples

LEAST_ROW_TOKENS = 16

# Sums over pairs, labelled answers and tokens; the first three are their counts.
_SIZES = ("pairs", "labelled", "tokens")
_COUNTED = (*_SIZES, "accuracy", "score_chosen", "score_rejected", "ranking_loss", "auxiliary_loss", "language_loss")
_COUNTED_OVER: Mapping[str, str] = {"auxiliary_loss": "labelled", "language_loss": "tokens"}


class PackedRewardTrainer(AtomicCheckpoints, RewardTrainer):
    """`RewardTrainer` whose batches are packed rows (`reward.batches`) and whose loss is that of section 3.2.2."""

    args: RewardConfig
    # Our losses are already divided by the counts of the whole optimizer step.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        safety_auxiliary_weight: float,
        language_weight: float,
        language_head_VD: Tensor | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._safety_auxiliary_weight = safety_auxiliary_weight
        self._language_weight, self._language_head_VD = language_weight, language_head_VD
        self._sums: Tensor | None = None  # sums of _COUNTED since the last log, fp32

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Dataset:
        """Return the data set unchanged: it contains row numbers, while TRL expects texts."""
        return dataset

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This row's part of the step's loss: each sum divided by the count of the whole step."""
        if len(inputs["ends"]) == 0 and not distributed.is_sharded(model):  # an empty row pads its step
            loss = 0.0 * next(p for p in model.parameters() if p.requires_grad).sum()
            return (loss, {"scores": loss.detach()[None][:0]}) if return_outputs else loss
        scores_N, states_ND = scores_and_states(model, inputs)
        chosen_B, rejected_B = scores_N[inputs["chosen"]], scores_N[inputs["rejected"]]
        num_pairs, num_labelled = inputs["pairs_of_step"], inputs["labelled_of_step"].clamp(min=1)
        ranking = ranking_losses(chosen_B, rejected_B, margin_B=inputs["margin"]).sum()
        auxiliary = safety_auxiliary_losses(scores_N[inputs["labelled"]], is_safe_N=inputs["is_safe"]).sum()
        loss = ranking / num_pairs + self._safety_auxiliary_weight * auxiliary / num_labelled
        if self.args.center_rewards_coefficient is not None:
            centring = centring_losses(chosen_B, rejected_B).sum()
            loss = loss + self.args.center_rewards_coefficient * centring / num_pairs
        language = torch.zeros((), device=scores_N.device)
        if states_ND is not None and self._language_head_VD is not None:
            language = language_losses(states_ND, inputs["next_tokens"], head_VD=self._language_head_VD).sum()
            loss = loss + self._language_weight * language / inputs["tokens_of_step"].clamp(min=1)
        losses = [part.detach() for part in (ranking, auxiliary, language)]
        self._count(chosen_B.detach(), rejected_B.detach(), inputs, losses)
        # Gradients are averaged over processes, but these losses are parts of a sum.
        loss = loss * self.accelerator.num_processes
        return (loss, {"scores": scores_N}) if return_outputs else loss

    def _count(self, chosen_B: Tensor, rejected_B: Tensor, inputs: dict[str, Any], losses: Sequence[Tensor]) -> None:
        is_right_B = (chosen_B > rejected_B).float() + 0.5 * (chosen_B == rejected_B).float()
        sizes = (len(chosen_B), len(inputs["labelled"]), len(inputs.get("next_tokens", ())))
        counts = [torch.tensor(float(size), device=chosen_B.device) for size in sizes]
        sums = torch.stack([*counts, is_right_B.sum(), chosen_B.sum(), rejected_B.sum(), *losses])
        self._sums = sums if self._sums is None else self._sums + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # A process with only empty rows has no sums.
        mine = torch.zeros(len(_COUNTED), device=self.args.device) if self._sums is None else self._sums
        sums: dict[str, float] = dict(zip(_COUNTED, distributed.all_reduce_sum(mine).tolist(), strict=True))
        for name in _COUNTED[len(_SIZES) :]:
            count = sums[_COUNTED_OVER.get(name, "pairs")]
            if count:
                logs[name] = sums[name] / count
        self._sums = None
        super().log(logs, start_time)


@dataclass(frozen=True, slots=True)
class Ranking:
    """A model, pairs, and the rows they are packed into (a `llamachat.training.session.Training`)."""

    config: Config
    step: str  # of the run: rm/safety
    which: Which
    model: Any  # a Llama model with a score head, optionally with a PEFT adapter
    chat_format: ChatFormat
    examples: Examples
    batches: Batches
    language_head_VD: Tensor | None = None  # with reward.language_weight, the policy's

    @property
    def plan(self) -> StepPlan:
        return self.batches.plan

    @property
    def names(self) -> Mapping[str, str]:
        """Maps the trainer's figures to our metric names."""
        ours = ("loss", *_COUNTED[len(_SIZES) :])
        return {name: self.metric(name) for name in ours} | {
            "grad_norm": "optim/grad_norm",
            "learning_rate": "optim/learning_rate",
        }

    def metric(self, figure: str) -> str:
        """The metric's name for this model."""
        return f"rm/{self.which}/{figure}"

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of one row of the plan."""
        return self.batches.collate(numbers)

    def trainer(self, arguments: dict[str, Any], **parts: Any) -> PackedRewardTrainer:
        """TRL's trainer of the model."""
        config = self.config
        optimizers = make_optimizer(
            self.model,
            config,
            steps=self.plan.num_steps,
            least_warmup=config.warmup_min_steps,
            final=config.final_rate_fraction,
        )
        arguments |= {
            "center_rewards_coefficient": config.center_rewards_coefficient,
            "disable_dropout": False,  # only the adapter has dropout, set by tuning.dropout
        }
        return PackedRewardTrainer(
            model=self.model,
            args=RewardConfig(**arguments),
            optimizers=optimizers,
            safety_auxiliary_weight=config.safety_auxiliary_weight,
            language_weight=config.language_weight,
            language_head_VD=self.language_head_VD,
            **parts,
        )

    def progress(self, step: int) -> dict[str, float]:
        """Epochs up to this step."""
        return {self.metric("epoch"): self.config.epochs * step / self.plan.num_steps}

    def evaluate(self, step: int) -> Evaluated:
        """Ranking loss without margin, in nats per pair, and accuracy; a tie counts half."""
        pairs = self.examples.validation
        chosen_B, rejected_B = pair_scores(self.model, pairs)
        losses_B = ranking_losses(chosen_B, rejected_B, margin_B=torch.zeros(len(pairs)))
        right_B = (chosen_B > rejected_B).double() + 0.5 * (chosen_B == rejected_B).double()
        loss = float(losses_B.double().mean())
        figures = {self.metric("eval_loss"): loss}
        is_contrast_B = torch.tensor([pair.domain == "contrast" for pair in pairs])
        accuracy = float(right_B[~is_contrast_B].mean())
        figures[self.metric("eval_accuracy")] = accuracy
        if is_contrast_B.any():
            figures[self.metric("eval_contrast_accuracy")] = float(right_B[is_contrast_B].mean())
        count = int((~is_contrast_B).sum())
        return Evaluated(step, loss, figures, f"held-out pairs: {accuracy:.1%} of {count} right, loss {loss:.4f}")

    def sample(self, tracker: Tracker, step: int) -> None:
        """Does nothing: a reward model generates no text."""

    def smaller(self) -> "Ranking | None":
        """The same optimizer steps in rows of half the length; None if the longest row is already a single pair."""
        longest = self.batches.longest_row()
        if longest // 2 < LEAST_ROW_TOKENS:
            return None
        batches = smaller(self.batches, longest // 2)
        if batches.longest_row() == longest:  # a long pair has a row to itself
            return None
        warn_of_halving(self.step, "reward.row_tokens", longest, longest // 2, unit="pair")
        return replace(self, batches=batches)


def plan_training(
    config: Config, inputs: StepInputs, examples: Examples, *, device: torch.device, branches: bool = False
) -> Batches:
    """Assign pairs and labelled responses to optimizer steps; `branches` if the model attends by sequence."""
    auto = CPU_ROW_TOKENS if device.type == "cpu" else 2 * inputs.base.max_tokens
    return plan_batches(
        examples.train,
        examples.labels,
        pairs_per_step=config.pairs_per_step,
        epochs=config.epochs,
        seed=inputs.run.seed,
        row_tokens=auto if config.row_tokens == "auto" else config.row_tokens,
        has_pair_labels=inputs.which == "safety" and config.safety_auxiliary_weight > 0,
        learns_language=config.language_weight > 0,
        branches=branches,
    )


def pair_scores(model: nn.Module, pairs: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected answers, [B] each, fp32 on the CPU; identical answers are scored once."""
    distinct = list(dict.fromkeys(ids for pair in pairs for ids in (pair.chosen, pair.rejected)))
    scores_N = response_scores(model, distinct)
    places = {ids: place for place, ids in enumerate(distinct)}
    chosen_B, rejected_B = ([places[getattr(pair, side)] for pair in pairs] for side in ("chosen", "rejected"))
    return scores_N[chosen_B], scores_N[rejected_B]


def response_scores(model: nn.Module, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """`score_rows`, distributed over processes."""
    return torch.tensor(distributed.scatter_map(rows, lambda part: score_rows(model, part).tolist(), model=model))
