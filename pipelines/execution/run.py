"""Runs steps: resolves inputs, decides whether a step is new, resumable, done or changed, and calls its stage.

For each kind of input, a step reads the artifact of the nearest earlier step that is published; a stage never
searches for "the latest" anything itself. Missing inputs that spoil a result are reported before a long step starts:
a policy to start from, safety labels for a gate. The stage publishes its artifact; this module binds the step to its
fingerprint and locks it before anything is loaded, and writes the run's index afterwards. A finished, unchanged step
costs only a few digests: neither stage code nor torch is imported for it.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import sft
from llamachat import distributed
from llamachat.config.loading import from_plain, merged, texts_in, to_yaml
from llamachat.config.sections import DataSource
from llamachat.data.files import read_rows
from llamachat.data.loading import parse_rows
from llamachat.data.records import Preference
from llamachat.errors import (
    ArtifactError,
    ChangedError,
    ConfigError,
    DataError,
    LlamachatError,
    RewardFunctionError,
    TokenizerError,
    UsageError,
)
from llamachat.runs.artifacts import (
    MANIFEST,
    Artifact,
    StepFolder,
    begun_code,
    check_content,
    is_published,
    read_artifact,
)
from llamachat.runs.atomic import remove_tree, storage_errors, write_text
from llamachat.runs.code import changed_code, code_of
from llamachat.runs.fingerprints import changed_keys, fingerprint
from llamachat.runs.inputs import StepInputs, Tune
from llamachat.runs.locks import hold
from llamachat.runs.reader import read_summary
from llamachat.runs.state import (
    StepState,
    begin,
    counted,
    find_state,
    lineage,
    may_correct_function,
    overwrite,
    reference,
    renew,
    step_state,
    unbind,
    with_failed_functions,
)
from llamachat.tracking.wandb_run import wandb_places
from pipelines.recipe.recipe import Recipe, RecipeSections, Step, choose_steps, resolve, step_identity
from pipelines.recipe.stages import POLICY, REPORT, Role
from reward.config import Config as RewardConfig
from sft.config import Config as SftConfig

log = logging.getLogger(__name__)

SAFETY = Role("reward_model", "safety")
MOST_ROWS = 5000  # rows of each file that are searched for labels: about a second


@dataclass(frozen=True, slots=True)
class Taken:
    """The artifacts that a step reads, and the words for them in the log."""

    artifacts: Mapping[Role, Artifact] = field(default_factory=dict)
    words: str = ""
    pooled: Mapping[str, Artifact] = field(
        default_factory=dict
    )  # dialogs of earlier steps of the same command, by step
    sft_policy: Artifact | None = None  # of the nearest earlier sft step: the policy that others are compared with
    surveyed: Mapping[str, Artifact] = field(
        default_factory=dict
    )  # every finished earlier artifact, for a step that surveys them

    @property
    def policy(self) -> Artifact | None:
        """The policy to start from; None means the base itself."""
        return self.artifacts.get(POLICY)

    @property
    def reward_models(self) -> dict[str, Artifact]:
        """The reward models by domain, without those that the recipe does not train."""
        return {role.which: artifact for role, artifact in self.artifacts.items() if role.which}

    @property
    def by_key(self) -> dict[str, Artifact]:
        """The same artifacts under the names that a step's identity uses."""
        dialogs = {f"dialogs/{step}": artifact for step, artifact in self.pooled.items()}
        surveyed = {f"{artifact.manifest.kind}/{step}": artifact for step, artifact in self.surveyed.items()}
        return {role.key: artifact for role, artifact in self.artifacts.items()} | dialogs | surveyed


@dataclass(frozen=True, slots=True)
class Work:
    """One step with its inputs, identity and fingerprint."""

    step: Step
    folder: StepFolder
    taken: Taken
    identity: dict[str, Any]
    fingerprint: str


def find_work(recipe: Recipe, step: Step, elsewhere: Mapping[str, StepFolder] | None = None) -> Work:
    """The step with the inputs that it would have if it ran now; `elsewhere` as in `take_inputs`."""
    taken = take_inputs(recipe, step, elsewhere)
    folder = recipe.folder(step)
    identity = with_failed_functions(folder, step_identity(recipe, step, taken.by_key))
    return Work(step, folder, taken, identity, fingerprint(identity))


