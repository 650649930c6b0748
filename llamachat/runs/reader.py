"""Reads what the steps of a run wrote: manifests, recipes, final figures, costs and evaluations, as typed values.

Reads small files only, so it also reads a run whose weights were deleted, and one that is still running. A step
that is a reference (a link) reads like any other; nothing is written.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from llamachat.errors import ArtifactError, UsageError, first_line
from llamachat.runs.artifacts import (
    EVALUATION,
    ITERATIONS_DONE,
    MANIFEST,
    NOT_STEPS,
    Artifact,
    Manifest,
    StepFolder,
    read_manifest,
)
from llamachat.runs.atomic import INCOMING
from llamachat.runs.record import MetricsRecord
from llamachat.runs.state import Cost, read_cost

_SIGNS = ("identity.json", "metrics.jsonl", "summary.json", f"artifact/{MANIFEST}")
_BEST_OF_N = "best_of_n.json"  # in the figures of rejection sampling
# By command: the section of the recipe, its key for the planned amount, and the figure for the completed amount.
_COUNTED = {
    "ppo": ("ppo", "iterations", "ppo/step"),
    "sft": ("sft", "epochs", "sft/epoch"),
    "rm": ("reward", "epochs", "{step}/epoch"),
    "dpo": ("dpo", "epochs", "dpo/epoch"),
}
_GUARDS = ("patience", "kl_guard", "collapse_guard")


class _Plain(BaseModel):
    """A part of a step's file; keys added by later versions are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure with its 95% interval, if it has one, and the number of items in its mean."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def named(self, name: str) -> dict[str, float]:
        """The value and the ends of its interval as metrics: `name`, `name_low`, `name_high`."""
        ends = {"": self.value, "_low": self.low, "_high": self.high}
        return {f"{name}{end}": value for end, value in ends.items() if value is not None}

    @property
    def interval(self) -> tuple[float, float] | None:
        """The ends of its interval; None if it has none or no width: then all values were equal, and chance cannot be
        estimated."""
        return None if self.low is None or self.high is None or self.low == self.high else (self.low, self.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The reward of one policy's answers at one temperature by their number: entry n - 1 is for n answers."""

    __pydantic_config__: ClassVar = ConfigDict(allow_inf_nan=False)
    policy: str  # the step that made the policy
    temperature: float
    best: list[float]
    best_low: list[float]  # 95% interval over prompts
    best_high: list[float]
    median: list[float]

    @property
    def reward(self) -> float:
        """The reward of the best of all of them."""
        return self.best[-1]


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
    outcome_classifier: dict[str, Measure] = {}  # its accuracy on labelled answers: all, and by label
    samples: list[SampledPrompt] = []

    @model_validator(mode="after")
    def _has_figures_of_its_policies(self) -> "Evaluation":
        absent = [name for name in dict.fromkeys([self.reference, *self.policies]) if name not in self.figures]
        if absent:
            raise ValueError(f"figures has nothing on {', '.join(absent)}")
        return self

    def measure(self, policy: str, metric: str) -> Measure | None:
        """A figure of a policy; None if it was not measured."""
        return self.figures[policy].get(metric)

    def has(self, metric: str) -> bool:
        """Whether it was measured for any policy."""
        return any(self.measure(policy, metric) is not None for policy in self.policies)

    def turns(self, measured: str = "consistency") -> list[int]:
        """The turns at which instructions were checked."""
        names = {name for policy in self.policies for name, one in self.figures[policy].items() if one is not None}
        matches = (re.fullmatch(rf"{measured}/turn_(\d+)", name) for name in names)
        return sorted(int(match[1]) for match in matches if match)


class Benchmark(_Plain):
    """The result of `llamachat benchmark` for a policy on one set of questions; all figures are shares."""

    title: str
    figures: dict[str, Measure]
    published: Mapping[str, Mapping[str, float]] = {}  # of other models: model -> figure -> share
    notes: list[str] = []


# The forms of the files that are read here.
_OBJECT = TypeAdapter(dict[str, Any])
_FIGURES = TypeAdapter(dict[str, float | None])
_EVALUATION = TypeAdapter(Evaluation)
_CURVES = TypeAdapter(list[Curve])
_BENCHMARK = TypeAdapter(Benchmark)


@dataclass(frozen=True, slots=True)
class Ending:
    """What ended a step early; the count is unknown for steps that sample."""

    by: str  # max_hours, run.max_hours, patience, kl_guard, collapse_guard
    key: str | None = None  # iterations, epochs
    done: float | None = None
    planned: float | None = None

    def words(self, *, with_unit: bool = False) -> str:
        """'5 of 23, ended by max_hours', '5 of 23 iterations, ended by max_hours'."""
        by = f"ended by {self.by}"
        if self.planned is None:
            return by
        done = "at most" if self.done is None else f"{self.done:.4g} of"
        return f"{done} {self.planned:g}{f' {self.key}' if with_unit else ''}, {by}"


@dataclass(frozen=True)
class RunStep:
    """One step of a run and the files that it wrote; a missing file reads as empty."""

    name: str
    folder: StepFolder
    manifest: Manifest | None

    @property
    def is_finished(self) -> bool:
        return self.manifest is not None

    @property
    def published(self) -> Manifest:
        """The manifest of a finished step."""
        assert self.manifest is not None, f"{self.name} is not finished"
        return self.manifest

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The keys that decide the step's result."""
        if self.manifest is not None:
            return self.manifest.identity
        identity = read_object(self.folder.identity).get("identity")
        return identity if isinstance(identity, dict) else {}

    @property
    def command(self) -> str:
        """The command that makes such a step: 'rm' for 'rm/safety', 'rs' for 'rs-2'."""
        return str(self.identity.get("command") or command_of(self.name))

    @property
    def scored_by(self) -> list[str]:
        """The reward models that the step read, by domain; the template of the model card shows them."""
        return sorted(role.partition("/")[2] for role in self.published.inputs if role.startswith("reward_model/"))

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe of the command that ran the step."""
        return read_object(self.folder.config)

    @cached_property
    def summary(self) -> dict[str, float]:
        """The final figures by name."""
        return read_summary(self.folder)

    @property
    def cost(self) -> Cost | None:
        """Time and memory of the step; None if they were not recorded, or the file is damaged."""
        return read_cost(self.folder)

    @cached_property
    def evaluation(self) -> Evaluation | None:
        """The figures of all policies, for a step that evaluates."""
        return _read(self.folder.artifact / EVALUATION, _EVALUATION)

    @property
    def benchmarks(self) -> dict[str, Benchmark]:
        """The benchmark results of the step's current policy, by the name of the set."""
        return read_benchmarks(Artifact(self.folder.artifact, self.published))

    @property
    def best_of_n(self) -> list[Curve]:
        """The curves of reward against the number of answers, for a step that samples several."""
        return _read(self.folder.figures / _BEST_OF_N, _CURVES) or []

    @property
    def ending(self) -> Ending | None:
        """What ended the step early; None if it completed what its recipe says."""
        details = self.manifest.details if self.manifest else {}
        end = details.get("end")
        by = details.get("ended_by") or (end if end in _GUARDS else None)
        if by is None or self.command not in _COUNTED:
            return Ending(by) if by else None
        section, key, figure = _COUNTED[self.command]
        done = details.get(ITERATIONS_DONE)
        if done is None:  # passes are in the step's record, if it still exists next to the artifact
            rows = MetricsRecord(self.folder.metrics).read()
            name = figure.format(step=self.name)
            done = next((row[name] for row in reversed(rows) if name in row), None)
        return Ending(by, key, done, self.value(section, key))

    def value(self, section: str, key: str) -> Any:
        """A key of the configuration that the step was run with; None if the step did not read it."""
        values = self.identity.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    def measure(self, name: str) -> Measure | None:
        """A final figure with its interval."""
        value = self.summary.get(name)
        if value is None:
            return None
        return Measure(value=value, low=self.summary.get(f"{name}_low"), high=self.summary.get(f"{name}_high"))

    def measures(self) -> dict[str, Measure]:
        """All final figures with their intervals."""
        ends = {f"{name}_{end}" for name in self.summary for end in ("low", "high")}
        return {name: one for name in self.summary if name not in ends and (one := self.measure(name)) is not None}


def read_run(run: Path) -> dict[str, RunStep]:
    """The steps of a run that have figures, by name, in the order in which they finished; unfinished ones last."""
    if not run.is_dir():
        raise UsageError(
            f"{run}: no such folder. A run folder contains the steps of a recipe, such as runs/tiny. Correct the path."
        )
    if any((run / sign).is_file() for sign in _SIGNS):
        raise UsageError(
            f"{run}: this is the folder of a step, not of a run. A run folder contains a folder for each step. Name the run"
            f" that it belongs to, such as {run.parent}."
        )
    folders = {
        path.relative_to(run).as_posix().removesuffix(f"/{sign}")
        for sign in _SIGNS
        for pattern in ("*", "*/*")
        for path in run.glob(f"{pattern}/{sign}")
    }
    steps = [
        read_step(run, name)
        for name in sorted(folders)
        if not any(part in NOT_STEPS or part.startswith((".", INCOMING)) for part in Path(name).parts)
    ]
    # A step that has only begun has produced nothing yet.
    steps = [step for step in steps if step.is_finished or step.summary or step.folder.metrics.is_file()]
    if not steps:
        raise UsageError(
            f"{run}: no steps here. A run folder contains a folder for each step, such as 'sft' with its summary.json."
            " Name the folder of a run (run.dir of its recipe)."
        )
    for step in steps:
        named = step.identity.get("step", step.name)
        if named != step.name:  # a step one folder deeper than expected belongs to one of several runs
            raise UsageError(
                f"{run}: this is not a run folder, since '{step.name}' contains the step '{named}'. A run folder contains '{named}'"
                f" itself. Name one run, such as {step.folder.path.as_posix().removesuffix(f'/{named}')}."
            )
    order = sorted(
        steps, key=lambda step: (not step.manifest, step.manifest.created if step.manifest else "", step.name)
    )
    return {step.name: step for step in order}


def read_step(run: Path, name: str) -> RunStep:
    """One step of a run; raises an ArtifactError if its manifest is broken."""
    folder = StepFolder(run / name)
    is_finished = (folder.artifact / MANIFEST).is_file()
    return RunStep(name, folder, read_manifest(folder.artifact) if is_finished else None)


def step_of(artifact: Artifact) -> RunStep:
    """The step that published an artifact."""
    return RunStep(artifact.manifest.step, StepFolder(artifact.path.absolute().parent), artifact.manifest)


def benchmark_folder(artifact: Artifact) -> Path:
    """Where `llamachat benchmark` stores the answers and figures of an artifact; other weights have another folder."""
    return StepFolder(artifact.path.absolute().parent).benchmark / artifact.digest[:12]


def read_benchmarks(artifact: Artifact) -> dict[str, Benchmark]:
    """The benchmark results of an artifact, by the name of the set."""
    return {path.stem: _read(path, _BENCHMARK) for path in sorted(benchmark_folder(artifact).glob("*.json"))}


def command_of(step: str) -> str:
    """The command that makes a step of this name: 'rs' makes 'rs-2', 'rm' makes 'rm/safety'."""
    return re.sub(r"-\d+$", "", step.partition("/")[0])


def read_summary(folder: StepFolder) -> dict[str, float]:
    """The final figures written so far; empty before the first."""
    values: Mapping[str, float | None] = _read(folder.summary, _FIGURES) or {}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON or YAML object; empty if the file does not exist."""
    return _read(path, _OBJECT) or {}


def _read(path: Path, form: TypeAdapter[Any]) -> Any:
    """The typed content of a JSON or YAML file, None if it does not exist; raises an ArtifactError if it is invalid."""
    try:
        content = path.read_bytes()
        return form.validate_json(content) if path.suffix == ".json" else form.validate_python(yaml.safe_load(content))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValidationError as error:
        problem = error.errors()[0]
        reason = f"{'.'.join(str(part) for part in problem['loc']) or 'the file'}: {problem['msg']}"
    # A date with month 13 raises a ValueError in the YAML reader.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = first_line(error)
    raise ArtifactError(
        f"{path}: cannot be read ({reason}). The step wrote its inputs or results to this file."
        " Copy the whole file from its origin, or rerun the step with `--overwrite`."
    )
