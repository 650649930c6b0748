"""What every step is handed that samples answers and scores them: those that tune on some of them, and evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamachat.config.sections import Base, Data, Rollout, Run, Scoring, Tracking, Tuning

if TYPE_CHECKING:
    from llamachat.runs.artifacts import Artifact, Tune


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerInputs:
    """What `pipelines` resolves for any such step."""

    step: str
    folder: Path
    resolved: str  # the recipe as YAML, for the run's record
    identity: dict[str, Any]
    fingerprint: str
    run: Run
    base: Base
    tuning: Tuning
    data: Data
    rollout: Rollout
    scoring: Scoring
    tracking: Tracking
    reward_models: "Mapping[str, Artifact]" = field(default_factory=dict)  # by what they judge, the judge among them


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs(AnswerInputs):
    """Of one that makes dialogs and tunes on them: rejection sampling, Ghost Attention, context distillation."""

    tune: "Tune"
    policy: "Artifact | None" = None  # to sample from and to continue; the base itself without one
    deadline: float | None = None  # by time.monotonic(): when run.max_hours are over