def take_inputs(recipe: Recipe, step: Step, elsewhere: Mapping[str, StepFolder] | None = None) -> Taken:
    """The inputs of a step; raises an ArtifactError that names the command to run if an input is not finished.

    `elsewhere` maps names to finished steps of another run that this run is about to take by reference.
    """
    places = [
        (earlier, (elsewhere or {}).get(earlier.name) or recipe.folder(earlier)) for earlier in recipe.before(step)
    ]
    finished = {earlier.name: (earlier, folder) for earlier, folder in places if is_published(folder)}
    artifacts: dict[Role, Artifact] = {}
    words: list[str] = []
    for role, makers in recipe.makers(step).items():
        if makers:
            maker, note = _nearest(recipe, step, role, makers, finished)
            folder = finished[maker.name][1]
            artifacts[role] = read_artifact(folder.artifact, role.kind, reader=step.name)
            words.append(f"{role} of '{maker.name}' ({folder.artifact}{note})")
        elif role == POLICY and recipe.base.policy:
            artifacts[role] = read_artifact(Path(recipe.base.policy), "policy", reader=step.name)
            words.append(f"policy {artifacts[role].path}")
        elif role == POLICY:
            words.append(f"base {recipe.base.model}")
    pooled = {
        name: read_artifact(folder.dialogs, "dialogs", reader=step.name)
        for name, (earlier, folder) in finished.items()
        if step.stage.pools and earlier.stage is step.stage
    }
    if pooled:
        words.append(f"dialogs of {', '.join(map(repr, pooled))}")
    tuned = [folder for earlier, folder in finished.values() if earlier.stage.command == "sft"]
    sft_policy = read_artifact(tuned[-1].artifact, "policy", reader=step.name) if tuned else None
    surveyed: dict[str, Artifact] = {}
    if step.stage.surveys:
        read = {name: read_artifact(folder.artifact, reader=step.name) for name, (_, folder) in finished.items()}
        surveyed = {name: one for name, one in read.items() if one.manifest.kind in step.stage.surveys}
        if not surveyed:
            raise ArtifactError(
                f"{recipe.run.dir}: '{step.name}' reads finished steps, and no step before it is finished. Run `make"
                f" {recipe.steps[0].stage.command}` with the same CONFIG and ARGS first, or `make all`."
            )
        words.append(f"all of {', '.join(map(repr, surveyed))}")
    return Taken(artifacts, ", ".join(words), pooled, sft_policy, surveyed)


def _nearest(
    recipe: Recipe, step: Step, role: Role, makers: Sequence[Step], finished: Collection[str]
) -> tuple[Step, str]:
    """The nearest earlier step that is finished, and a note on nearer ones that are not."""
    for index, maker in enumerate(makers):
        if maker.name in finished:
            skipped = ", ".join(other.name for other in makers[:index])
            return maker, f"; not finished: {skipped}" if skipped else ""
    raise ArtifactError(
        f"{recipe.run.dir}: '{step.name}' reads a {role}, and no earlier step that makes one is finished"
        f" ({', '.join(other.name for other in reversed(makers))}). Run `make {makers[-1].stage.command}` with the same"
        f" CONFIG and ARGS first, or `make all`."
    )


def stage_inputs(recipe: Recipe, work: Work, deadline: float | None = None) -> StepInputs:
    """Everything that the step's stage may read in addition to its own section."""
    step, taken = work.step, work.taken
    which: Any = step.product.makes.which  # one of the three reward models, or None; the stage's products define it
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
        scoring=step.scoring,
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
    """A function for supervised tuning on the dialogs that a step has made, in the step's folder."""

    def tune(
        dialogs: Artifact, *, over: Mapping[str, Any], from_base: bool = False, sft_share: float = 0.0
    ) -> Artifact:
        tuned, deadline = inputs.folder.tuned, inputs.deadline
        if (tuned / MANIFEST).is_file():
            return read_artifact(tuned, "policy", reader=inputs.step)
        if deadline is not None and distributed.broadcast_object(time.monotonic() > deadline):
            deadline = None  # otherwise the samples drawn before the deadline would be trained on for no step at all
        policy = None if from_base else inputs.policy
        of_dialogs = replace(inputs, deadline=deadline, policy=policy, dialogs=dialogs, sft_share=sft_share)
        return sft.run(tuning_section(recipe, over), of_dialogs)

    return tune


