"""The keys shared by trainings with a TRL trainer: AdamW, its schedule, memory, hours, and further arguments of TRL.

Further arguments are passed to the trainer unchanged: their names are checked, ours are rejected, types are left to
TRL.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from llamachat.config.section import Section, nearest, operational, unless_null

# Arguments of TRL's configurations, with the key of ours that sets each; None: only our code sets it.
_SHARED: dict[str, str | None] = {
    "output_dir": "run.dir",
    "run_name": "run.dir",
    "project": "tracking.project",
    "seed": "run.seed",
    "data_seed": "run.seed",
    "full_determinism": "run.seed",
    "bf16": "base.dtype",
    "fp16": "base.dtype",
    "bf16_full_eval": "base.dtype",
    "fp16_full_eval": "base.dtype",
    "max_length": "base.max_tokens",
    "logging_strategy": "tracking.log_every",
    "logging_steps": "tracking.log_every",
    "logging_first_step": "tracking.log_every",
    "eval_strategy": "tracking.eval_every",
    "eval_steps": "tracking.eval_every",
    "eval_on_start": "tracking.eval_every",
    "do_eval": "tracking.eval_every",
    "save_strategy": "tracking.save_every",
    "save_steps": "tracking.save_every",
    "report_to": "tracking.mode",
    "chat_template_path": "base.chat_format",
    "resume_from_checkpoint": None,
    "save_total_limit": None,
    "save_only_model": None,
    "load_best_model_at_end": None,
    "ignore_data_skip": None,
    "push_to_hub": None,
    "trust_remote_code": None,
    "remove_unused_columns": None,
    "disable_tqdm": None,
    "do_train": None,
    "do_predict": None,
    "auto_find_batch_size": None,
}
# The same, by the key of a section of this kind.
_OWNED: dict[str, str | None] = {
    "num_train_epochs": "epochs",
    "max_steps": "epochs",
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "lr_scheduler_kwargs": None,
    "logging_nan_inf_filter": None,
    "warmup_steps": "warmup_fraction",
    "warmup_ratio": "warmup_fraction",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_beta1",
    "adam_beta2": "adam_beta2",
    "adam_epsilon": "adam_epsilon",
    "optim": "optimizer",
    "optim_args": None,
    "max_grad_norm": "max_grad_norm",
    "per_device_eval_batch_size": None,
    "gradient_checkpointing": "gradient_checkpointing",
    "train_sampling_strategy": None,
    "dataset_num_proc": None,
    "eos_token": None,
    "pad_token": None,
    "model_init_kwargs": None,
    "dataloader_pin_memory": None,
    "dataloader_num_workers": None,
    "dataloader_drop_last": None,
}


def owned_arguments(section: str) -> dict[str, str | None]:
    """The arguments of TRL that a section's `trainer` must not contain, with the key that sets each."""
    return _SHARED | {name: key and f"{section}.{key}" for name, key in _OWNED.items()}


@dataclass(frozen=True, slots=True)
class TrainerArguments:
    """The field holds further arguments of a TRL configuration class such as SFTConfig.

    `owned` maps an argument to the key of ours that sets it, or to None if only our code does.
    """

    class_name: str
    owned: Mapping[str, str | None]

    def problems(self, value: object) -> Iterator[tuple[tuple[str, ...], str]]:
        if not isinstance(value, Mapping):
            return
        known = argument_names(self.class_name) if value else frozenset[str]()
        for name in value:
            key = self.owned.get(name)
            if key is not None:
                yield (
                    (name,),
                    f"this argument of TRL is set by a key of the recipe. Set '{key}' instead.",
                )
            elif name in self.owned:
                yield (name,), "llamachat sets this argument of TRL itself. Remove it."
            elif name not in known:
                near = nearest(name, known)
                near = (self.owned.get(near) or near) if near else None
                advice = f"Did you mean '{near}'?" if near else "The names are those of the installed TRL."
                yield (name,), f"TRL's {self.class_name} has no argument of this name. {advice}"


def argument_names(class_name: str) -> frozenset[str]:
    """Argument names of TRL's class; imports TRL, which takes seconds, so it is called only for recipes that set
    `trainer`."""
    import trl

    return frozenset(field.name for field in dataclasses.fields(getattr(trl, class_name)) if field.init)


class OptimizerSection(Section):
    """AdamW with fp32 master weights, and the course of a training. A stage overrides only what the paper says about
    it."""

    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after warm-up."
    )
    warmup_fraction: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the optimizer steps in which the learning rate warms up."
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="Weight decay of matrices; norms do not decay. Llama 2 section 2.2: 0.1."
    )
    adam_beta1: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="AdamW beta 1. Llama 2 section 2.2: 0.9 (3.2.2: the same for reward models; not restated for SFT).",
    )
    adam_beta2: float = Field(
        default=0.95,
        ge=0,
        lt=1,
        description="AdamW beta 2. Llama 2 section 2.2: 0.95 (3.2.2: the same for reward models; not restated for SFT).",
    )
    adam_epsilon: float = Field(
        default=1e-5,
        gt=0,
        description="AdamW epsilon. Llama 2 section 2.2: 1e-5 (3.2.2: the same for reward models; not restated for SFT).",
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="adamw_8bit stores the moments in 8 bits, paged_adamw_8bit also moves them to the host when the GPU is full (both need a GPU). Master weights stay fp32. Ours.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Maximum gradient norm; larger gradients are clipped. Llama 2 section 2.2: 1.0."
    )
    gradient_checkpointing: bool = operational(
        False, description="Recompute activations in the backward pass: about a third slower, with far less memory."
    )
    max_hours: Annotated[float, Field(gt=0)] | None = unless_null(
        description="Time budget of the training in hours, summed over restarts; when it is used up, the weights with the lowest held-out loss are published. null: no limit. Ours."
    )
    trainer: dict[str, Any] = Field(default_factory=dict, description="Further arguments of TRL, under TRL's names.")
