"""Configuration of `gatt` (Ghost Attention): its own section of the recipe.

The paper (Llama 2, arXiv:2307.09288, section 3.3) states neither the number of dialogs nor how they are sampled and
trained on; those values are ours, and so are the constraints that can be checked.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from llamachat.config.section import LocalPath, Section, unless_null
from llamachat.config.sections import DATA_PATH
from llamachat.constraints.families import FAMILIES

# Part of the fingerprint: raised when the same configuration and data would give other dialogs.
VERSION = 6

Temperature = Annotated[float, Field(gt=0)]
Turn = Annotated[int, Field(ge=1)]


class Lists(Section):
    """Files of values, one per line. Paper: lists of hobbies and public figures, written by the model itself."""

    figures: Annotated[LocalPath, DATA_PATH] = Field(default="data/gatt/figures.txt", description="Public figures.")
    hobbies: Annotated[LocalPath, DATA_PATH] = Field(default="data/gatt/hobbies.txt", description="Hobbies.")
    languages: Annotated[LocalPath, DATA_PATH] = Field(default="data/gatt/languages.txt", description="Languages.")


class Config(Section):
    """Training on dialogs in which an instruction is followed to the last answer, and measuring how long policies
    follow one."""

    dialogs: int = Field(
        default=2000, ge=1, description="Number of dialogs to generate. Not stated in the paper; ours."
    )
    turns: int = Field(
        default=4,
        ge=2,
        description="Maximum number of user turns of a dialog; the numbers from two to this are equally frequent. Ours.",
    )
    families: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=FAMILIES,
        description="Kinds of constraints. Paper: figure, hobby, language; the others can be checked, and are ours.",
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Sampling weights of families; the default is 1. Families with words to copy need more examples. Ours.",
    )
    most_constraints: int = Field(
        default=2,
        ge=1,
        description="Maximum number of constraints in one instruction; the number is drawn at random. Paper: a random combination; the number is ours.",
    )
    values: Literal["lists", "policy"] = Field(
        default="lists",
        description="Figures, hobbies and languages come from files (lists), or are named by the policy itself (policy, the paper's: it names only what it knows).",
    )
    lists: Lists = Field(default=Lists(), description="The files.")
    samples_per_turn: int = Field(
        default=4,
        ge=1,
        description="Answers sampled in each turn; the dialog continues with one that follows the instruction. Not in the paper; ours.",
    )
    ranks_by_reward: bool = Field(
        default=False,
        description="Continue the dialog with the best of these answers by the reward models instead of the first. Ours.",
    )
    temperature: Temperature | None = Field(
        default=None,
        description="Sampling temperature of the answers; null: rollout.temperature. Not stated in the paper; ours.",
    )
    plain_share: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of dialogs without an instruction, with one user turn or more and the policy's own answers; without them the policy quotes answers or names the user even when not instructed to. Not in the paper; ours.",
    )
    recall_share: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Share of the dialogs with a figure or hobby whose last turn asks about it. Ours.",
    )
    repairs: bool = Field(
        default=True,
        description="If no sample follows the instruction, correct the last answer by rule where one exists (a first word, lower case, quotes, a name); such answers are counted. Ours.",
    )
    sft_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the dialogs of data.sft that is added to the training, against forgetting. Ours.",
    )
    sft: dict[str, Any] = Field(
        default_factory=dict,
        description="Overrides of the section sft for the tuning, which always trains on the last answer of a dialog only.",
    )
    max_hours: Annotated[float, Field(gt=0)] | None = unless_null(
        description="Time budget of the sampling in hours, summed over restarts; the tuning then uses what was sampled, and has its own sft.max_hours. null: no limit. Ours."
    )
    evaluation_turns: Annotated[tuple[Turn, ...], Field(min_length=1)] = Field(
        default=(1, 2, 4, 6), description="Turns at which consistency is measured. Ours; paper, table 30: 2, 4, 6, 20."
    )
    evaluation_dialogs: int = Field(
        default=200,
        ge=2,
        description="Number of held-out dialogs, each with held-out values, for the evaluation. Ours.",
    )

    @model_validator(mode="after")
    def _weights_are_of_its_families(self) -> Self:
        unknown = [name for name in self.weights if name not in self.families]
        if unknown:
            raise ValueError(f"weights contains {', '.join(unknown)}, but families has only {', '.join(self.families)}")
        return self
