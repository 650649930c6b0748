"""Which commands of the recipe there are, what each reads and makes, and the stage package behind it."""

from dataclasses import dataclass
from types import ModuleType

import sft
from llamachat.config.section import Section
from sft.config import VERSION as SFT_VERSION


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of a recipe's list of steps."""

    command: str
    section: str  # its key in the recipe
    package: ModuleType  # exports Config, run, estimate
    version: int  # raised when its code makes something else of the same configuration
    data: tuple[str, ...]  # keys of `data` that decide what it makes
    makes_policy: bool

    @property
    def config(self) -> type[Section]:
        """The class of its section."""
        return self.package.Config


STAGES = {
    stage.command: stage
    for stage in (
        Stage(
            command="sft",
            section="sft",
            package=sft,
            version=SFT_VERSION,
            data=("sft", "split"),
            makes_policy=True,
        ),
    )
}

# Commands of the whole recipe that have no stage here: command -> its section.
LATER = {
    "rm": "reward",
    "rs": "rejection_sampling",
    "gatt": "gatt",
    "distill": "context_distillation",
    "ppo": "ppo",
    "eval": "evaluation",
    "report": "report",
}
LATER_SECTIONS = (*dict.fromkeys(LATER.values()), "scoring")


def not_yet(what: str) -> str:
    """The words for a command or section whose stage is not there."""
    return f"{what} is not part of this version yet. What there is: {', '.join(STAGES)}."
