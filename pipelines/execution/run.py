"""Runs steps: resolves inputs, decides whether a step is new, resumable, done or changed, and calls its stage.

The stage publishes; here the step is bound to its work and locked before anything is loaded, and the run's index is
written after it. A finished, unchanged step costs a few digests: no stage code and no torch is imported for it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from llamachat import distributed
from llamachat.config.loading import to_yaml
from llamachat.errors import ChangedError, ConfigError, DataError, LlamachatError, TokenizerError
from llamachat.runs.artifacts import Artifact, is_published, read_artifact
from llamachat.runs.atomic import write_text
from llamachat.runs.checkpoints import Checkpoint, newest
from llamachat.runs.cost import counted
from llamachat.runs.fingerprints import changed_keys
from llamachat.runs.folder import StepFolder
from llamachat.runs.locks import hold
from llamachat.runs.reader import read_summary
from llamachat.runs.state import StepState, begin, lineage, overwrite, reference, renew, step_state, unbind
from pipelines.execution.inputs import Work, find_work, gate_model, lacks_labels, lacks_policy, stage_inputs
from pipelines.recipe.recipe import Recipe, RecipeSections, Step, resolve
from pipelines.recipe.stages import REPORT

log = logging.getLogger(__name__)

Result = TypeVar("Result")

LET_SPEAK_S = 5.0
# The words of gloo and of NCCL where the process at the other end is no more.
_OTHERS_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of one command."""

    artifacts: list[Artifact]  # of the steps that are done
    num_worked: int  # steps that were worked on; the others were done before, or unchanged in the parent run
    left: tuple[str, ...]  # steps that were not begun, since run.max_hours were over


def run_chosen(recipe: Recipe, chosen: Sequence[Step], *, should_overwrite: bool = False) -> Ran:
    """Run these steps of the recipe, in their order, and tell what was worked on and what is left.

    When `run.max_hours` are over no further step is begun that trains; one is in any case, or nothing would ever be done.
    """
    deadline = None if recipe.run.max_hours is None else time.monotonic() + 3600 * recipe.run.max_hours
    for step in recipe.steps:
        if step in chosen or gate_model(recipe, step) in chosen:
            warning = lacks_labels(recipe, step)
            if warning:
                log.warning("warning: %s", warning)
    if not should_overwrite:
        _adopt_earlier(recipe, chosen)
    artifacts, left, num_worked = list[Artifact](), list[str](), 0
    for step in chosen:
        is_over = deadline is not None and num_worked > 0 and time.monotonic() > deadline
        is_done = is_published(recipe.folder(step))
        # What comes after one that is left may read it; what is told of the finished ones is told now.
        if is_over and (left or not is_done) and (_trains(step) or _lacks_inputs(recipe, step)):
            left += [] if is_done else [step.name]
            continue
        artifact, has_worked = run_step(recipe, step, should_overwrite=should_overwrite, deadline=deadline)
        artifacts.append(artifact)
        num_worked += has_worked
    return Ran(artifacts, num_worked, tuple(left))


def _trains(step: Step) -> bool:
    return step.product.makes.kind in ("policy", "reward_model")


def _lacks_inputs(recipe: Recipe, step: Step) -> bool:
    """Whether of something that it reads nothing is finished."""
    makers = recipe.makers(step).values()
    return any(of and not any(is_published(recipe.folder(maker)) for maker in of) for of in makers)


def run_step(
    recipe: Recipe, step: Step, *, should_overwrite: bool = False, deadline: float | None = None
) -> tuple[Artifact, bool]:
    """Run one step to its end unless it is done already or unchanged in the parent run; its artifact, and whether it ran.

    The stage ends early at `deadline`, by time.monotonic().
    """
    work = find_work(recipe, step)
    folder = work.folder
    if should_overwrite:
        overwrite(folder)
    is_adopted = not should_overwrite and adopt(recipe, work)
    if _state(work) is not StepState.DONE:
        with hold(folder):
            # Asked again under the lock: another command may have finished the step while it held the lock.
            if step_state(folder, work.fingerprint, work.identity) is not StepState.DONE:
                warning = lacks_policy(recipe, step)
                if warning:
                    log.warning("warning: %s", warning)
                return _run(recipe, work, deadline), True
    where = f"{folder.path} -> {folder.path.resolve()}" if folder.path.is_symlink() else f"{folder.artifact}"
    if not is_adopted:
        log.info("%s: done already (%s), nothing to do", step.name, where)
    lineage(Path(recipe.run.dir))
    return read_artifact(folder.artifact), False


def _state(work: Work) -> StepState:
    """What there is to do. What surveys other steps is made anew where they changed: nothing stands on it."""
    try:
        return step_state(work.folder, work.fingerprint, work.identity)
    except ChangedError:
        if not work.step.stage.surveys:
            raise
        log.info("%s: made anew, since what it is about has changed", work.step.name)
        renew(work.folder)
        return StepState.NEW


