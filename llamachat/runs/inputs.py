"""What a step gets in addition to its own section: the shared sections of the recipe, its folder and its input
artifacts.

`pipelines` resolves all of it; a stage searches for nothing. Only some stages read members with a default.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from llamachat.config.sections import Base, Data, Rollout, Run, Scoring, Tracking, Tuning, function_name
from llamachat.runs.artifacts import Artifact, StepFolder

# The reward models of a recipe. The judge is trained on data that the other two never see, and is not used for
# selection.
Which = Literal["helpfulness", "safety", "judge"]


class Tune(Protocol):
    """Supervised tuning of a step's policy on the dialogs that the step has published."""

    def __call__(
        self, dialogs: Artifact, *, over: Mapping[str, Any], from_base: bool = False, sft_share: float = 0.0
    ) -> Artifact:
        """The tuned policy, in `tuned/` until `end_step`; the work of a killed command is reused.

        `over` overrides the section sft; `sft_share` is the share of `data.sft` that is added to the training data.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """The inputs of one step."""

    step: str  # its name: sft, rm/safety, rs-2
    folder: StepFolder
    identity: dict[str, Any]
    fingerprint: str
    run: Run
    base: Base
    tuning: Tuning
    data: Data
    tracking: Tracking
    rollout: Rollout = field(default_factory=Rollout)
    scoring: Scoring = field(default_factory=Scoring)
    deadline: float | None = None  # by time.monotonic(): the end of run.max_hours
    policy: Artifact | None = None  # the policy to start from; None means the base itself
    reward_models: Mapping[str, Artifact] = field(default_factory=dict)  # by domain, including the judge
    which: Which | None = None  # the reward model to train
    tune: Tune | None = None  # for steps that make dialogs and train on them
    sft_policy: Artifact | None = (
        None  # of the nearest earlier sft step: the policy that rejection sampling is compared with
    )
    pooled: Mapping[str, Artifact] = field(default_factory=dict)  # the dialogs of earlier rounds, by step
    dialogs: Artifact | None = (
        None  # made by a step such as rejection sampling: sft trains on these instead of data.sft
    )
    sft_share: float = 0.0  # of data.sft, which sft adds to `dialogs`
    surveyed: tuple[Artifact, ...] = ()  # the finished steps that evaluation and report cover, in the order of the run
    recipe: Mapping[str, Any] = field(default_factory=dict)  # the whole resolved recipe as plain values, for the report

    @property
    def reward_function(self) -> str | None:
        """The user's function that scores answers, with the digest of its file; None if there is none."""
        name = function_name(self.scoring.combine)
        if name is None or "scoring" not in self.identity:
            return None
        return f"{name} (SHA-256 {self.identity['scoring']['combine'].partition(':')[0]})"

    @property
    def policies(self) -> tuple[Artifact, ...]:
        """The policies to evaluate: the recipe's starting policy if it names one, then those of the run."""
        surveyed = tuple(artifact for artifact in self.surveyed if artifact.manifest.kind == "policy")
        is_first = self.base.policy is not None and self.policy is not None and self.policy not in surveyed
        return (self.policy, *surveyed) if is_first and self.policy else surveyed