def tuning_section(recipe: Recipe, over: Mapping[str, Any]) -> SftConfig:
    """The section sft, overridden by the step's own section."""
    return from_plain(SftConfig, merged(recipe.sections.sft.model_dump(mode="json"), over))


# -- missing inputs


def lacks_policy(recipe: Recipe, step: Step) -> str | None:
    """The warning for a step that should start from a tuned policy but starts from the base; None if there is none."""
    if step.stage.starts_from_base or recipe.base.policy or recipe.makers(step).get(POLICY, [step]):
        return None
    return (
        f"no step before '{step.name}' makes a policy, so it starts from base.model itself. This suits a chat model, not"
        " a pretrained one. Put sft before it, or name a policy in base.policy."
    )


def lacks_labels(recipe: Recipe, step: Step) -> str | None:
    """The warning for a step whose gate will be refused because the safety model learns no labels; None if there is
    none."""
    maker = gate_model(recipe, step)
    if maker is None:
        return None
    assert isinstance(maker.config, RewardConfig)
    gate = f"scoring.combine: llama2_gate will be refused in '{step.name}': the safety model of '{maker.name}'"
    other = "or combine scores without a gate: scoring.combine=weighted or single."
    if maker.config.safety_auxiliary_weight == 0:
        return (
            f"{gate} learns from no safety labels, since reward.safety_auxiliary_weight is 0. Its score then says which"
            f" answer is safer, not whether an answer is safe. Raise the weight, {other}"
        )
    data = recipe.data
    if data.labels or not all(map(_is_unlabelled, (*data.safety, *data.helpfulness, *data.open))):
        return None
    return (
        f"{gate} finds no safety labels in its data (data.labels is empty, and so are chosen_is_safe and rejected_is_safe in"
        f" the first {MOST_ROWS} rows of each set of pairs). Its score then says which answer is safer, not whether an answer"
        f" is safe. Add labels, {other}"
    )


def gate_model(recipe: Recipe, step: Step) -> Step | None:
    """The step that trains the safety model of this step's gate; None if there is no gate or no such step."""
    if "scoring" not in step.stage.shared or step.scoring.combine != "llama2_gate" or step.scoring.safety:
        return None
    makers = recipe.makers(step).get(SAFETY)
    return makers[0] if makers else None


def _is_unlabelled(source: DataSource) -> bool:
    """Whether a local file has pairs but no label; a set that is not local may have labels."""
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
        return False  # reported where the file is read
    return has_pairs


def other_code(work: Work, recorded: Mapping[str, str], *, is_begun: bool = False) -> str | None:
    """The warning for a step that was made or begun by a different version of the code; None if that is not known."""
    changed = changed_code(recorded)
    if not changed:
        return None
    step = work.step
    named = f"{', '.join(changed[:3])}{f' and {len(changed) - 3} more' if len(changed) > 3 else ''}"
    only = f" --only {step.product.makes.which}" if step.stage.models else ""
    if is_begun:
        warning = (
            f"'{step.name}' was begun by other code: since then {named} changed. It resumes with the current code."
        )
    else:
        warning = f"'{step.name}' was made by other code: since then {named} changed. Its result stays, and later steps read it."
    return f"{warning} To rerun it from its start, add `--overwrite{only}` to the command `{step.stage.command}`."


# -- running


Result = TypeVar("Result")

LET_SPEAK_S = 5.0
# The error texts of gloo and of NCCL when the peer process is gone.
_OTHERS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@dataclass(frozen=True, slots=True)
class Ran:
    """The result of one command."""

    artifacts: list[Artifact]  # of the finished steps
    num_worked: int  # steps that did work; the others were done before, or unchanged in the parent run
    left: tuple[str, ...]  # steps that were not started because run.max_hours were over


