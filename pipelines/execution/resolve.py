"""Which artifacts a step takes: of each kind that it reads, the nearest earlier step's that is published.

A stage is handed what is found here; it never looks for "the latest" anything itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamachat.errors import ArtifactError
from llamachat.runs.artifacts import Artifact, is_published, read_artifact
from llamachat.runs.folder import StepFolder
from pipelines.recipe.recipe import Recipe, Step
from pipelines.recipe.stages import POLICY, Role


@dataclass(frozen=True, slots=True)
class Taken:
    """What a step reads, and how the log says so."""

    artifacts: Mapping[Role, Artifact] = field(default_factory=dict)
    words: str = ""
    pooled: Mapping[str, Artifact] = field(default_factory=dict)  # dialogs of earlier steps of the command, by step
    sft_policy: Artifact | None = None  # of the nearest earlier sft step: what others are compared with
    surveyed: Mapping[str, Artifact] = field(default_factory=dict)  # all that is finished before a step that surveys

    @property
    def policy(self) -> Artifact | None:
        """The policy to start from; None is the base itself."""
        return self.artifacts.get(POLICY)

    @property
    def reward_models(self) -> dict[str, Artifact]:
        """The reward models by what they judge; one that the recipe does not train is not among them."""
        return {role.which: artifact for role, artifact in self.artifacts.items() if role.which}

    @property
    def by_key(self) -> dict[str, Artifact]:
        """The same under the names that an identity gives them."""
        dialogs = {f"dialogs/{step}": artifact for step, artifact in self.pooled.items()}
        surveyed = {f"{artifact.manifest.kind}/{step}": artifact for step, artifact in self.surveyed.items()}
        return {role.key: artifact for role, artifact in self.artifacts.items()} | dialogs | surveyed


def take_inputs(recipe: Recipe, step: Step, elsewhere: Mapping[str, StepFolder] | None = None) -> Taken:
    """The inputs of a step; ArtifactError that names the command to run when none that makes one of them is finished.

    `elsewhere` holds, by name, finished steps of another run that this run is about to take by reference.
    """
    artifacts: dict[Role, Artifact] = {}
    words: list[str] = []
    for role, makers in recipe.makers(step).items():
        if makers:
            artifacts[role], told = _take(recipe, step, role, makers, elsewhere or {})
            words.append(told)
        elif role == POLICY and recipe.base.policy:
            artifacts[role] = read_artifact(Path(recipe.base.policy), "policy", reader=step.name)
            words.append(f"policy {artifacts[role].path}")
        elif role == POLICY:
            words.append(f"base {recipe.base.model}")
    pooled = {
        earlier.name: read_artifact(folder.dialogs, "dialogs", reader=step.name)
        for earlier, folder in _finished_before(recipe, step, elsewhere or {})
        if step.stage.pools and earlier.stage is step.stage
    }
    if pooled:
        words.append(f"dialogs of {', '.join(repr(name) for name in pooled)}")
    tuned = [
        folder for earlier, folder in _finished_before(recipe, step, elsewhere or {}) if earlier.stage.command == "sft"
    ]
    sft_policy = read_artifact(tuned[-1].artifact, "policy", reader=step.name) if tuned else None
    surveyed = _surveyed(recipe, step, elsewhere or {})
    if surveyed:
        words.append(f"all of {', '.join(repr(name) for name in surveyed)}")
    return Taken(artifacts, ", ".join(words), pooled, sft_policy, surveyed)


def _surveyed(recipe: Recipe, step: Step, elsewhere: Mapping[str, StepFolder]) -> dict[str, Artifact]:
    """What is finished before a step that surveys, by step, in the order of the recipe."""
    if not step.stage.surveys:
        return {}
    found = {
        earlier.name: read_artifact(folder.artifact, reader=step.name)
        for earlier, folder in _finished_before(recipe, step, elsewhere)
    }
    found = {name: artifact for name, artifact in found.items() if artifact.manifest.kind in step.stage.surveys}
    if not found:
        raise ArtifactError(
            f"{recipe.run.dir}: '{step.name}' is about finished steps, and none before it is finished. Run `make"
            f" {recipe.steps[0].stage.command}` with the same CONFIG and ARGS first, or `make all`."
        )
    return found


def _finished_before(recipe: Recipe, step: Step, elsewhere: Mapping[str, StepFolder]) -> list[tuple[Step, StepFolder]]:
    """The finished steps before this one, in order, and where they lie."""
    places = [(earlier, elsewhere.get(earlier.name) or recipe.folder(earlier)) for earlier in recipe.before(step)]
    return [(earlier, folder) for earlier, folder in places if is_published(folder)]


def _take(
    recipe: Recipe, step: Step, role: Role, makers: Sequence[Step], elsewhere: Mapping[str, StepFolder]
) -> tuple[Artifact, str]:
    for index, maker in enumerate(makers):
        folder = elsewhere.get(maker.name) or recipe.folder(maker)
        if is_published(folder):
            skipped = makers[:index]
            note = f"; not finished: {', '.join(other.name for other in skipped)}" if skipped else ""
            artifact = read_artifact(folder.artifact, role.kind, reader=step.name)
            return artifact, f"{role} of '{maker.name}' ({folder.artifact}{note})"
    raise ArtifactError(
        f"{recipe.run.dir}: '{step.name}' reads a {role}, and none of the steps before it that make one is finished"
        f" ({', '.join(other.name for other in reversed(makers))}). Run `make {makers[-1].stage.command}` with the same"
        f" CONFIG and ARGS first, or `make all`."
    )


def lacks_policy(recipe: Recipe, step: Step) -> str | None:
    """What to say where a step that belongs after supervised tuning starts from the base."""
    if step.stage.starts_from_base or recipe.base.policy or recipe.makers(step).get(POLICY, [step]):
        return None
    return (
        f"no step before '{step.name}' makes a policy, so it starts from base.model itself: sound for a chat model, poor"
        " for a pretrained one. Put sft before it, or name a policy in base.policy."
    )
