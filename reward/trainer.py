"""TRL's `RewardTrainer` on packed rows, with the paper's losses and checkpoints that are whole or absent.

What is TRL's: loop, accumulation, clipping, its arguments. What is ours: the batch (packed rows in place of padded
ones), the loss (margin, safety labels, exact over an optimizer step) and the figures, which count pairs and not batches.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import RewardConfig, RewardTrainer

from llamachat import distributed
from llamachat.models.scoring_head import last_token_scores
from llamachat.runs.inputs import Which
from llamachat.training.master_weights import MasterWeightOptimizer, adamw
from llamachat.training.trainer import CHECKPOINTING, AtomicCheckpoints, rate_schedule
from reward.config import Config
from reward.loss import centring_losses, ranking_losses, safety_auxiliary_losses


def names_of(which: Which) -> dict[str, str]:
    """The trainer's figures by our names."""
    ours = ("loss", "accuracy", "score_chosen", "score_rejected", "ranking_loss", "auxiliary_loss")
    return {name: f"rm/{which}/{name}" for name in ours} | {
        "grad_norm": "optim/grad_norm",
        "learning_rate": "optim/learning_rate",
    }


# What is counted over pairs and over labelled answers; the first two are how many there are.
_COUNTED = ("pairs", "labelled", "accuracy", "score_chosen", "score_rejected", "ranking_loss", "auxiliary_loss")


class PackedRewardTrainer(AtomicCheckpoints, RewardTrainer):
    """`RewardTrainer` whose batches are packed rows (`reward.batches`) and whose loss is that of section 3.2.2."""

    args: RewardConfig
    # Our losses are divided by the counts of the whole optimizer step already.
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, safety_auxiliary_weight: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._safety_auxiliary_weight = safety_auxiliary_weight
        self._sums: Tensor | None = None  # of _COUNTED since the last line of metrics, fp32

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Dataset:
        """As it is: it holds row numbers, where TRL would look for texts."""
        return dataset

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This row's part of the step's loss: each of its sums over the counts of the whole step."""
        if len(inputs["ends"]) == 0 and not distributed.is_sharded(model):  # the row only fills up its step
            loss = 0.0 * next(p for p in model.parameters() if p.requires_grad).sum()
            return (loss, {"scores": loss.detach()[None][:0]}) if return_outputs else loss
        scores_N = last_token_scores(model, inputs)
        chosen_B, rejected_B = scores_N[inputs["chosen"]], scores_N[inputs["chosen"] + 1]
        num_pairs, num_labelled = inputs["pairs_of_step"], inputs["labelled_of_step"].clamp(min=1)
        ranking = ranking_losses(chosen_B, rejected_B, margin_B=inputs["margin"]).sum()
        auxiliary = safety_auxiliary_losses(scores_N[inputs["labelled"]], is_safe_N=inputs["is_safe"]).sum()
        loss = ranking / num_pairs + self._safety_auxiliary_weight * auxiliary / num_labelled
        if self.args.center_rewards_coefficient is not None:
            centring = centring_losses(chosen_B, rejected_B).sum()
            loss = loss + self.args.center_rewards_coefficient * centring / num_pairs
        self._count(chosen_B.detach(), rejected_B.detach(), inputs, ranking.detach(), auxiliary.detach())
        # Processes average their gradients, and these are parts of a sum.
        loss = loss * self.accelerator.num_processes
        return (loss, {"scores": scores_N}) if return_outputs else loss

    def _count(
        self, chosen_B: Tensor, rejected_B: Tensor, inputs: dict[str, Any], ranking: Tensor, auxiliary: Tensor
    ) -> None:
        is_right_B = (chosen_B > rejected_B).float() + 0.5 * (chosen_B == rejected_B).float()
        counts = [
            torch.tensor(float(count), device=chosen_B.device) for count in (len(chosen_B), len(inputs["labelled"]))
        ]
        found = torch.stack([*counts, is_right_B.sum(), chosen_B.sum(), rejected_B.sum(), ranking, auxiliary])
        self._sums = found if self._sums is None else self._sums + found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # A process whose rows only filled up their steps has counted nothing.
        mine = torch.zeros(len(_COUNTED), device=self.args.device) if self._sums is None else self._sums
        sums = dict(zip(_COUNTED, distributed.all_reduce_sum(mine).tolist(), strict=True))
        for name in _COUNTED[2:]:
            count = sums["labelled" if name == "auxiliary_loss" else "pairs"]
            if count:
                logs[name] = sums[name] / count
        self._sums = None
        super().log(logs, start_time)


def trainer_arguments(
    config: Config,
    *,
    folder: Path,
    rows_per_step: int,
    seed: int,
    log_every: int,
    save_every: int,
) -> RewardConfig:
    """TRL's arguments: ours, then what `reward.trainer` adds (keys that ours own are refused when the recipe loads)."""
    return RewardConfig(
        output_dir=str(folder),
        num_train_epochs=1,  # the order of all epochs is one list of rows (reward.batches)
        per_device_train_batch_size=1,
        gradient_accumulation_steps=rows_per_step,
        train_sampling_strategy="sequential",
        max_grad_norm=config.max_grad_norm,
        **{CHECKPOINTING: config.gradient_checkpointing},
        center_rewards_coefficient=config.center_rewards_coefficient,
        disable_dropout=False,  # only the adapter has any, and tuning.dropout says how much
        max_length=None,
        remove_unused_columns=False,
        # The weights' own dtype is the compute dtype; autocast on top would only cast again.
        bf16=False,
        fp16=False,
        seed=seed,
        data_seed=seed,
        logging_steps=log_every,
        logging_nan_inf_filter=False,  # it would show the mean of the steps before in place of a loss that is no number
        save_steps=save_every,
        save_total_limit=None,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        **config.trainer,
    )


def make_optimizer(
    model: nn.Module, config: Config, *, steps: int
) -> tuple[MasterWeightOptimizer, torch.optim.lr_scheduler.LRScheduler]:
    """AdamW over fp32 masters of what is trainable, and its schedule over `steps` optimizer steps."""
    optimizer = adamw(
        model.parameters(),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        name=config.optimizer,
    )
    warmup = min(steps, max(config.warmup_min_steps, round(steps * config.warmup_fraction)))
    schedule = rate_schedule(optimizer, config.schedule, warmup=warmup, steps=steps, final=config.final_rate_fraction)
    return optimizer, schedule
