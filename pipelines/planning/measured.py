"""What finished steps of a run, or of its parent, say of the steps to come: how long answers are, how long work takes."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llamachat.config.sections import Run
from llamachat.errors import LlamachatError
from llamachat.memory.estimates import Estimate
from llamachat.runs.artifacts import is_published
from llamachat.runs.cost import read_cost
from llamachat.runs.folder import StepFolder
from pipelines.execution.resolve import earlier_makers
from pipelines.recipe.recipe import Recipe, Step, load, resolve_steps
from pipelines.recipe.stages import POLICY

if TYPE_CHECKING:
    from collections.abc import Callable

    EstimateOf = Callable[[Recipe, Step], Estimate | None]


def answer_tokens(recipe: Recipe, step: Step) -> tuple[float, str] | None:
    """Mean tokens of an answer of the nearest earlier policy that measured its own, and whose they are."""
    for maker in earlier_makers(resolve_steps(recipe), step).get(POLICY, ()):
        keys = (f"{maker.stage.command}/test/final/response_tokens", "sft/answer_tokens")
        for folder in _folders(recipe, maker):
            figures = _summary(folder)
            found = next((figures[key] for key in keys if key in figures), None)
            if isinstance(found, int | float) and found > 0:
                return float(found), f"'{maker.name}'"
    return None


def timed(recipe: Recipe, step: Step, estimate: Estimate, estimate_of: "EstimateOf") -> Estimate:
    """The estimate with the seconds of the finished step of that name, in proportion where it was told otherwise.

    `estimate_of` says what such a step is estimated at, when nothing is known of any; only a step on the same base and
    card counts.
    """
    for folder in _folders(recipe, step):
        cost = read_cost(folder) if is_published(folder) else None
        before = _earlier(folder, step.name, recipe.run) if cost else None
        if cost is None or before is None:
            continue
        past, same = before
        if past.base.model != recipe.base.model:
            continue
        then = estimate_of(past, same)
        if then is None or not then.seconds or not estimate.seconds:
            continue
        seconds = cost.seconds * estimate.seconds / then.seconds
        share = seconds / cost.seconds
        told = f"measured: {cost.seconds:.0f} s in {folder.path}" + (
            "" if 0.99 < share < 1.01 else f", times {share:.2g}"
        )
        return replace(estimate, seconds=seconds, assumed=f"({told})")
    return estimate


def _folders(recipe: Recipe, step: Step) -> Iterator[StepFolder]:
    """Where the step has worked: in the run, then in its parent."""
    for run in (recipe.run.dir, recipe.run.parent):
        if run is not None:
            yield StepFolder(Path(run) / step.name)


def _summary(folder: StepFolder) -> dict[str, object]:
    try:
        return json.loads(folder.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _earlier(folder: StepFolder, name: str, run: Run) -> tuple[Recipe, Step] | None:
    """The recipe that a step was made by, and the step in it; None on another card, or where it cannot be read any more."""
    try:
        past = load(folder.config)
        if past.run.gpu != run.gpu:
            return None
        past = past.model_copy(update={"run": run})  # answers are as long for both
        return past, next(step for step in resolve_steps(past) if step.name == name)
    except (LlamachatError, OSError, StopIteration):
        return None