@dataclass(slots=True)
class Command:
    """The steps of one command, and its progress."""

    recipe: Recipe
    should_overwrite: bool
    deadline: float | None  # by time.monotonic(): the end of run.max_hours
    artifacts: list[Artifact] = field(default_factory=list)
    num_worked: int = 0
    left: list[str] = field(default_factory=list)

    def is_left(self, step: Step) -> bool:
        """Whether the step is not started because the hours are over; the first one always runs, so that there is
        progress."""
        is_over = self.deadline is not None and self.num_worked > 0 and time.monotonic() > self.deadline
        if not is_over:
            return False
        is_done = is_published(self.recipe.folder(step))
        makers = [of for of in self.recipe.makers(step).values() if of]  # empty if no step of a kind is finished
        lacks_inputs = any(not any(is_published(self.recipe.folder(maker)) for maker in of) for of in makers)
        trains = step.product.makes.kind in ("policy", "reward_model")
        # A step that reads a step not started cannot run either. Steps that only survey finished ones run now.
        is_left = bool(self.left or not is_done) and (trains or lacks_inputs)
        if is_left and not is_done:
            self.left.append(step.name)
        return is_left

    def run(self, step: Step) -> None:
        """Run the step in this process unless the hours are over."""
        if not self.is_left(step):
            overwrites, deadline = self.should_overwrite, self.deadline
            artifact, has_worked = run_step(self.recipe, step, should_overwrite=overwrites, deadline=deadline)
            self.artifacts.append(artifact)
            self.num_worked += has_worked

    @property
    def ran(self) -> Ran:
        return Ran(self.artifacts, self.num_worked, tuple(self.left))


def open_command(recipe: Recipe, chosen: Sequence[Step], *, should_overwrite: bool = False) -> Command:
    """Warn about missing inputs, take unchanged earlier steps from the parent run, and start the clock."""
    deadline = None if recipe.run.max_hours is None else time.monotonic() + 3600 * recipe.run.max_hours
    for step in recipe.steps:
        if step in chosen or gate_model(recipe, step) in chosen:
            warning = lacks_labels(recipe, step)
            if warning:
                log.warning("warning: %s", warning)
    if not should_overwrite:
        _adopt_earlier(recipe, chosen)
    return Command(recipe, should_overwrite, deadline)


def run(recipe: Recipe, command: str = "all", *, should_overwrite: bool = False) -> list[Artifact]:
    """Run the steps of one command, or all, as the command line does; returns the artifacts of the finished steps."""
    return run_chosen(recipe, choose_steps(recipe.steps, command), should_overwrite=should_overwrite).artifacts


def run_chosen(recipe: Recipe, chosen: Sequence[Step], *, should_overwrite: bool = False) -> Ran:
    """Run these steps of the recipe in their order, in this process.

    When `run.max_hours` are over, no further training step starts.
    """
    command = open_command(recipe, chosen, should_overwrite=should_overwrite)
    for step in chosen:
        command.run(step)
    return command.ran


def run_step(
    recipe: Recipe, step: Step, *, should_overwrite: bool = False, deadline: float | None = None
) -> tuple[Artifact, bool]:
    """Run one step to its end unless it is done, or unchanged in the parent run; returns its artifact, and whether it
    ran.

    The stage ends early at `deadline`, a time of time.monotonic().
    """
    work = find_work(recipe, step)
    folder = work.folder
    if should_overwrite:
        _check_inputs_stay(recipe, folder)
        overwrite(folder)
        work = find_work(recipe, step)  # the remains of failed work in the folder are gone
    else:
        artifact = finished(recipe, work)
        if artifact is not None:
            return artifact, False
    with hold(folder):
        # Check again under the lock: another command may have finished the step in the meantime.
        state = step_state(folder, work.fingerprint, work.identity)
        if state is not StepState.DONE:
            warning = lacks_policy(recipe, step)
            if warning:
                log.warning("warning: %s", warning)
            return _run(recipe, work, deadline, is_begun=state is StepState.RESUME), True
    return _done_already(recipe, work), False


