"""What the steps share that make dialogs and tune on them: rejection sampling, Ghost Attention, context distillation.

Such a step samples and publishes its dialogs, tunes a policy on them, compares it with the one before, and only then ends:
each part is there whole before the next begins, so that a killed command goes on where it was.
"""

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llamachat import distributed
from llamachat.answers.desk import Desk, Setting
from llamachat.answers.evaluation import Evaluation
from llamachat.answers.store import Store
from llamachat.runs.artifacts import (
    DIALOGS,
    HELD_OUT_DIALOGS,
    MANIFEST,
    Artifact,
    Manifest,
    end_step,
    publish,
    read_artifact,
)
from llamachat.runs.atomic import write_text
from llamachat.runs.folder import StepFolder
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.models import named_models
from llamachat.scoring.standardising import Constants
from llamachat.tracking.tracker import Tracker, open_tracker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from llamachat.chat_format.dialog import Message

SAMPLED = "sampled"  # the key of a dialog under which its origin stands

_LAST = 10**9  # past every step of a record
_FIRST = "test-first"  # in the store


def run_parts(
    inputs: StepInputs,
    *,
    make: Callable[[], Artifact],
    over: Mapping[str, Any],
    compare: Callable[[Artifact], None],
    from_base: bool = False,
    sft_share: float = 0.0,
) -> Artifact:
    """Make the dialogs, tune on them as `inputs.tune` is told, compare, end the step."""
    folder = inputs.folder
    are_made = distributed.broadcast_object((folder.dialogs / MANIFEST).is_file())
    dialogs = read_artifact(folder.dialogs, "dialogs") if are_made else make()
    free_memory()
    assert inputs.tune is not None, "a step that makes dialogs trains on them"
    tuned = inputs.tune(dialogs, over=over, from_base=from_base, sft_share=sft_share)
    free_memory()
    compare(tuned)
    return end_step(folder)


def setting_of(inputs: StepInputs) -> Setting:
    """The sections that sampling and scoring are told."""
    return Setting(
        run=inputs.run,
        base=inputs.base,
        tuning=inputs.tuning,
        data=inputs.data,
        rollout=inputs.rollout,
        scoring=inputs.scoring,
    )


@contextmanager
def record(inputs: StepInputs, prefix: str, *, keeps_record: bool) -> Iterator[Tracker]:
    """The record of the sampling: as it is, or from its beginning, where what was stored is logged again."""
    with open_tracker(
        inputs.tracking,
        step_folder=inputs.folder,
        run_dir=Path(inputs.run.dir),
        step=inputs.step,
        prefix=prefix,
        config=inputs.identity,
        resume_step=_LAST if keeps_record else None,
    ) as tracker:
        yield tracker


def show_figures(tracker: Tracker, folder: StepFolder) -> None:
    """Send the step's pictures."""
    tracker.figure("curves", folder.curves)
    for picture in sorted(folder.figures.glob("*.png")):
        tracker.figure(picture.stem, picture)


def publish_dialogs(
    inputs: StepInputs,
    lines: Iterable[str],
    held_out: "Sequence[str]",
    *,
    dropped: Mapping[str, int],
    details: Mapping[str, Any],
    read: Mapping[str, Artifact] | None = None,
) -> Artifact:
    """Publish dialogs to be learnt, and some of the validation side; `read` are further artifacts that they come from."""
    taken = {"policy": str(inputs.policy.path)} if inputs.policy else {"base": inputs.base.model}
    models = named_models(inputs.scoring, inputs.reward_models)
    taken |= {
        f"reward_model/{role}": str(model.path) if isinstance(model, Artifact) else model
        for role, model in models.items()
    }
    taken |= {name: str(artifact.path) for name, artifact in (read or {}).items()}
    manifest = Manifest(
        kind="dialogs",
        step=inputs.step,
        fingerprint=inputs.fingerprint,
        identity=inputs.identity,
        inputs=taken,
        seed=inputs.run.seed,
        dropped_records=dict(dropped),
        details=dict(details),
    )

    def write(place: Path) -> None:
        write_text(place / DIALOGS, "".join(lines))
        if held_out:
            write_text(place / HELD_OUT_DIALOGS, "".join(held_out))

    return publish(inputs.folder, manifest, write)


def dialog_line(context: "Sequence[Message]", answer: str, origin: Mapping[str, Any]) -> str:
    """A dialog as it is published: the answer is learnt, those of its context are not; where it comes from beside it."""
    messages: list[dict[str, Any]] = []
    for message in context:
        read_only = {"train": False} if message.role == "assistant" else {}
        messages.append({"role": message.role, "content": message.content, **read_only})
    messages.append({"role": "assistant", "content": answer})
    return json.dumps({"messages": messages, SAMPLED: dict(origin)}) + "\n"


def first_evaluation(desk: Desk, store: Store) -> tuple[Evaluation, Constants]:
    """The step's first policy on test prompts, and the scale that all scores of the step are told on."""

    def make() -> dict[str, Any]:
        evaluation, constants = desk.evaluate(None)
        return {"evaluation": evaluation.to_plain(), "constants": constants.to_plain()}

    values = store.kept(_FIRST, make)
    return Evaluation.from_plain(values["evaluation"]), Constants.from_plain(values["constants"])


def both_evaluations(desk: Desk, store: Store) -> tuple[Evaluation, Evaluation]:
    """The first policy on test prompts, evaluated before, and the tuned one, which is at this desk."""
    assert store.has(_FIRST), "the step's first policy was evaluated"
    first, constants = first_evaluation(desk, store)
    final = store.kept("test-final", lambda: desk.evaluate(constants)[0].to_plain())
    return first, Evaluation.from_plain(final)


def counted(counts: Mapping[str, int]) -> str:
    """What was left out, in words."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "nothing left out"


def free_memory() -> None:
    """Give back what the models held, before others are loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
