"""Configuration of `dpo` (direct preference optimisation): its own section of the recipe."""

from typing import Annotated, Any, Literal

from pydantic import Field

from llamachat.config.optimizer import OptimizerSection, TrainerArguments, owned_arguments
from llamachat.config.section import operational

# Part of the fingerprint: raised when the same configuration and data would give other weights.
VERSION = 1

CPU_ROW_TOKENS = 2048  # as for reward models, which are trained on the same pairs

# Arguments of TRL's DPOConfig and the key that sets each, or None if it is unused, since batch and loss are ours.
OWNED = {
    **owned_arguments("dpo"),
    "beta": "dpo.beta",
    "label_smoothing": "dpo.label_smoothing",
    "disable_dropout": "tuning.dropout",
    "per_device_train_batch_size": "dpo.row_tokens",
    "auto_find_batch_size": "dpo.row_tokens",
    "gradient_accumulation_steps": "dpo.pairs_per_step",
    "truncation_mode": "base.max_tokens",
    **dict.fromkeys(
        (
            *("loss_type", "loss_weights", "ld_alpha", "use_weighting", "discopop_tau", "router_aux_loss_coef"),
            *("f_divergence_type", "f_alpha_divergence_coef", "label_smoothing_factor", "use_liger_kernel"),
            *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
            *("precompute_ref_log_probs", "precompute_ref_batch_size", "activation_offloading"),
            *("padding_free", "pad_to_multiple_of", "average_tokens_across_devices"),
        )
    ),
}


class Config(OptimizerSection):
    """Direct preference optimisation, which Llama 2 does not use: values are those of Rafailov et al. 2023 or ours."""

    epochs: float = Field(default=1.0, gt=0, description="Passes over the training pairs. Ours.")
    learning_rate: float = Field(
        default=1e-6,
        gt=0,
        description="Peak learning rate of AdamW. Rafailov et al. 2023, appendix B: 1e-6 (with RMSprop) for full tuning; LoRA needs about 10 times as much.",
    )
    warmup_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the optimizer steps in which the learning rate warms up. Ours; Rafailov et al. 2023, appendix B: 150 steps.",
    )
    pairs_per_step: int = Field(
        default=64, ge=1, description="Pairs per optimizer step. Rafailov et al. 2023, appendix B: 64."
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        description="Strength of the KL constraint to the starting policy (beta in Eq. 7): the smaller, the further the policy may move. Rafailov et al. 2023, appendix B: 0.1.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="Assumed share of pairs in the wrong order (label smoothing of conservative DPO). Rafailov et al. 2023: 0.",
    )
    row_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = operational(
        "auto",
        description="Tokens of a packed row, which is one forward pass; auto is 2 x base.max_tokens on a GPU and 2048 on a CPU. A longer pair gets its own row.",
    )
    sample_prompts: int = operational(
        8, ge=0, description="Number of held-out prompts whose answers are sampled during training."
    )
    trainer: Annotated[dict[str, Any], TrainerArguments("DPOConfig", OWNED)] = Field(
        default_factory=dict, description="Further arguments of TRL's DPOConfig, under TRL's names."
    )
