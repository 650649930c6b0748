"""What toy steps share: the inputs of a stage, sections of a recipe, files of a step."""

import json
from pathlib import Path
from typing import Any

import yaml

from llamachat.config.sections import Run, Tracking, Tuning
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.inputs import StepInputs
from pipelines.execution.run import find_work, stage_inputs
from pipelines.recipe.recipe import load
from tests.tiny_llama import base_section

SECTIONS: dict[str, dict[str, Any]] = {
    "tuning": {"method": "full"},
    "sft": {"epochs": 1, "learning_rate": 1e-3, "examples_per_step": 8, "sample_prompts": 2},
    "rollout": {"max_new_tokens": 12},
    "tracking": {"mode": "off"},
}
QUIET: dict[str, Any] = {"mode": "off"}
FULL: dict[str, Any] = {"tuning": Tuning()}
SPLIT = {"test": 0.2, "validation": 0.2, "judge": 0.0}


def toy_inputs(
    step: str,
    folder: Path,
    base: Path,
    *,
    run: str = "one",
    base_changes: dict[str, Any],
    tracking: dict[str, Any],
    **sections: Any,
) -> StepInputs:
    """What `pipelines` would hand to a stage for a run in `folder`."""
    place = folder / "runs" / run
    return StepInputs(
        step=step,
        folder=StepFolder(place / step),
        identity={"step": step},
        fingerprint="0" * 64,
        run=Run(dir=str(place), seed=3),
        base=base_section(base, **base_changes),
        tracking=Tracking(**(QUIET | tracking)),
        **(FULL | sections),
    )


def write_values(
    path: Path, base: Path, values: dict[str, dict[str, Any]], /, *, steps: list[Any], **changes: Any
) -> Path:
    """A recipe with these sections; `changes` go over them, key by key."""
    merged = {
        "run": {"dir": str(path.parent / "runs" / path.stem), "seed": 1},
        "base": {"model": str(base), "dtype": "float32"},
        **SECTIONS,
    }
    for source in (values, changes):
        for name, section in source.items():
            merged[name] = merged.get(name, {}) | section
    path.write_text(yaml.safe_dump(merged | {"steps": steps}, sort_keys=False))
    return path


def step_of(recipe: Path, name: str | None = None) -> StepFolder:
    """The folder of a step, the recipe's first one by default."""
    return StepFolder(recipe.parent / "runs" / recipe.stem / (name or _first(recipe)))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary_of(step: StepFolder) -> dict[str, float]:
    return json.loads(step.summary.read_text())


def sampled_in(step: StepFolder) -> list[Any]:
    """The groups of all batches, training side first, as JSON values."""
    paths = sorted(step.sampling.glob("batch-*.json"))
    return [values for path in paths for values in json.loads(path.read_text())["groups"]]


def inputs_of(recipe_path: Path, name: str | None = None, *overrides: str) -> tuple[Any, Any]:
    """The section and the inputs of a step, as `pipelines` hands them to the stage."""
    recipe = load(recipe_path, list(overrides))
    work = find_work(recipe, recipe.step(name or _first(recipe_path)))
    return work.step.config, stage_inputs(recipe, work)


def _first(recipe: Path) -> str:
    first = yaml.safe_load(recipe.read_text())["steps"][0]
    return first if isinstance(first, str) else next(iter(first))