def finished(recipe: Recipe, work: Work) -> Artifact | None:
    """The artifact of a step that is done here, or is unchanged in the parent run and then taken from it."""
    if adopt(recipe, work):
        lineage(Path(recipe.run.dir))
        return _of_known_code(work, read_artifact(work.folder.artifact))
    return _done_already(recipe, work) if _state(work) is StepState.DONE else None


def _done_already(recipe: Recipe, work: Work) -> Artifact:
    folder = work.folder
    where = f"{folder.path} -> {folder.path.resolve()}" if folder.path.is_symlink() else f"{folder.artifact}"
    log.info("%s: done already (%s), nothing to do", work.step.name, where)
    lineage(Path(recipe.run.dir))
    return _of_known_code(work, read_artifact(folder.artifact))


def _of_known_code(work: Work, artifact: Artifact) -> Artifact:
    """The finished step, with a warning if it was made by other code."""
    if warning := other_code(work, artifact.manifest.code):
        log.warning("warning: %s", warning)
    return artifact


def stage_code(step: Step) -> dict[str, str]:
    """The digests of the code that makes a step: of its stage, and of supervised tuning if that is part of it."""
    return code_of([step.stage.package.__name__, *(["sft"] if step.stage.tunes else [])])


def _check_inputs_stay(recipe: Recipe, folder: StepFolder) -> None:
    """Raise a UsageError if deleting a step's folder would delete data, a base, a policy or a model of the recipe."""
    if folder.path.is_symlink():
        return  # only the link is deleted
    doomed = folder.path.resolve()
    scoring = [step.scoring.model_dump(mode="json") for step in recipe.steps]
    for text in texts_in([recipe.sections.model_dump(mode="json", include={"data", "base"}), *scoring]):
        place = Path(text).resolve() if "\n" not in text else Path()
        if doomed in (place, *place.parents):
            raise UsageError(
                f"--overwrite: {folder.path} contains '{text}', which the recipe reads. Rerunning a step deletes its folder"
                " first. Move the input out of the folder, and set its new path in the recipe."
            )


def _state(work: Work) -> StepState:
    """What there is to do. A step that surveys others is rerun when they change: nothing depends on it."""
    try:
        return step_state(work.folder, work.fingerprint, work.identity)
    except ChangedError:
        if not work.step.stage.surveys:
            raise
        log.info("%s: rerun, since the steps that it reads have changed", work.step.name)
        renew(work.folder)
        return StepState.NEW


def _run(recipe: Recipe, work: Work, deadline: float | None, *, is_begun: bool) -> Artifact:
    name, folder = work.step.name, work.folder
    begin(
        folder,
        name,
        fingerprint=work.fingerprint,
        identity=work.identity,
        resolved=to_yaml(recipe.sections),
        keeps_sampling=bool(work.step.stage.surveys),
        code=stage_code(work.step),
    )
    log.info("%s: from %s, into %s", name, work.taken.words, folder.path)
    if work.step.product.makes != REPORT:  # which only reads figures
        for artifact in {one.path: one for one in work.taken.by_key.values()}.values():
            check_content(artifact)
    if is_begun:
        log.info("%s: resumes from %s", name, find_state(folder))
        if warning := other_code(work, begun_code(folder), is_begun=True):
            log.warning("warning: %s", warning)
    is_shared = work.step.product.makes != REPORT  # which is too little work to share
    if is_shared:
        distributed.broadcast_object(cast("_Begun | None", (recipe.sections, name, deadline)))
    try:
        with counted(folder), nullcontext() if is_shared else distributed.alone():
            artifact = work.step.stage.package.run(work.step.config, stage_inputs(recipe, work, deadline))
    except (ConfigError, DataError, TokenizerError):
        unbind(folder)  # fixing it changes the recipe or the data, and a step that has begun would refuse the change
        raise
    except RewardFunctionError:
        may_correct_function(folder)
        raise
    lineage(Path(recipe.run.dir))
    if not recipe.run.keep_checkpoints:
        with storage_errors(folder.checkpoints):
            remove_tree(folder.checkpoints)
    log.info("%s: done (%s)", name, artifact.path)
    if folder.curves.is_file():
        log.info("%s: curves: %s", name, folder.curves)
    for place in wandb_places(folder, Path(recipe.run.dir).parent):
        log.info("%s: wandb: %s", name, place)
    return artifact


