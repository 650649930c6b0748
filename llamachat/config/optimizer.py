"""The keys that trainings through a TRL trainer share: AdamW, its schedule, memory, hours, further arguments of TRL."""

from typing import Annotated, Any, Literal

from pydantic import Field

from llamachat.config.section import Section, operational, unless_null

# Arguments of TRL's configurations, by the key of such a section that sets them; None: the stage itself must set them.
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
    """The arguments of TRL that a section's `trainer` may not hold, with the key that sets each."""
    keys = {name: key and f"{section}.{key}" for name, key in _OWNED.items()}
    return {**keys, "chat_template_path": "base.chat_format"}


class OptimizerSection(Section):
    """AdamW over fp32 master weights, and how a training runs. A stage restates what the paper says of it alone."""

    learning_rate: float = Field(gt=0, description="Peak rate of AdamW.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the rate falls after warm-up."
    )
    warmup_fraction: float = Field(
        default=0.03, ge=0, lt=1, description="Share of the optimizer steps with a rising rate."
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decay of matrices; norms do not decay. Llama 2 section 2.2: 0.1."
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
        description="adamw_8bit holds the moments in 8 bits, paged_adamw_8bit also moves them to the host where the GPU is full (both need a GPU). Masters stay fp32. Ours.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradient norm is clipped to this. Llama 2 section 2.2: 1.0."
    )
    gradient_checkpointing: bool = operational(
        False, description="Recompute activations in the backward pass: about a third slower, far less memory."
    )
    max_hours: Annotated[float, Field(gt=0)] | None = unless_null(
        description="Training ends after so many hours over all its starts, and the weights with the lowest held-out loss are published; null for none. Ours."
    )
    trainer: dict[str, Any] = Field(default_factory=dict, description="Further arguments of TRL, by its names.")
