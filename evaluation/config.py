"""Configuration of `eval`: its own section of the recipe.

The paper (Llama 2, arXiv:2307.09288, sections 3.4 and 4.4) lets people compare answers to some 4000 prompts; here the
reward models and a judge that selected nothing do, and numbers of prompts are ours.
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
    """Every policy of the run on the same held-out prompts, with the same seeds."""

    test_prompts: int = Field(
        default=500,
        ge=2,
        description="Prompts of the test side that each policy answers. Ours; the paper has 4,000, rated by people.",
    )
    borderline_prompts: int = Field(
        default=250,
        ge=0,
        description="Harmless prompts that look unsafe, of each file of data.borderline: refusals of them are false ones. Ours.",
    )
    tie: float = Field(
        default=0.1,
        ge=0,
        description="Two answers whose scores differ by less are tied, and left out of win rates: at 0.1 a model prefers one with 52.5%. Paper: ties removed, by people's rating; the number is ours.",
    )
    dialogs: int = Field(
        default=200,
        ge=0,
        description="Number of held-out dialogs with an instruction in the first turn; 0: none. Ours.",
    )
    turns: Annotated[tuple[Turn, ...], Field(min_length=1)] = Field(
        default=(1, 2, 4, 6), description="Turns at which it is checked. Ours; paper, table 30: 2, 4, 6, 20."
    )
    families: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=CHECKABLE, description="Kinds of those instructions; each can be checked by rule. Ours."
    )
    curve_prompts: int = Field(
        default=32, ge=0, description="Prompts for reward against the number of answers; 0 draws none. Ours."
    )
    curve_samples: int = Field(default=16, ge=1, description="Answers to each of those: the largest N. Ours.")
    temperatures: tuple[Temperature, ...] = Field(
        default=(0.8, 1.0, 1.2),
        description="Temperatures at which the first and the last policy's curves are drawn. Paper, figure 8: 0.6 to 1.5; these are ours.",
    )
    guard: str | None = Field(
        default=None,
        description="A safety classifier (folder or hub name: Llama Guard, HarmBench's) that reads the answers to harmful prompts, on a GPU; null for none. Ours.",
    )
    samples: int = Field(default=12, ge=0, description="Prompts whose answers are shown side by side. Ours.")

    @model_validator(mode="after")
    def _families_can_be_checked(self) -> Self:
        unknown = [name for name in self.families if name not in CHECKABLE]
        if unknown:
            raise ValueError(f"families names {', '.join(unknown)}; what can be checked: {', '.join(CHECKABLE)}")
        return self
