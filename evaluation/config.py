"""Configuration of `eval`: its own section of the recipe.

In the paper (Llama 2, arXiv:2307.09288, sections 3.4 and 4.4), people compare answers to about 4000 prompts; here the
reward models and an independent judge do so. The numbers of prompts are ours.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from llamachat.config.section import Section
from llamachat.constraints.families import CHECKABLE

# Part of the fingerprint: raised when the same configuration and data would give other figures.
VERSION = 6

Temperature = Annotated[float, Field(gt=0)]
Turn = Annotated[int, Field(ge=1)]


class Config(Section):
    """Evaluation of every policy of the run on the same held-out prompts, with the same seeds."""

    test_prompts: int = Field(
        default=500,
        ge=2,
        description="Number of test prompts that each policy answers. Ours; the paper has 4,000, rated by people.",
    )
    borderline_prompts: int = Field(
        default=250,
        ge=0,
        description="Number of harmless prompts that look unsafe, from each file of data.borderline; refusing one is a false refusal. Ours.",
    )
    tie: float = Field(
        default=0.1,
        ge=0,
        description="Two answers whose scores differ by less are tied and do not count in win rates; at 0.1 a model prefers one with 52.5%. Paper: ties, as rated by people, are removed; the number is ours.",
    )
    dialogs: int = Field(
        default=200,
        ge=0,
        description="Number of held-out dialogs with an instruction in the first turn. Ours.",
    )
    turns: Annotated[tuple[Turn, ...], Field(min_length=1)] = Field(
        default=(1, 2, 4, 6),
        description="Turns at which the instruction is checked. Ours; paper, table 30: 2, 4, 6, 20.",
    )
    families: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=CHECKABLE, description="Kinds of these instructions, all of which can be checked by rule. Ours."
    )
    curve_prompts: int = Field(
        default=32, ge=0, description="Number of prompts for the curves of reward against the number of answers. Ours."
    )
    curve_samples: int = Field(default=16, ge=1, description="Answers to each of these prompts: the largest N. Ours.")
    temperatures: tuple[Temperature, ...] = Field(
        default=(0.8, 1.0, 1.2),
        description="Temperatures for the curves of the first and the last policy. Paper, figure 8: 0.6 to 1.5; these are ours.",
    )
    guard: str | None = Field(
        default=None,
        description="A safety classifier (folder or hub name: Llama Guard, HarmBench's) for the answers to harmful prompts, on a GPU; null: none. Ours.",
    )
    samples: int = Field(default=12, ge=0, description="Number of prompts whose answers are shown side by side. Ours.")

    @model_validator(mode="after")
    def _families_can_be_checked(self) -> Self:
        unknown = [name for name in self.families if name not in CHECKABLE]
        if unknown:
            raise ValueError(
                f"families contains {', '.join(unknown)}, which cannot be checked; known: {', '.join(CHECKABLE)}"
            )
        return self