# What the first process sends to the others when it begins a step: sections, the step's name, deadline.
_Begun = tuple[RecipeSections, str, float | None]


def lead(work: Callable[[], Result]) -> Result | None:
    """The result of `work()` in the first process; the others help with each step that it begins, and return None."""
    with distributed.opened():
        if distributed.is_first():
            result = work()
            distributed.broadcast_object(cast("_Begun | None", None))
            return result
        with _second_to_the_first():
            while (begun := distributed.broadcast_object(cast("_Begun | None", None))) is not None:
                recipe, (_, name, deadline) = resolve(begun[0]), begun
                work_here = find_work(recipe, recipe.step(name))
                work_here.step.stage.package.run(work_here.step.config, stage_inputs(recipe, work_here, deadline))
        return None


@contextmanager
def _second_to_the_first() -> Iterator[None]:
    """Let the first process report an error that all processes have: the first process to exit ends all of them, and
    it should be the one that reports the error and leaves the step as it was."""
    try:
        yield
    except LlamachatError:
        time.sleep(LET_SPEAK_S)
        raise
    except RuntimeError as error:
        if not any(words in str(error) for words in _OTHERS_GONE):
            raise
        raise SystemExit(1) from None  # another process has ended and has said why


def adopt(recipe: Recipe, work: Work) -> bool:
    """Take the step from `run.parent` by reference if it is finished there with the same fingerprint."""
    parent = parent_folder(recipe, work)
    if parent is None:
        return False
    manifest = read_artifact(parent.artifact).manifest
    if manifest.fingerprint != work.fingerprint:
        changes = "; ".join(changed_keys(manifest.identity, work.identity))
        log.info("%s: not taken from %s, since it changed (%s)", work.step.name, parent.path, changes)
        return False
    reference(work.folder, parent)
    log.info("%s: unchanged, taken from %s", work.step.name, parent.path)
    return True


def _adopt_earlier(recipe: Recipe, chosen: Sequence[Step]) -> None:
    """Also take the unchanged inputs of the chosen steps from `run.parent`, as in the plan."""
    before = max((recipe.before(step) for step in chosen), key=len)
    for step in [step for step in before if step not in chosen and not step.stage.surveys]:
        folder = recipe.folder(step)
        if recipe.run.parent is None or is_published(folder) or folder.identity.exists():
            continue
        try:
            adopt(recipe, find_work(recipe, step))
        except LlamachatError:
            continue  # its inputs are not there either; the step that needs it reports that


def parent_folder(recipe: Recipe, work: Work) -> StepFolder | None:
    """The step's finished folder in the parent run, if the step has not begun in this run."""
    if recipe.run.parent is None or work.folder.path.is_symlink() or work.folder.identity.exists():
        return None
    parent = StepFolder(Path(recipe.run.parent) / work.step.name)
    return parent if is_published(parent) and not is_published(work.folder) else None


def write_reports(recipe: Recipe, chosen: Sequence[Step]) -> str:
    """Write `<run.dir>/rm/tables.md` if reward models are among the chosen steps, and return its text.

    It shows every finished reward model of the chosen steps' group, whether `--only` names it or not.
    """
    texts = []
    for folder in dict.fromkeys(_folder(step) for step in chosen if step.product.makes.kind == "reward_model"):
        from reward.presentation import markdown

        places = {step.product.makes.which: recipe.folder(step) for step in recipe.steps if _folder(step) == folder}
        summaries: dict[Any, dict[str, float]] = {
            which: read_summary(place) for which, place in places.items() if is_published(place)
        }
        details = {which: read_artifact(places[which].path, "reward_model").manifest.details for which in summaries}
        verdicts = {which: of["probe"]["verdict"] for which, of in details.items() if "probe" in of}
        texts.append(markdown(summaries, verdicts))
        write_text(Path(recipe.run.dir) / folder / "tables.md", texts[-1])
    return "\n".join(texts)


def _folder(step: Step) -> str:
    return step.name.rpartition("/")[0]
