"""What a run folder holds, as plain values: its steps with their identities, recipes and final figures.

Reads the small files alone, so a run whose weights were thrown away can still be told about, and one that is going on,
too. A step that is there by reference (a link) reads like any other.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamachat.errors import ArtifactError, UsageError, first_line
from llamachat.runs.artifacts import MANIFEST, NOT_STEPS
from llamachat.runs.atomic import INCOMING
from llamachat.runs.folder import StepFolder

_SIGNS = ("identity.json", "metrics.jsonl", "summary.json", f"artifact/{MANIFEST}")


@dataclass(frozen=True, slots=True)
class StepContents:
    """One step of a run; what it has not written is empty."""

    name: str
    folder: StepFolder
    recipe: dict[str, Any]
    identity: dict[str, Any]
    manifest: dict[str, Any]
    summary: dict[str, float]

    @property
    def command(self) -> str:
        """The command that makes such a step: 'rm' of 'rm/safety'."""
        return str(self.identity.get("command", self.name.partition("/")[0]))

    @property
    def is_finished(self) -> bool:
        return bool(self.manifest)

    @property
    def has_figures(self) -> bool:
        """Whether anything came out yet; a step that was only begun, or a report on the others, has none."""
        return self.is_finished or bool(self.summary) or self.folder.metrics.is_file()


def read_run(run: Path) -> dict[str, StepContents]:
    """The steps of a run that have figures by name, in the order in which they were finished; those that are not come last."""
    _check_is_run(run)
    folders = {
        path.relative_to(run).as_posix().removesuffix(f"/{sign}")
        for sign in _SIGNS
        for pattern in ("*", "*/*")
        for path in run.glob(f"{pattern}/{sign}")
    }
    names = [name for name in sorted(folders) if not any(_is_no_step(part) for part in Path(name).parts)]
    steps = [step for step in (read_step(run, name) for name in names) if step.has_figures]
    if not steps:
        raise UsageError(
            f"{run}: no steps here. A run folder holds a folder for each step, such as 'sft' with its summary.json."
            " Name one that a step was run in (run.dir of its recipe)."
        )
    for step in steps:
        _check_name(run, step)
    order = sorted(steps, key=lambda step: (not step.is_finished, str(step.manifest.get("created", "")), step.name))
    return {step.name: step for step in order}


def read_step(run: Path, name: str) -> StepContents:
    """One step of a run; ArtifactError for a file that is there and broken."""
    folder = StepFolder(run / name)
    manifest = _mapping(folder.artifact / MANIFEST)
    identity = manifest.get("identity") or _mapping(folder.identity).get("identity")
    return StepContents(
        name=name,
        folder=folder,
        recipe=_recipe(folder.config),
        identity=identity if isinstance(identity, dict) else {},
        manifest=manifest,
        summary=_figures(folder.summary),
    )


def _check_is_run(run: Path) -> None:
    if not run.is_dir():
        raise UsageError(
            f"{run}: no such folder. A run folder is where the steps of a recipe lie, such as runs/tiny. Correct the path."
        )
    if any((run / sign).is_file() for sign in _SIGNS):
        raise UsageError(
            f"{run}: is the folder of a step, not of a run. A run folder holds a folder for each step. Name the run"
            f" that it is a part of, such as {run.parent}."
        )


def _check_name(run: Path, step: StepContents) -> None:
    """What lies one folder deeper than it should is a run among others."""
    said = step.identity.get("step", step.name)
    if said != step.name:
        raise UsageError(
            f"{run}: is no run folder, since '{step.name}' holds the step '{said}'. A run folder holds '{said}' itself."
            f" Name one run, such as {step.folder.path.as_posix().removesuffix(f'/{said}')}."
        )


def _is_no_step(part: str) -> bool:
    return part in NOT_STEPS or part.startswith((".", INCOMING))


def _figures(path: Path) -> dict[str, float]:
    values = _mapping(path)
    wrong = [name for name, value in values.items() if not isinstance(value, int | float | None)]
    if wrong:
        raise _broken(path, f"'{wrong[0]}' is not a number")
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise _broken(path, str(error)) from error
    if not isinstance(values, dict):
        raise _broken(path, f"holds a {type(values).__name__}, not an object")
    return values


def _recipe(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _broken(path, first_line(error)) from error
    if not isinstance(values, dict):
        raise _broken(path, "holds no keys")
    return values


def _broken(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        f"{path}: cannot be understood ({found}). It says what a step was made with or what came out, as the step wrote"
        " it. Copy it whole from where it came from, or make the step again with `--overwrite`."
    )
