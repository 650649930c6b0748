"""What supervised fine-tuning is told: its own section of the recipe, and the shared ones it reads."""

from typing import Annotated, Any, Literal

from pydantic import Field

from llamachat.config.section import Section, operational, unless_null
from llamachat.config.trainer_arguments import TrainerArguments

# Part of the fingerprint: raised when the same configuration and data would give other weights.
VERSION = 1

# Arguments of TRL's SFTConfig that have a key of ours, or (None) that the stage itself must set.
OWNED: dict[str, str | None] = {
    "num_train_epochs": "sft.epochs",
    "max_steps": "sft.epochs",
    "learning_rate": "sft.learning_rate",
    "lr_scheduler_type": "sft.schedule",
    "lr_scheduler_kwargs": None,
    "logging_nan_inf_filter": None,
    "warmup_steps": "sft.warmup_fraction",
    "warmup_ratio": "sft.warmup_fraction",
    "weight_decay": "sft.weight_decay",
    "adam_beta1": "sft.adam_beta1",
    "adam_beta2": "sft.adam_beta2",
    "adam_epsilon": "sft.adam_epsilon",
    "optim": "sft.optimizer",
    "optim_args": None,
    "max_grad_norm": "sft.max_grad_norm",
    "per_device_train_batch_size": "sft.rows_per_microbatch",
    "per_device_eval_batch_size": None,
    "auto_find_batch_size": "sft.rows_per_microbatch",
    "gradient_accumulation_steps": "sft.examples_per_step",
    "gradient_checkpointing": "sft.gradient_checkpointing",
    "packing": "sft.packing",
    "packing_strategy": None,
    "eval_packing": None,
    "padding_free": None,
    "train_sampling_strategy": None,
    "dataset_kwargs": None,
    "dataset_text_field": None,
    "dataset_num_proc": None,
    "completion_only_loss": "sft.train_on",
    "assistant_only_loss": "sft.train_on",
    "chat_template_path": "base.chat_format",
    "eos_token": None,
    "pad_token": None,
    "truncation_mode": "base.max_tokens",
    "model_init_kwargs": None,
    "dataloader_pin_memory": None,
    "dataloader_num_workers": None,
    "dataloader_drop_last": None,
}


class Config(Section):
    """Supervised fine-tuning. Values the paper states are its section 3.1; the others are ours."""

    epochs: float = Field(default=2.0, gt=0, description="Passes over the training dialogs. Llama 2 section 3.1: 2.")
    learning_rate: float = Field(
        default=2e-5,
        gt=0,
        description="Peak rate of AdamW. Llama 2 section 3.1: 2e-5 for full tuning; LoRA needs about 10 times that.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="How the rate falls after warm-up, to 0. Llama 2 section 3.1: cosine (final rate not stated).",
    )
    warmup_fraction: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Share of the optimizer steps with a rising rate. Not stated in the paper; ours.",
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="Decay of matrices; norms do not decay. Llama 2 section 3.1: 0.1."
    )
    adam_beta1: float = Field(
        default=0.9, ge=0, lt=1, description="AdamW beta 1. Llama 2 section 2.2: 0.9 (not restated for SFT)."
    )
    adam_beta2: float = Field(
        default=0.95, ge=0, lt=1, description="AdamW beta 2. Llama 2 section 2.2: 0.95 (not restated for SFT)."
    )
    adam_epsilon: float = Field(
        default=1e-5, gt=0, description="AdamW epsilon. Llama 2 section 2.2: 1e-5 (not restated for SFT)."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="adamw_8bit holds the moments in 8 bits, paged_adamw_8bit also moves them to the host where the GPU is full (both need a GPU). Masters stay fp32. Ours.",
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0, description="Gradient norm is clipped to this. Llama 2 section 2.2: 1.0."
    )
    examples_per_step: int = Field(
        default=64,
        ge=1,
        description="Dialogs in one optimizer step, packed or not. Llama 2 section 3.1: batch size 64.",
    )
    train_on: Literal["every_answer", "last_answer"] = Field(
        default="every_answer",
        description="Which answers are learnt. Ghost Attention trains the last only (section 3.3).",
    )
    packing: bool = Field(
        default=True,
        description="Fill rows of base.max_tokens with several dialogs, isolated from one another. Same loss, less padding.",
    )
    row_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = operational(
        "auto",
        description="Length of a packed row, at most base.max_tokens; auto is that length on a GPU, and 512 on a CPU, where attention is slow. A longer dialog has a row of its own.",
    )
    rows_per_microbatch: int = operational(
        8, ge=1, description="Dialogs in one forward pass without packing; a packed forward pass is always one row."
    )
    gradient_checkpointing: bool = operational(
        False, description="Recompute activations in the backward pass: about a third slower, far less memory."
    )
    sample_prompts: int = operational(
        8, ge=0, description="Held-out prompts whose answers are sampled as training goes."
    )
    max_hours: Annotated[float, Field(gt=0)] | None = unless_null(
        description="Training ends after so many hours over all its starts, and the weights with the lowest held-out loss are published; null for none. Ours."
    )
    trainer: Annotated[dict[str, Any], TrainerArguments("SFTConfig", OWNED)] = Field(
        default_factory=dict, description="Further arguments of TRL's SFTConfig, by its names."
    )
