"""Configuration of `rs` (rejection sampling): its own section of the recipe.

The paper (Llama 2, arXiv:2307.09288, section 3.2.3) states neither K nor the number of prompts, nor how the winners are
trained on; those values are ours. Sampling and scoring are configured in the sections `rollout` and `scoring`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llamachat.config.section import LocalPath, Section, unless_null
from llamachat.config.sections import POLICY_PATH

# Part of the fingerprint: raised when the same configuration and data would give other dialogs.
VERSION = 4

Temperature = Annotated[float, Field(gt=0)]


class Config(Section):
    """One round of rejection sampling: training on the best of K answers, pooled with those of earlier rounds."""

    samples_per_prompt: int = Field(
        default=16, ge=1, description="K, the number of answers sampled to each prompt. Not stated in the paper; ours."
    )
    prompts: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Number of prompts in a round, the same ones in each round; null: all of the training split. Ours.",
    )
    temperature: Temperature | Annotated[tuple[Temperature, ...], Field(min_length=1)] | Literal["sweep"] | None = (
        Field(
            default=None,
            description="Sampling temperature. A list divides the K samples between its temperatures; sweep chooses the best of sweep_temperatures before the round, as the paper does; null: rollout.temperature.",
        )
    )
    sweep_temperatures: Annotated[tuple[Temperature, ...], Field(min_length=1)] = Field(
        default=(0.6, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
        description="Temperatures that a sweep compares. Paper, figure 8: these.",
    )
    sweep_prompts: int = Field(
        default=64,
        ge=0,
        description="Number of validation prompts for the sweep and the curves of reward against N; 0: no sweep. Ours.",
    )
    sweep_samples: int = Field(
        default=32,
        ge=1,
        description="Answers to each of these prompts at each temperature: the largest N. The temperature is chosen by the best of samples_per_prompt of them. Ours.",
    )
    select: Literal["best", "random"] = Field(
        default="best",
        description="Which of a prompt's K answers to train on: the best by the reward models (best), or, as a control, one drawn uniformly from the usable ones (random; usable: finished, not empty, each text once). The control must not raise the judge's score. Ours.",
    )
    pool: Literal["best_per_prompt", "all"] = Field(
        default="best_per_prompt",
        description="Which winners of this and all earlier rounds to train on: the best for each prompt (with select: random, a random one), or all. Paper: top samples of all earlier iterations.",
    )
    sampler: Annotated[LocalPath | None, POLICY_PATH] = Field(
        default=None,
        description="A policy to sample from instead of the current one, such as a larger one (distillation: in the paper small models learn from the 70B model's answers). Ours.",
    )
    start: Literal["current", "base"] = Field(
        default="current",
        description="The model that is tuned on the winners: the current policy, or the base with data.sft mixed in (the paper starts each version from the base).",
    )
    sft: dict[str, Any] = Field(
        default_factory=dict, description="Overrides of the section sft for tuning on the winners."
    )
    max_hours: Annotated[float, Field(gt=0)] | None = unless_null(
        description="Time budget of the sampling in hours, summed over restarts; the tuning then uses what was sampled, and has its own sft.max_hours. null: no limit. Ours."
    )
    validation_prompts: int = Field(
        default=64, ge=1, description="Number of held-out prompts whose winners measure the tuning's loss. Ours."
    )
    test_prompts: int = Field(
        default=200, ge=1, description="Number of test prompts for comparing the first and the final policy. Ours."
    )

    @model_validator(mode="after")
    def _sweep_has_prompts(self) -> Self:
        if self.temperature == "sweep" and self.sweep_prompts == 0:
            raise ValueError("temperature is sweep, but sweep_prompts is 0, so there are no prompts for the comparison")
        return self

    @model_validator(mode="after")
    def _every_temperature_has_a_sample(self) -> Self:
        if isinstance(self.temperature, tuple) and len(self.temperature) > self.samples_per_prompt:
            raise ValueError(
                f"temperature has {len(self.temperature)} values, but samples_per_prompt is {self.samples_per_prompt}"
            )
        return self