def _run(recipe: Recipe, work: Work, deadline: float | None) -> Artifact:
    name, folder = work.step.name, work.folder
    is_begun = folder.identity.is_file()
    begin(
        folder,
        name,
        fingerprint=work.fingerprint,
        identity=work.identity,
        resolved=to_yaml(recipe.sections),
        keeps_sampling=bool(work.step.stage.surveys),
    )
    log.info("%s: from %s, into %s", name, work.taken.words, folder.path)
    if is_begun:
        checkpoint = newest(folder.checkpoints)
        where = f"step {checkpoint.step}" if checkpoint else "its beginning: it stopped before its first checkpoint"
        log.info("%s: goes on from %s", name, "what was sampled" if _has_sampled(folder, checkpoint) else where)
    if work.step.product.makes != REPORT:  # which is too little work to share
        distributed.broadcast_object(cast("_Begun | None", _Begun(recipe.sections, name, deadline)))
    try:
        with counted(folder):
            artifact = work.step.stage.package.run(work.step.config, stage_inputs(recipe, work, deadline))
    except (ConfigError, DataError, TokenizerError):
        unbind(folder)  # the mend changes the recipe or the data, which a step that stays begun would refuse
        raise
    lineage(Path(recipe.run.dir))
    log.info("%s: done (%s)", name, artifact.path)
    return artifact


def _has_sampled(folder: StepFolder, checkpoint: Checkpoint | None) -> bool:
    return checkpoint is None and any(folder.sampling.glob("*.json"))


@dataclass(frozen=True, slots=True)
class _Begun:
    """What the first process tells the others when it begins to work on a step."""

    sections: RecipeSections
    step: str
    deadline: float | None


def lead(work: Callable[[], Result]) -> Result | None:
    """`work()` in the first process; the others help with each step that it begins, and have no result."""
    with distributed.opened():
        if distributed.is_first():
            result = work()
            distributed.broadcast_object(cast("_Begun | None", None))
            return result
        with _second_to_the_first():
            while (begun := distributed.broadcast_object(cast("_Begun | None", None))) is not None:
                recipe = resolve(begun.sections)
                work_here = find_work(recipe, recipe.step(begun.step))
                work_here.step.stage.package.run(work_here.step.config, stage_inputs(recipe, work_here, begun.deadline))
        return None


@contextmanager
def _second_to_the_first() -> Iterator[None]:
    """What one process finds wrong the others mostly find too, and the first that ends is the end of all: it should be the
    one that tells people and leaves the step as it was."""
    try:
        yield
    except LlamachatError:
        time.sleep(LET_SPEAK_S)
        raise
    except RuntimeError as error:
        if not any(words in str(error) for words in _OTHERS_GONE):
            raise
        raise SystemExit(1) from None  # another has ended, and has said why


def adopt(recipe: Recipe, work: Work) -> bool:
    """Take the step from `run.parent` by reference where it is finished there with the same fingerprint."""
    kept = parent_folder(recipe, work)
    if kept is None:
        return False
    found = read_artifact(kept.artifact).manifest
    if found.fingerprint != work.fingerprint:
        changes = "; ".join(changed_keys(found.identity, work.identity))
        log.info("%s: not taken from %s, since it changed (%s)", work.step.name, kept.path, changes)
        return False
    reference(work.folder, kept)
    log.info("%s: unchanged, taken from %s", work.step.name, kept.path)
    return True


def _adopt_earlier(recipe: Recipe, chosen: Sequence[Step]) -> None:
    """Take what the chosen steps may read from `run.parent` too, where it is unchanged: as the plan says."""
    before = max((recipe.before(step) for step in chosen), key=len)
    for step in [step for step in before if step not in chosen and not step.stage.surveys]:
        folder = recipe.folder(step)
        if recipe.run.parent is None or is_published(folder) or folder.identity.exists():
            continue
        try:
            adopt(recipe, find_work(recipe, step))
        except LlamachatError:
            continue  # what it reads is not there either; whoever needs it says so


def parent_folder(recipe: Recipe, work: Work) -> StepFolder | None:
    """The step's finished folder in the parent run, while the step has not been begun in this one."""
    if recipe.run.parent is None or work.folder.path.is_symlink() or work.folder.identity.exists():
        return None
    kept = StepFolder(Path(recipe.run.parent) / work.step.name)
    return kept if is_published(kept) and not is_published(work.folder) else None


def write_reports(recipe: Recipe, chosen: Sequence[Step]) -> str:
    """Write `<run.dir>/rm/tables.md` where reward models are among the chosen steps, and return its text.

    It shows every finished model beside which the chosen ones stand, those of `--only` and the others.
    """
    texts = []
    for folder in dict.fromkeys(_folder(step) for step in chosen if step.product.makes.kind == "reward_model"):
        from reward.presentation import markdown

        places = {step.product.makes.which: recipe.folder(step) for step in recipe.steps if _folder(step) == folder}
        summaries: dict[Any, dict[str, float]] = {
            which: read_summary(place) for which, place in places.items() if is_published(place)
        }
        texts.append(markdown(summaries))
        write_text(Path(recipe.run.dir) / folder / "tables.md", texts[-1])
    return "\n".join(texts)


def _folder(step: Step) -> str:
    return step.name.rpartition("/")[0]
