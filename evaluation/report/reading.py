"""What the finished steps of a run left: manifests, final figures, costs, and the evaluation where there is one.

A step folder may be a link into another run; it is read through, never written.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from llamachat.errors import ArtifactError, first_line
from llamachat.runs.artifacts import Artifact
from llamachat.runs.atomic import storage_errors
from llamachat.runs.endings import Ending, ending
from llamachat.runs.evaluations import EVALUATION
from llamachat.runs.folder import StepFolder
from llamachat.runs.inputs import StepInputs

COST = "cost.json"
CURVES = "best_of_n.json"  # of rejection sampling, in its figures

Model = TypeVar("Model", bound=BaseModel)


class _Plain(BaseModel):
    """A part of a file of another step; what a later version adds to it is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Measure(_Plain):
    """A figure with its 95% interval, where it has one, and what it is a mean over."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


class Curve(_Plain):
    """What the best and the median of N answers are worth: entry n - 1 is for n of them."""

    policy: str
    temperature: float
    best: list[float]
    best_low: list[float]
    best_high: list[float]
    median: list[float]


class SampledAnswer(_Plain):
    """One policy's answer to a sample prompt."""

    text: str
    tokens: int | None = None
    finished: bool | None = None
    scores: dict[str, float | None] = {}


class SampledPrompt(_Plain):
    """A prompt that every policy answered."""

    kind: str
    prompt: list[dict[str, Any]]
    answers: dict[str, SampledAnswer]


class Evaluation(_Plain):
    """The content of `evaluation.json`."""

    reference: str
    policies: list[str]
    temperature: float | None = None
    max_new_tokens: int | None = None
    seed: int | None = None
    figures: dict[str, dict[str, Measure | None]]
    curves: list[Curve] = []
    refusal_classifier: Measure | None = None
    samples: list[SampledPrompt] = []

    @model_validator(mode="after")
    def _has_figures_of_its_policies(self) -> "Evaluation":
        absent = [name for name in dict.fromkeys([self.reference, *self.policies]) if name not in self.figures]
        if absent:
            raise ValueError(f"figures has nothing on {', '.join(absent)}")
        return self

    def measure(self, policy: str, metric: str) -> Measure | None:
        """A figure of a policy; None where it was not measured."""
        return self.figures[policy].get(metric)

    def has(self, metric: str) -> bool:
        """Whether any policy was measured so."""
        return any(self.measure(policy, metric) is not None for policy in self.policies)

    def turns(self, measured: str = "consistency") -> list[int]:
        """The turns at which instructions were checked."""
        names = {name for policy in self.policies for name, one in self.figures[policy].items() if one is not None}
        found = (re.fullmatch(rf"{measured}/turn_(\d+)", name) for name in names)
        return sorted(int(match[1]) for match in found if match)


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step and the files that it left."""

    artifact: Artifact
    folder: StepFolder
    summary: Mapping[str, float]
    cost: Mapping[str, float]

    @property
    def name(self) -> str:
        return self.artifact.manifest.step

    @property
    def command(self) -> str:
        """'rs' of the step 'rs-2'."""
        return str(self.identity.get("command") or command_of(self.name))

    @property
    def identity(self) -> Mapping[str, Any]:
        return self.artifact.manifest.identity

    @property
    def ending(self) -> Ending | None:
        """What ended it before its recipe did."""
        return ending(self.artifact)

    def value(self, section: str, key: str) -> Any:
        """A key of the configuration that the step was run with; None where it did not read it."""
        values = self.identity.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    def measure(self, name: str) -> Measure | None:
        """A final figure with the interval beside it."""
        value = self.summary.get(name)
        if value is None:
            return None
        return Measure(value=value, low=self.summary.get(f"{name}_low"), high=self.summary.get(f"{name}_high"))


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the report tells of."""

    inputs: StepInputs
    steps: tuple[Step, ...]
    evaluation: Evaluation | None

    @property
    def run_name(self) -> str:
        return Path(self.inputs.run.dir).resolve().name

    @property
    def policies(self) -> list[Step]:
        return [step for step in self.steps if step.artifact.manifest.kind == "policy"]

    @property
    def reward_models(self) -> dict[str, Step]:
        """Reward models by what they judge."""
        models = [step for step in self.steps if step.artifact.manifest.kind == "reward_model"]
        return {
            str(step.artifact.manifest.details.get("which") or step.name.rpartition("/")[2]): step for step in models
        }

    def by_command(self, command: str) -> list[Step]:
        """The steps of one command, in the order of the run."""
        return [step for step in self.steps if step.command == command]

    @property
    def recipe_steps(self) -> list[str]:
        """Names of the recipe's steps, the report and what follows it left out."""
        names = [
            entry if isinstance(entry, str) else next(iter(entry)) for entry in self.inputs.recipe.get("steps") or ()
        ]
        return names[: names.index(self.inputs.step)] if self.inputs.step in names else names

    def curves(self) -> list[Curve]:
        """Reward against the number of answers: of the evaluation, else of rejection sampling."""
        if self.evaluation is not None and self.evaluation.curves:
            return self.evaluation.curves
        found = []
        for step in self.by_command("rs"):
            path = step.folder.figures / CURVES
            values = read_json(path) if path.is_file() else []
            found += [_understood(Curve, value, path, step.name) for value in values]
        return found


def read_facts(inputs: StepInputs) -> Facts:
    """Read what the earlier steps left; dialogs, which end no step, are passed over."""
    finished = [artifact for artifact in inputs.surveyed if artifact.manifest.kind != "dialogs"]
    steps = tuple(_read_step(artifact) for artifact in finished)
    evaluations = [step for step in steps if step.artifact.manifest.kind == "evaluation"]
    evaluation = None
    if evaluations:
        path = evaluations[-1].artifact.path / EVALUATION
        evaluation = _understood(Evaluation, read_json(path), path, evaluations[-1].name)
    return Facts(inputs, steps, evaluation)


def command_of(step: str) -> str:
    """The command that makes a step of this name: 'rs' makes 'rs-2', 'rm' makes 'rm/safety'."""
    return re.sub(r"-\d+$", "", step.partition("/")[0])


def read_json(path: Path) -> Any:
    """The content of a file that an earlier step wrote whole."""
    try:
        with storage_errors(path):
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: cannot be read ({first_line(error)}). The report is made of what the finished steps left."
            " Copy the run whole, or make the step again with `--overwrite`."
        ) from error


def _read_step(artifact: Artifact) -> Step:
    folder = StepFolder(artifact.path.parent)
    cost = folder.path / COST
    return Step(
        artifact,
        folder,
        read_json(folder.summary) if folder.summary.is_file() else {},
        read_json(cost) if cost.is_file() else {},
    )


def _understood(model: type[Model], values: Any, path: Path, step: str) -> Model:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "the file"
        raise ArtifactError(
            f"{path}: {place}: {problem['msg']}. The report shows the figures that '{step}' wrote there."
            f" Make it again with `llamachat {command_of(step)} --overwrite`."
        ) from error
