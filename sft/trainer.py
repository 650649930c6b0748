"""TRL's `SFTTrainer` on our token ids, with checkpoints that are whole or absent and metrics under our names.

Two things differ from a plain `SFTTrainer`. The data set holds row numbers and our collator makes the tensors, because
a packed row must carry `position_ids` and no attention mask to keep its dialogs apart. And a checkpoint is written into
a side folder and renamed, because a kill during a save must not leave a broken newest checkpoint.
"""

import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer_callback import DefaultFlowCallback
from trl import SFTConfig, SFTTrainer

from llamachat.runs.checkpoints import newest, writing
from llamachat.training.master_weights import MasterWeightOptimizer, adamw
from llamachat.training.out_of_memory import in_room
from sft.config import Config
from sft.loss import answer_token_losses

NAMES = {
    "loss": "sft/loss",
    "grad_norm": "optim/grad_norm",
    "learning_rate": "optim/learning_rate",
}
# Renamed in transformers 5.23; the older name is the one of our lower bound.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in SFTConfig.__dataclass_fields__
    else "gradient_checkpointing"
)
Collate = Callable[[Sequence[int]], dict[str, Tensor]]
OnStep = Callable[[int], None]
OnLog = Callable[[int, dict[str, float]], None]


class AtomicCheckpointTrainer(SFTTrainer):
    """`SFTTrainer` that saves through `llamachat.runs.checkpoints.writing` and reports to `Watch` alone."""

    args: SFTConfig

    def __init__(
        self, *args: Any, checkpoints: Path, before_save: Callable[[], None], watch: "Watch", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoints, self._before_save = checkpoints, before_save
        # The flow callback decides when to log and to save; the printing and progress callbacks are ours.
        self.callback_handler.callbacks = [
            callback for callback in self.callback_handler.callbacks if isinstance(callback, DefaultFlowCallback)
        ]
        self.add_callback(watch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        work = super().training_step
        return in_room(lambda: work(*args, **kwargs))

    def save_last_step(self) -> None:
        """A checkpoint of the last finished optimizer step, from within the next one, unless there is one."""
        assert self.model is not None, "it has begun to train"
        self.model.zero_grad(set_to_none=True)  # room for the save: the unfinished step begins anew
        found = newest(self._checkpoints)
        if self.state.global_step > (found.step if found else 0):
            self._save_checkpoint(self.model, None)

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        held = self.model if model is None else model
        if not isinstance(held, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # Not PEFT's `load_adapter`: it puts new fp32 parameters in the place of 16-bit ones, which the optimizer does
        # not know, so that nothing is learnt any more.
        loaded = set_peft_model_state_dict(held, load_peft_weights(resume_from_checkpoint, device="cpu"))
        assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if ".lora_" in key]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, home = self.state.global_step, self.args.output_dir
        self._before_save()  # what the record says up to this step must be on the disk with the checkpoint
        with writing(self._checkpoints, step) as side:
            self.args.output_dir = str(side)
            try:
                # Past SFTTrainer, whose override adds a model card to every checkpoint.
                super(SFTTrainer, self)._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = home
            written = side / f"checkpoint-{step}"
            for path in written.iterdir():
                path.rename(side / path.name)
            written.rmdir()


class Watch(TrainerCallback):
    """Hands each step's figures, with its time and memory, and each finished step to two functions."""

    def __init__(self, step_tokens: Sequence[int], *, on_log: OnLog, on_step: OnStep) -> None:
        self._step_tokens = step_tokens
        self._on_log, self._on_step = on_log, on_step
        self._started = time.monotonic()
        self._seconds: list[float] = []  # of the steps since the last line of metrics

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A checkpoint carries the cadences of the command that wrote it; those of this command count.
        state.compute_steps(args, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds.append(time.monotonic() - self._started)
        self._on_step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        figures = {NAMES[name]: value for name, value in (logs or {}).items() if name in NAMES}
        if "sft/loss" not in figures:  # the trainer's closing summary has no loss of a step
            return
        step, seconds = state.global_step, sum(self._seconds)
        tokens = sum(self._step_tokens[step - len(self._seconds) : step])
        figures["time/step_s"] = seconds
        figures["throughput/tokens_per_s"] = tokens / max(seconds, 1e-9)
        figures["memory/peak_gib"] = peak_memory()
        self._seconds = []
        self._on_log(step, figures)


def peak_memory() -> float:
    """Most memory that the process has held, in GiB: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / 2**20


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
        num_train_epochs=1,  # the order of all epochs is one list of rows (llamachat.batching.plan_steps)
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
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    warmup = round(steps * config.warmup_fraction)
    return optimizer, get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def row_numbers(count: int) -> Dataset:
    """The data set that the trainer walks through: numbers of rows, in order."""
    return Dataset.from_dict({"row": list(range(count))})


def collator(collate: Collate) -> Callable[[list[dict[str, int]]], dict[str, Tensor]]:
    """From the trainer's list of `{"row": n}` to `collate([n, ...])`."""
    return lambda items: collate([item["row"] for item in items])
