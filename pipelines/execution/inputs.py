"""The inputs of a step: of each kind that it reads, the artifact of the nearest earlier step that is published.

A stage is given what is resolved here; it never looks for "the latest" anything itself. What the inputs lack for a good
result is said before the hours that a step takes: a policy to start from, safety labels for a gate.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import sft
from llamachat import distributed
from llamachat.config.loading import from_plain, merged
from llamachat.config.sections import DataSource
from llamachat.data.files import read_rows
from llamachat.data.loading import parse_rows
from llamachat.data.records import Preference
from llamachat.errors import ArtifactError, DataError
from llamachat.runs.artifacts import MANIFEST, Artifact, is_published, read_artifact
from llamachat.runs.fingerprints import fingerprint
from llamachat.runs.folder import StepFolder
from llamachat.runs.inputs import StepInputs, Tune
from pipelines.recipe.identity import step_identity
from pipelines.recipe.recipe import Recipe, Step
from pipelines.recipe.stages import POLICY, Role
from reward.config import Config as RewardConfig
from sft.config import Config as SftConfig

SAFETY = Role("reward_model", "safety")
MOST_ROWS = 5000  # looked into of each file: about a second


@dataclass(frozen=True, slots=True)
class Taken:
    """The artifacts that a step reads, and how the log names them."""

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


@dataclass(frozen=True, slots=True)
class Work:
    """One step with its inputs, its identity and its fingerprint."""

    step: Step
    folder: StepFolder
    taken: Taken
    identity: dict[str, Any]
    fingerprint: str


def find_work(recipe: Recipe, step: Step, elsewhere: Mapping[str, StepFolder] | None = None) -> Work:
    """What running the step would mean now; `elsewhere` as in `take_inputs`."""
    taken = take_inputs(recipe, step, elsewhere)
    identity = step_identity(recipe, step, taken.by_key)
    return Work(step, recipe.folder(step), taken, identity, fingerprint(identity))


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


def stage_inputs(recipe: Recipe, work: Work, deadline: float | None = None) -> StepInputs:
    """Everything that the step's stage may read besides its own section."""
    step, taken = work.step, work.taken
    which: Any = step.product.makes.which  # one of the three reward models, or None: the stage's products say which
    inputs = StepInputs(
        step=step.name,
        folder=work.folder,
        identity=work.identity,
        fingerprint=work.fingerprint,
        run=recipe.run,
        base=recipe.base,
        tuning=step.tuning,
        data=recipe.data,
        tracking=recipe.sections.tracking,
        rollout=step.rollout,
        scoring=recipe.scoring,
        deadline=deadline,
        policy=taken.policy,
        reward_models=taken.reward_models,
        which=which,
        sft_policy=taken.sft_policy,
        pooled=taken.pooled,
        surveyed=tuple(taken.surveyed.values()),
        recipe=recipe.sections.model_dump(mode="json"),
    )
    return replace(inputs, tune=_tuner(recipe, inputs)) if step.stage.tunes else inputs


def _tuner(recipe: Recipe, inputs: StepInputs) -> Tune:
    """Supervised tuning on the dialogs that a step has made, in the step's folder."""

    def tune(
        dialogs: Artifact, *, over: Mapping[str, Any], from_base: bool = False, sft_share: float = 0.0
    ) -> Artifact:
        tuned, deadline = inputs.folder.tuned, inputs.deadline
        if (tuned / MANIFEST).is_file():
            return read_artifact(tuned, "policy", reader=inputs.step)
        if deadline is not None and distributed.broadcast_object(time.monotonic() > deadline):
            deadline = None  # what was sampled when the command's hours were over is learnt, not one step of it
        policy = None if from_base else inputs.policy
        of_dialogs = replace(inputs, deadline=deadline, policy=policy, dialogs=dialogs, sft_share=sft_share)
        return sft.run(tuning_section(recipe, over), of_dialogs)

    return tune


def tuning_section(recipe: Recipe, over: Mapping[str, Any]) -> SftConfig:
    """The section sft with the values that a step's own section puts over it."""
    return from_plain(SftConfig, merged(recipe.sections.sft.model_dump(mode="json"), over))


# -- what the inputs lack


def lacks_policy(recipe: Recipe, step: Step) -> str | None:
    """What to say where a step that belongs after supervised tuning starts from the base."""
    if step.stage.starts_from_base or recipe.base.policy or recipe.makers(step).get(POLICY, [step]):
        return None
    return (
        f"no step before '{step.name}' makes a policy, so it starts from base.model itself: sound for a chat model, poor"
        " for a pretrained one. Put sft before it, or name a policy in base.policy."
    )


def lacks_labels(recipe: Recipe, step: Step) -> str | None:
    """What to say where this step's gate will be refused, since the safety model before it learns no labels."""
    maker = gate_model(recipe, step)
    if maker is None:
        return None
    assert isinstance(maker.config, RewardConfig)
    gate = f"scoring.combine: llama2_gate will be refused in '{step.name}': the safety model of '{maker.name}'"
    other = "or combine without a gate: scoring.combine=weighted or single."
    if maker.config.safety_auxiliary_weight == 0:
        return (
            f"{gate} learns from no safety labels, since reward.safety_auxiliary_weight is 0, and its score then says which"
            f" answer is safer, not whether one is safe. Raise the weight, {other}"
        )
    data = recipe.data
    if data.labels or not all(map(_is_unlabelled, (*data.safety, *data.helpfulness, *data.open))):
        return None
    return (
        f"{gate} finds no safety labels in its data (data.labels is empty, and so are chosen_is_safe and rejected_is_safe in"
        f" the first {MOST_ROWS} rows of each set of pairs), and its score then says which answer is safer, not whether one"
        f" is safe. Add labels, {other}"
    )


def gate_model(recipe: Recipe, step: Step) -> Step | None:
    """The step that trains the safety model which this step's gate reads; None where there is no gate or no such step."""
    if "scoring" not in step.stage.shared or recipe.scoring.combine != "llama2_gate" or recipe.scoring.safety:
        return None
    makers = recipe.makers(step).get(SAFETY)
    return makers[0] if makers else None


def _is_unlabelled(source: DataSource) -> bool:
    """Whether pairs were found in a file that is here, and no label; a set that is not here may have some."""
    if not Path(source.path).is_file():
        return False
    has_pairs = False
    rows = islice(read_rows(source.path), min(MOST_ROWS, source.limit or MOST_ROWS))
    try:
        for row in parse_rows(rows, path=source.path, kind="preference", format=source.format, columns=source.columns):
            if isinstance(row.record, Preference):
                has_pairs = True
                if (row.record.chosen_is_safe, row.record.rejected_is_safe) != (None, None):
                    return False
    except DataError:
        return False  # told where it is read
    return has_pairs
