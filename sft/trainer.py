"""TRL's `SFTTrainer` on our token ids, with checkpoints that are whole or absent and metrics under our names.

The data set holds row numbers and our collator makes the tensors, because a packed row must carry `position_ids` and no
attention mask to keep its dialogs apart.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from trl import SFTConfig, SFTTrainer

from llamachat.training.master_weights import MasterWeightOptimizer, adamw
from llamachat.training.trainer import CHECKPOINTING, AtomicCheckpoints, rate_schedule
from sft.config import Config
from sft.loss import answer_token_losses

# The trainer's figures by our names.
NAMES = {
    "loss": "sft/loss",
    "grad_norm": "optim/grad_norm",
    "learning_rate": "optim/learning_rate",
}


class AtomicCheckpointTrainer(AtomicCheckpoints, SFTTrainer):
    """`SFTTrainer` whose loss on a CPU looks at answer tokens alone."""

    args: SFTConfig

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum over answer tokens divided by those of the whole optimizer step.

        On a GPU TRL's fused head scores answer tokens alone; on a CPU it scores every position and takes half as long
        again, so there the same loss is taken from the answer positions here.
        """
        is_plain = self.args.loss_type == "nll" and self.args.label_smoothing_factor == 0 and not return_outputs
        if not is_plain or inputs["input_ids"].is_cuda:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        losses = answer_token_losses(model, inputs)
        total = losses.numel() if num_items_in_batch is None else num_items_in_batch
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return losses.sum() * scale / torch.as_tensor(total).clamp(min=1)


def trainer_arguments(
    config: Config,
    *,
    folder: Path,
    rows_per_microbatch: int,
    microbatches_per_step: int,
    seed: int,
    log_every: int,
    save_every: int,
) -> SFTConfig:
    """TRL's arguments: ours, then what `sft.trainer` adds (keys that ours own are refused when the recipe loads)."""
    return SFTConfig(
        output_dir=str(folder),
        num_train_epochs=1,  # the order of all epochs is one list of rows (llamachat.data.packing.plan_steps)
        per_device_train_batch_size=rows_per_microbatch,
        gradient_accumulation_steps=microbatches_per_step,
        train_sampling_strategy="sequential",
        max_grad_norm=config.max_grad_norm,
        **{CHECKPOINTING: config.gradient_checkpointing},
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
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
    warmup = round(steps * config.warmup_fraction)
    return optimizer, rate_schedule(optimizer, config.schedule, warmup=warmup, steps=steps)
