"""What the report is told: its own section of the recipe, and the finished steps that it tells of."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llamachat.config.section import Section
from llamachat.config.sections import Run, Tracking

if TYPE_CHECKING:
    from llamachat.runs.artifacts import Artifact

# Part of the fingerprint: raised when the same steps would give a page with other content.
VERSION = 1


class Config(Section):
    """How much of a run the report shows."""

    samples: int = Field(default=12, ge=0, description="Prompts whose answers stand side by side; 0 for none. Ours.")
    shows_curves: bool = Field(default=True, description="Whether the training curves of every step are on the page.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What `pipelines` resolves for the report."""

    step: str
    folder: Path
    resolved: str  # the recipe as YAML, for the run's record
    identity: dict[str, Any]
    fingerprint: str
    run: Run
    tracking: Tracking
    recipe: Mapping[str, Any]  # the whole resolved recipe as plain values
    earlier: "tuple[Artifact, ...]"  # of all finished steps before this one, in the order of the run
