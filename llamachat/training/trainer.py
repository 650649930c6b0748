"""What TRL's trainers lack for a training that may be killed at any moment: atomic checkpoints, a quiet loop,
callbacks.

A checkpoint is written into a side folder and renamed, so that a kill during a save never leaves a broken newest
checkpoint. The data set of a trainer contains row numbers, and our collator makes the tensors.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import align_special_tokens

from llamachat import distributed
from llamachat.config.optimizer import OptimizerSection
from llamachat.data.packing import StepPlan
from llamachat.models.weights import file_weights
from llamachat.runs.checkpoints import newest, writing
from llamachat.runs.state import peak_memory
from llamachat.training.hours import Hours
from llamachat.training.master_weights import MasterWeightOptimizer, adamw
from llamachat.training.out_of_memory import in_room

# Renamed in transformers 5.23; our lower bound has the older name.
CHECKPOINTING = (
    "activation_checkpointing"
    if "activation_checkpointing" in TrainingArguments.__dataclass_fields__
    else "gradient_checkpointing"
)
Collate = Callable[[Sequence[int]], dict[str, Tensor]]
OnStep = Callable[[int], object]  # True ends the training at this step
OnLog = Callable[[int, dict[str, float]], None]


class AtomicCheckpoints(Trainer):
    """A mixin before one of TRL's trainers: saves through `llamachat.runs.checkpoints.writing`, reports only to
    `Watch`.

    Of several processes the first one saves. There is no DDP wrapper: it would run every row through it, including
    padding rows, and hold a copy of all gradients; gradients are reduced once per step (`llamachat.distributed`),
    before clipping.
    """

    def __init__(
        self,
        *args: Any,
        checkpoints: Path,
        before_save: Callable[[], None],
        watch: "Watch",
        hours: Hours | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._checkpoints, self._before_save, self._hours = checkpoints, before_save, hours
        self._full_weights: dict[str, Tensor] | None = None  # of a sharded model, while it is saved
        if distributed.count() > 1:
            self.accelerator.prepare_model = partial(self.accelerator.prepare_model, evaluation_mode=True)
        # The flow callback decides when to log and to save; the printing and progress callbacks are ours.
        self.callback_handler.callbacks = [
            callback for callback in self.callback_handler.callbacks if isinstance(callback, DefaultFlowCallback)
        ]
        self.add_callback(watch)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        work = super().training_step
        loss = in_room(lambda: work(*args, **kwargs))
        if self.accelerator.sync_gradients:
            assert self.model is not None
            # Each process's loss is its part of the step's loss times the number of processes, as with DDP. Sharded
            # weights are already reduced in the backward pass.
            trained = [w for w in self.model.parameters() if w.requires_grad and not distributed.is_sharded_tensor(w)]
            distributed.sum_gradients(trained, scale=1 / distributed.count())
        return loss

    def take_as_trained(self, checkpoint: Path) -> None:
        """If no step is left to train, load the checkpoint's weights, and set what `train` would set in the model's
        configuration before its first step."""
        assert self.model is not None
        self._load_from_checkpoint(str(checkpoint))
        align_special_tokens(self.model, self.processing_class)

    def save_last_step(self) -> None:
        """Save a checkpoint of the last finished optimizer step, from within the next one, unless it exists."""
        assert self.model is not None, "training has begun"
        self.model.zero_grad(set_to_none=True)  # free memory for the save: the unfinished step is repeated
        checkpoint = newest(self._checkpoints)
        if self.state.global_step > (checkpoint.step if checkpoint else 0):
            self._save_checkpoint(self.model, None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = self.model if model is None else model
        assert target is not None
        if distributed.is_sharded(target):
            for file in sorted(Path(resume_from_checkpoint).glob("*.safetensors")):
                _load_full_weights(target, file_weights(file))
            return
        if not isinstance(target, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # Not PEFT's `load_adapter`: it replaces 16-bit parameters by new fp32 ones, which the optimizer does
        # not know, so that training would have no effect.
        weights = load_peft_weights(resume_from_checkpoint, device="cpu")
        trained = sum(weight.requires_grad for weight in target.parameters())
        assert len(weights) == trained, "a checkpoint has every trained weight, including a head next to the adapter"
        loaded = set_peft_model_state_dict(target, weights)
        assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if ".lora_" in key]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.model is not None
        random_states = self._random_states()
        self._full_weights = distributed.full_weights(self.model)
        if distributed.is_first():
            self._save_all(model, trial, random_states)
        else:
            # What the first process asks all processes for while it saves, in this order.
            self.store_flos()
            assert isinstance(self.optimizer, torch.optim.Optimizer)
            self.optimizer.state_dict()
        self._full_weights = None
        distributed.wait()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict=self._full_weights or state_dict)

    def _random_states(self) -> Mapping[str, bytes]:
        """The files with the random state of every process, by name."""
        with tempfile.TemporaryDirectory() as place:
            self._save_rng_state(place)
            mine = [(path.name, path.read_bytes()) for path in Path(place).iterdir()]
        return dict(chain.from_iterable(distributed.scatter_map(range(distributed.count()), lambda _: [mine])))

    def _save_all(self, model: Any, trial: Any, random_states: Mapping[str, bytes]) -> None:
        step, home = self.state.global_step, self.args.output_dir
        self._before_save()  # the record up to this step must be on the disk with the checkpoint
        with writing(self._checkpoints, step) as side:
            self.args.output_dir = str(side)
            try:
                # Skips TRL's overrides, which add a model card to every checkpoint.
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self.args.output_dir = home
            written = side / f"checkpoint-{step}"
            for path in written.iterdir():
                path.rename(side / path.name)
            written.rmdir()
            for name, state in random_states.items():
                (side / name).write_bytes(state)
            if self._hours is not None:
                self._hours.save(side)


class Watch(TrainerCallback):
    """Passes each step's figures, with its time and memory, and each finished step to two functions.

    `names` maps our names to the trainer's figures; a line without the first of them does not belong to a step.
    """

    def __init__(self, step_tokens: Sequence[int], *, names: Mapping[str, str], on_log: OnLog, on_step: OnStep) -> None:
        self._step_tokens, self._names = step_tokens, names
        self._on_log, self._on_step = on_log, on_step
        self._started = time.monotonic()
        self._seconds: list[float] = []  # of the steps since the last logged metrics

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A checkpoint contains the intervals of the command that wrote it; those of this command apply.
        state.compute_steps(args, state.max_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds.append(time.monotonic() - self._started)
        if self._on_step(state.global_step) is True:
            # Also save a checkpoint: a run that resumes from it then knows that the training ended.
            control.should_training_stop = control.should_log = control.should_save = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        figures = {self._names[name]: value for name, value in (logs or {}).items() if name in self._names}
        if next(iter(self._names.values())) not in figures:  # the trainer's closing summary has no loss of a step
            return
        step, seconds = state.global_step, sum(self._seconds)
        tokens = sum(self._step_tokens[step - len(self._seconds) : step])
        figures["time/step_s"] = seconds
        figures["throughput/tokens_per_s"] = tokens / max(seconds, 1e-9)
        figures["memory/peak_gib"] = peak_memory()
        self._seconds = []
        self._on_log(step, figures)


def rate_schedule(
    optimizer: torch.optim.Optimizer,
    name: Literal["cosine", "linear", "constant"],
    *,
    warmup: int,
    steps: int,
    final: float = 0.0,
) -> LambdaLR:
    """A learning rate that rises from 0 to its peak over `warmup` steps, then falls to the share `final` of it at
    `steps`, unless constant."""

    def share(step: int) -> float:
        if step < warmup:
            return step / warmup
        length = max(1, steps - warmup)
        shape = {
            "cosine": 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / length))),
            "linear": max(0.0, (steps - step) / length),
            "constant": 1.0,
        }[name]
        return final + (1.0 - final) * shape

    return LambdaLR(optimizer, share)


@torch.no_grad()
def _load_full_weights(model: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write whole weights into a sharded model, each process its part."""
    own = dict(model.state_dict())
    for name, weight in weights:
        own[name].copy_(distributed.shard_like(weight, own[name]))


