"""The section context_distillation of the recipe.

The paper (Llama 2, arXiv:2307.09288, section 4.2.4 and appendix A.4) states neither the number of prompts nor how
answers are sampled and trained on; those values are ours, and so is the wording of the preprompts.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from llamachat.config.section import Section, unless_null

# Part of the fingerprint: raised when the same configuration and data would give other dialogs.
VERSION = 3

Temperature = Annotated[float, Field(gt=0)]
Words = Annotated[str, Field(min_length=1)]

# Ours, modelled on the paper's examples (table 39): responsible, respectful, wise.
PREPROMPTS = (
    "You are a responsible and respectful assistant. Never say what is harmful, hateful or illegal. If a question asks for"
    " such a thing, say what is wrong with it, and do not answer it.",
    "You are a wise and careful assistant. Give no dangerous and no illegal advice. Your answers are fair, kind and safe.",
    "The next question was marked as unsafe. Answer it in a safe, honest and positive way.",
    "You are a friendly and thoughtful assistant, who wants nobody to come to harm. Refuse politely what could hurt"
    " somebody, and explain why.",
    "This is a talk with a knowledgeable and decent assistant. It says nothing unethical or biased, and leads the talk to"
    " something good.",
)


class Config(Section):
    """Training on answers to adversarial prompts that were sampled under a safety preprompt, without the preprompt,
    where they are safer."""

    preprompts: Annotated[tuple[Words, ...], Field(min_length=1)] = Field(
        default=PREPROMPTS,
        description="Generic system texts, assigned to the prompts in turn. Ours; the paper's (table 39) are made from templates with adjectives such as responsible, respectful, wise.",
    )
    uses_categories: bool = Field(
        default=True,
        description="Also answer a prompt of known category under the answer template of that category. Paper 4.2.4: it helps more than a generic preprompt.",
    )
    categories: dict[Words, Annotated[tuple[Words, ...], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="Risk categories: {name: [patterns of prompt ids, such as fraud-*]}; the first match counts. Paper: labels by annotators.",
    )
    prompts: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Number of adversarial prompts to sample answers to; null: all of the training split. Ours.",
    )
    samples_per_prompt: int = Field(
        default=1,
        ge=1,
        description="Answers to a prompt under each preprompt (generic, by category), and the same total number of plain answers. Ours.",
    )
    temperature: Temperature | None = Field(
        default=None,
        description="Sampling temperature of the answers; null: rollout.temperature. Not stated in the paper; ours.",
    )
    keep: Literal["better", "all"] = Field(
        default="better",
        description="Train on the best distilled answer only if it is safer than the best plain one (better, the paper's), or always (all; the paper found that this harms good answers).",
    )
    margin: float = Field(
        default=0.0, ge=0, description="Required lead of its safety score over that of the plain answer. Paper: 0."
    )
    sft_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the dialogs of data.sft that is added to the training, against forgetting. Ours.",
    )
    sft: dict[str, Any] = Field(
        default_factory=dict, description="Overrides of the section sft for tuning on the kept answers."
    )
    max_hours: Annotated[float, Field(gt=0)] | None = unless_null(
        description="Time budget of the sampling in hours, summed over restarts; the tuning then uses what was sampled, and has its own sft.max_hours. null: no limit. Ours."
    )
    validation_prompts: int = Field(
        default=64, ge=1, description="Number of held-out prompts whose kept answers measure the tuning's loss. Ours."
    )
    test_prompts: int = Field(
        default=200,
        ge=1,
        description="Number of adversarial test prompts for comparing the first and the final policy. Ours.",
    )
    borderline_prompts: int = Field(
        default=200,
        ge=0,
        description="Number of harmless prompts that look unsafe, from each file of data.borderline, on which refusals are counted. Ours; paper A.4: 210.",
    )
