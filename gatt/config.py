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
    """Files of values, one a line. Paper: lists of hobbies and public figures, which the model itself wrote."""

    figures: Annotated[LocalPath, DATA_PATH] = Field(default="data/gatt/figures.txt", description="Public figures.")
    hobbies: Annotated[LocalPath, DATA_PATH] = Field(default="data/gatt/hobbies.txt", description="Hobbies.")
    languages: Annotated[LocalPath, DATA_PATH] = Field(default="data/gatt/languages.txt", description="Languages.")


class Config(Section):
    """Dialogs in which an instruction is kept to the last answer, and how far policies keep one."""

    dialogs: int = Field(default=2000, ge=1, description="Dialogs to make. Not stated in the paper; ours.")
    turns: int = Field(
        default=4,
        ge=2,
        description="Most user turns of a dialog; from two to this, equally often. Ours.",
    )
    families: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        default=FAMILIES,
        description="Kinds of constraints. Paper: figure, hobby, language; the others can be checked, and are ours.",
    )
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="Sampling weight of a family; others have 1. What has words to copy needs more examples. Ours.",
    )
    most_constraints: int = Field(
        default=2,
        ge=1,
        description="Most constraints of one instruction; their number is drawn. Paper: a random combination; the number is ours.",
    )
    values: Literal["lists", "policy"] = Field(
        default="lists",
        description="Figures, hobbies and languages from files (lists), or named by the policy itself (policy, as in the paper: it names only what it knows).",
    )
    lists: Lists = Field(default=Lists(), description="The files.")
    samples_per_turn: int = Field(
        default=4,
        ge=1,
        description="Answers sampled in each turn; the dialog continues with one that keeps the instruction. Not in the paper; ours.",
    )
    ranks_by_reward: bool = Field(
        default=False,
        description="Continue the dialog with the best of these answers by the reward models, not the first. Ours.",
    )
    temperature: Temperature | None = Field(
        default=None, description="Of the answers; null is rollout.temperature. Not stated in the paper; ours."
    )
    plain_share: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of the dialogs that have no instruction, of one user turn or more, with the policy's own answers: without them the policy quotes answers, or names the user, without an instruction to. Not in the paper; ours.",
    )
    recall_share: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Share of the dialogs with a figure or hobby whose last turn asks for it. Ours.",
    )
    repairs: bool = Field(
        default=True,
        description="Correct the last answer by rule where no sample keeps the instruction and a rule can (a first word, small letters, quotes, a name); counted. Ours.",
    )
    sft_share: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the dialogs of data.sft to add to the training, against forgetting. Ours.",
    )
    sft: dict[str, Any] = Field(
        default_factory=dict,
        description="Values over the section sft for the tuning, which always trains on the last answer of a dialog alone.",
    )
    max_hours: Annotated[float, Field(gt=0)] | None = unless_null(
        description="Time budget of the sampling in hours, over all its starts; what was sampled by then is trained on; the tuning has sft.max_hours. null for none. Ours."
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
            raise ValueError(f"weights names {', '.join(unknown)}, and families has {', '.join(self.families)}")
        return self
