"""Configuration of a reward model's training: its own section of the recipe."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from llamachat.config.optimizer import OptimizerSection, TrainerArguments, owned_arguments
from llamachat.config.section import Section, operational, unless_null

# Part of the fingerprint: raised when the same configuration and data would give other weights.
VERSION = 9

# Share of a model's contrast pairs in which a refusal of a harmful prompt is preferred.
HARMFUL_SHARES: Mapping[str, float] = {"safety": 0.5, "judge": 0.05}

MOST_HELD_OUT = 250  # maximum number of contrast pairs for validation, since every evaluation scores them
MOST_PROBED = 200  # maximum number of prompts in the probe

CPU_ROW_TOKENS = 2048  # 15.3k tokens per second with the bundled model; rows of 512 and 1024 give 13.7k and 14.5k

# Arguments of TRL's RewardConfig and the configuration key that sets each, or None if the stage itself sets it.
OWNED = {
    **owned_arguments("reward"),
    "lr_scheduler_kwargs": "reward.final_rate_fraction",
    "per_device_train_batch_size": "reward.row_tokens",
    "auto_find_batch_size": "reward.row_tokens",
    "gradient_accumulation_steps": "reward.pairs_per_step",
    "center_rewards_coefficient": "reward.center_rewards_coefficient",
    "disable_dropout": "tuning.dropout",
    "pad_to_multiple_of": None,
    "average_tokens_across_devices": None,
}


ContrastKind = Literal["refusal", "swapped", "degenerate"]


class Contrast(Section):
    """Contrast pairs for every reward model: an answer of data.sft preferred to one that is never better. Ours."""

    share: float = Field(
        default=0.25,
        ge=0,
        lt=1,
        description="Share of a model's training pairs that are contrast pairs, made of data.sft and the chosen answers of data.helpfulness on the model's side of the split; 0 for none. Ours: without them reward models prefer refusals and do not read the prompt.",
    )
    kinds: list[ContrastKind] = Field(
        default_factory=lambda: list(get_args(ContrastKind)),
        min_length=1,
        description="What the answer is compared with: a refusal, another prompt's answer of similar length, or a degenerate answer (half of them the prompt or an earlier message; a short answer, a phrase repeated, its own half, itself twice, one word), in shares of 4, 5 and 7 of 16; of the safety model 5, 1 and 2 of 8. Ours.",
    )
    max_tokens: Annotated[int, Field(ge=16)] | None = unless_null(
        description="Maximum length, in tokens, of the dialogs that contrast pairs are made of, and of pairs in which a refusal of a harmful prompt is preferred; null for any length. Short ones teach as much in less time. Ours."
    )


class Config(OptimizerSection):
    """Training of reward models. Values from the paper are those of its section 3.2.2; the others are ours."""

    epochs: float = Field(
        default=1.0,
        gt=0,
        description="Passes over the pairs. Llama 2 section 3.2.2: 1, since more epochs overfit.",
    )
    learning_rate: float = Field(
        default=1e-5,
        gt=0,
        description="Peak learning rate of AdamW. Llama 2 section 3.2.2: 1e-5 (5e-6 for 70B); LoRA needs about 10 times as much.",
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the learning rate falls after warm-up. Llama 2 section 3.2.2: cosine."
    )
    final_rate_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Learning rate at the last step, as a share of the peak. Llama 2 section 3.2.2: down to 10% of the maximum.",
    )
    warmup_fraction: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Share of the optimizer steps in which the learning rate warms up. Llama 2 section 3.2.2: 3%.",
    )
    warmup_min_steps: int = Field(
        default=5, ge=0, description="Minimum number of warm-up steps. Llama 2 section 3.2.2: 5."
    )
    pairs_per_step: int = Field(
        default=512, ge=1, description="Pairs per optimizer step. Llama 2 section 3.2.2: 512 pairs."
    )
    margin: Literal["none", "small", "large"] = Field(
        default="small",
        description="Margin by rating, from 'significantly better' to 'negligibly better': small 1, 2/3, 1/3, 0; large 3, 2, 1, 0. Llama 2 Eq. 2, Table 27.",
    )
    safety_auxiliary_weight: float = Field(
        default=1.0,
        ge=0,
        description="Weight of the safety model's classification loss on labelled responses; 0: no such loss. The loss is that of Llama 2 section 3.2.2, its weight is ours.",
    )
    balance_labels: bool = Field(
        default=True,
        description="Repeat labelled single responses of the rarer class until both classes have the same number. Ours.",
    )
    language_weight: float = Field(
        default=0.0,
        ge=0,
        description="Weight of the language-model loss (cross-entropy) of the chosen answers, with the policy's frozen head; it preserves the trunk's language modelling, which small models need to recognise a fitting answer. 0: no such loss. Not in the paper; Yang et al. 2024 (arXiv:2406.10216).",
    )
    center_rewards_coefficient: float | None = Field(
        default=None,
        ge=0,
        description="Weight of the mean of (chosen + rejected)^2, which keeps scores near 0; null: no such loss. Not in the paper; TRL's.",
    )
    other_share: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="Share of the helpfulness model's pairs that comes from data.safety and data.open. Llama 2 section 3.2.2: equal parts.",
    )
    helpfulness_share: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the safety model's pairs that comes from data.helpfulness and data.open. Llama 2 section 3.2.2: 90/10.",
    )
    max_tokens: Annotated[int, Field(ge=16)] | None = unless_null(
        description="Maximum length of a dialog, in tokens, in training and validation. Longer dialogs lose their oldest turns; a pair that is still too long is left out. Test pairs are limited by base.max_tokens only. null: base.max_tokens. Ours; TRL's max_length."
    )
    contrast: Contrast = Field(default_factory=Contrast, description="Contrast pairs made of data.sft.")
    row_tokens: Literal["auto"] | Annotated[int, Field(ge=16)] = operational(
        "auto",
        description="Tokens of a packed row, which is one forward pass; auto is 2 x base.max_tokens on a GPU and 2048 on a CPU. A longer pair gets its own row.",
    )
    max_hours: Annotated[float, Field(gt=0)] | None = unless_null(
        description="Time budget for training each model in hours, summed over restarts; when it is used up, the weights with the lowest held-out loss are published. null: no limit. Ours."
    )
    trainer: Annotated[dict[str, Any], TrainerArguments("RewardConfig", OWNED)] = Field(
        default_factory=dict, description="Further arguments of TRL's RewardConfig, under TRL's names."
    )