def trainer_arguments(
    config: OptimizerSection, plan: StepPlan, *, folder: Path, seed: int, log_every: int, save_every: int
) -> dict[str, Any]:
    """Arguments of TRL's configurations for a training whose rows are planned already; `config.trainer` adds to them.

    Keys set here are refused in `config.trainer` when the recipe is loaded.
    """
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,  # the order of all epochs is one list of rows
        "per_device_train_batch_size": plan.rows_per_microbatch,
        "gradient_accumulation_steps": plan.microbatches_per_step,
        "train_sampling_strategy": "sequential",
        "max_grad_norm": config.max_grad_norm,
        CHECKPOINTING: config.gradient_checkpointing,
        "max_length": None,
        "remove_unused_columns": False,
        # The dtype of the weights is the compute dtype; autocast would only cast again.
        "bf16": False,
        "fp16": False,
        "seed": seed,
        "data_seed": seed,
        "logging_steps": log_every,
        "logging_nan_inf_filter": False,  # it would show the mean of earlier steps instead of a NaN
        "save_steps": save_every,
        "save_total_limit": None,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **config.trainer,
    }


def make_optimizer(
    model: nn.Module, config: OptimizerSection, *, steps: int, least_warmup: int = 0, final: float = 0.0
) -> tuple[MasterWeightOptimizer, LambdaLR]:
    """AdamW over fp32 masters of the trainable weights, and its schedule: at least `least_warmup` warm-up steps, down
    to `final`."""
    optimizer = adamw(
        model.parameters(),
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        name=config.optimizer,
    )
    warmup = min(steps, max(least_warmup, round(steps * config.warmup_fraction)))
    return optimizer, rate_schedule(optimizer, config.schedule, warmup=warmup, steps=steps, final=final)


def row_numbers(count: int) -> Dataset:
    """The data set of the trainer: row numbers, in order."""
    return Dataset.from_dict({"row": list(range(count))})


def collator(collate: Collate) -> Callable[[list[dict[str, int]]], dict[str, Tensor]]:
    """Convert the trainer's list of `{"row": n}` to `collate([n, ...])`."""
    return lambda items: collate([item["row"] for item in items])
