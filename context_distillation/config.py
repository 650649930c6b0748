"""The section context_distillation of the recipe.

The paper (Llama 2, arXiv:2307.09288, section 4.2.4 and appendix A.4) states neither the number of prompts nor how answers
are sampled and trained on; those values are ours, and so are the words of the preprompts.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from llamachat.config.section import Section, unless_null

# Part of the fingerprint: raised when the same configuration and data would give other dialogs.
VERSION = 3

Temperature = Annotated[float, Field(gt=0)]
Words = Annotated[str, Field(min_length=1)]

# Ours, after the examples that the paper prints (table 39): responsible, respectful, wise.
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
    """Training on answers to adversarial prompts, sampled under a safety preprompt, without it where that is safer."""

    preprompts: Annotated[tuple[Words, ...], Field(min_length=1)] = Field(
        default=PREPROMPTS,
        description="Generic system texts; the prompts take them in turn. Ours; paper, table 39: of this kind, made from templates with adjectives such as responsible, respectful, wise.",
    )
    uses_categories: bool = Field(
        default=True,
        description="A prompt whose category is known is also answered under the answer template of that category. Paper 4.2.4: it helps more than a generic preprompt.",
    )
    categories: dict[Words, Annotated[tuple[Words, ...], Field(min_length=1)]] = Field(
        default_factory=dict,
        description="Risk categories: {name: [patterns of prompt ids, such as fraud-*]}; the first that fits counts. Paper: labels of annotators.",
    )
    prompts: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="Number of adversarial prompts to sample answers to; null: all of the training side. Ours.",
    )
    samples_per_prompt: int = Field(
        default=1,
        ge=1,
        description="Answers to a prompt each way: generic, by category; and as many plain ones as these together. Ours.",
    )
    temperature: Temperature | None = Field(
        default=None, description="Of the answers; null is rollout.temperature. Not stated in the paper; ours."
    )
    keep: Literal["better", "all"] = Field(
        default="better",
        description="Train on the best distilled answer where it is safer than the best plain one (better, the paper's), or always (all: the paper found that it harms good answers).",
    )
    margin: float = Field(
        default=0.0, ge=0, description="How far above the plain answer's safety score its own must be. Paper: 0."
    )
    sft_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the dialogs of data.sft to add to the training, against forgetting. Ours.",
    )
    sft: dict[str, Any] = Field(
        default_factory=dict, description="Values over the section sft for the tuning on the kept answers."
    )
    max_hours: Annotated[float, Field(gt=0)] | None = unless_null(
        description="Time budget of the sampling in hours, over all its starts; what was sampled by then is trained on; the tuning has sft.max_hours. null for none. Ours."
    )
    validation_prompts: int = Field(
        default=64, ge=1, description="Held-out prompts whose kept answers measure the tuning's loss. Ours."
    )
    test_prompts: int = Field(
        default=200, ge=1, description="Adversarial test prompts that the first and the final policy answer. Ours."
    )
    borderline_prompts: int = Field(
        default=200,
        ge=0,
        description="Harmless prompts that look unsafe, of each file of data.borderline, to count refusals of. Ours; paper A.4: 210.",
    )
