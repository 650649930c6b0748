"""Configuration of `sft` (supervised fine-tuning): its own section of the recipe."""

from typing import Annotated, Any, Literal

from pydantic import Field

from llamachat.config.optimizer import OptimizerSection, TrainerArguments, owned_arguments
from llamachat.config.section import operational

# Part of the fingerprint: raised when the same configuration and data would give other weights.
VERSION = 1

# Tokens of a packed row on a CPU. Attention is computed by sequence there, so longer rows only mean fewer and larger
# matrix products.
CPU_ROW_TOKENS = 2048

# Arguments of TRL's SFTConfig and the configuration key that sets each, or None if the stage itself sets it.
OWNED = {
    **owned_arguments("sft"),
    "per_device_train_batch_size": "sft.rows_per_microbatch",
    "auto_find_batch_size": "sft.rows_per_microbatch",
    "gradient_accumulation_steps": "sft.examples_per_step",
    "packing": "sft.packing",
    "packing_strategy": None,
    "eval_packing": None,
    "padding_free": None,
    "dataset_kwargs": None,
    "dataset_text_field": None,
    "completion_only_loss": "sft.train_on",
    "assistant_only_loss": "sft.train_on",
    "truncation_mode": "base.max_tokens",
}


class Config(OptimizerSection):
    """Supervised fine-tuning. Values from the paper are those of its section 3.1; the others are ours."""

    epochs: float = Field(default=2.0, gt=0, description="Passes over the training dialogs. Llama 2 section 3.1: 2.")
    learning_rate: float = Field(
        default=2e-5,
        gt=0,
        description="Peak learning rate of AdamW. Llama 2 section 3.1: 2e-5 for full tuning; LoRA needs about 10 times as much.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="How the learning rate falls to 0 after warm-up. Llama 2 section 3.1: cosine (final rate not stated).",
    )
    warmup_fraction: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Share of the optimizer steps in which the learning rate warms up. Not stated in the paper; ours.",
    )
    weight_decay: float = Field(
        default=0.1, ge=0, description="Weight decay of matrices; norms do not decay. Llama 2 section 3.1: 0.1."
    )
    examples_per_step: int = Field(
        default=64,
        ge=1,
        description="Dialogs per optimizer step, packed or not. Llama 2 section 3.1: batch size 64.",
    )
    train_on: Literal["every_answer", "last_answer"] = Field(
        default="every_answer",
        description="Which answers are trained on. Ghost Attention trains on the last one only (section 3.3).",
    )
    packing: bool = Field(
        default=True,
        description="Fill rows of base.max_tokens with several dialogs, isolated from each other. The loss is the same, with less padding.",
    )
    row_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = operational(
        "auto",
        description="Length of a packed row, on a GPU at most base.max_tokens; auto is base.max_tokens on a GPU, and 2048 on a CPU, where attention is computed by sequence. A longer dialog gets its own row.",
    )
    rows_per_microbatch: int = operational(
        8, ge=1, description="Dialogs per forward pass without packing; with packing, a forward pass is always one row."
    )
    sample_prompts: int = operational(
        8, ge=0, description="Number of held-out prompts whose answers are sampled during training."
    )
    trainer: Annotated[dict[str, Any], TrainerArguments("SFTConfig", OWNED)] = Field(
        default_factory=dict, description="Further arguments of TRL's SFTConfig, under TRL's names."
    )
