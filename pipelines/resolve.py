"""Which artifacts a step takes: the nearest earlier step of the recipe that is published, or the base.

A stage is handed what is found here; it never looks for "the latest" anything itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamachat.errors import ArtifactError
from llamachat.runs.artifacts import Artifact, is_published, read_artifact
from llamachat.runs.folder import StepFolder
from pipelines.recipe import Recipe, Step


@dataclass(frozen=True, slots=True)
class Taken:
    """What a step starts from, and how the log says so."""

    policy: Artifact | None  # None: the base itself
    words: str


def step_folder(recipe: Recipe, step: Step) -> StepFolder:
    """Where the step's files lie."""
    return StepFolder(Path(recipe.run.dir) / step.name)


def earlier_policies(steps: Sequence[Step], step: Step) -> list[Step]:
    """The steps before this one that make a policy, nearest first."""
    before = list(steps[: list(steps).index(step)])
    return [earlier for earlier in reversed(before) if earlier.stage.makes_policy]


def take_inputs(
    recipe: Recipe, steps: Sequence[Step], step: Step, elsewhere: Mapping[str, StepFolder] | None = None
) -> Taken:
    """The inputs of a step; ArtifactError that names the command to run when none of them is there.

    `elsewhere` holds, by name, finished steps of another run that this run is about to take by reference.
    """
    earlier = earlier_policies(steps, step)
    for candidate in earlier:
        folder = (elsewhere or {}).get(candidate.name) or step_folder(recipe, candidate)
        if is_published(folder):
            skipped = earlier[: earlier.index(candidate)]
            note = f"; not finished: {', '.join(other.name for other in skipped)}" if skipped else ""
            return Taken(
                read_artifact(folder.artifact, "policy"), f"policy of '{candidate.name}' ({folder.artifact}{note})"
            )
    if earlier:
        first = earlier[-1]
        raise ArtifactError(
            f"{recipe.run.dir}: '{step.name}' starts from a policy, and none of the steps before it is finished"
            f" ({', '.join(other.name for other in reversed(earlier))}). Run `make {first.stage.command}` with the same"
            f" CONFIG and ARGS first, or `make all`."
        )
    if recipe.base.policy:
        artifact = read_artifact(Path(recipe.base.policy), "policy", reader=step.name)
        return Taken(artifact, f"policy {artifact.path}")
    return Taken(None, f"base {recipe.base.model}")
