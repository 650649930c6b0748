"""The common form of the steps that make dialogs and tune a policy on them: rejection sampling, Ghost Attention,
distillation.

It samples batch by batch, publishes the dialogs, tunes, and compares both policies on held-out prompts. Each
batch and each part is written completely before the next begins, so that a killed step resumes where it was.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llamachat import distributed
from llamachat.answers.cache import StepCache
from llamachat.answers.evaluation import Evaluation, comparison, draw_comparison, evaluation_of
from llamachat.answers.session import AnswerSession, free_memory, read_by
from llamachat.chat_format.dialog import Message
from llamachat.errors import ConfigError
from llamachat.runs.artifacts import DIALOGS, HELD_OUT_DIALOGS, MANIFEST, Artifact, end_step, read_artifact
from llamachat.runs.atomic import write_text
from llamachat.runs.inputs import StepInputs
from llamachat.runs.state import peak_memory
from llamachat.scoring.standardising import Constants
from llamachat.tracking.curves import draw_curves
from llamachat.tracking.tracker import Tracker, open_record
from llamachat.training.hours import Hours, open_hours
from llamachat.training.progress import StepProgress
from llamachat.training.publishing import publish_step

SAMPLED = "sampled"  # the key of a dialog for its origin

_LAST = 10**9  # beyond every step of a record

Items = TypeVar("Items", bound=Sequence[Any])


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of a batch, to be logged and shown."""

    figures: dict[str, float]
    samples: list[dict[str, Any]]  # for people to read
    headline: str


@dataclass(slots=True)
class DialogStep:
    """One such step: its inputs, its cache of samples, its clock, and the records that were left out."""

    inputs: StepInputs
    section: str  # of the recipe: rejection_sampling
    prefix: str  # of the names of its metrics: rs
    max_hours: float | None = None
    dropped: Counter[str] = field(default_factory=Counter)  # by reason
    cache: StepCache = field(init=False)
    hours: Hours = field(init=False)  # of sampling

    def __post_init__(self) -> None:
        self.cache = StepCache(self.inputs.folder.sampling)
        self.hours = open_hours(
            self.inputs.step, self.section, self.max_hours, self.inputs.deadline, self.inputs.folder.sampling
        )

    def run(
        self,
        *,
        make_dialogs: Callable[[], Artifact],
        compare: Callable[[Artifact], Mapping[str, float]],
        sft: Mapping[str, Any],
        from_base: bool = False,
        sft_share: float = 0.0,
    ) -> Artifact:
        """Make the dialogs, tune on them with the overrides `sft` of that section, compare, end the step."""
        folder, tune = self.inputs.folder, self.inputs.tune
        assert tune is not None, "pipelines passes it to each step of this kind"
        is_published = distributed.broadcast_object((folder.dialogs / MANIFEST).is_file())
        dialogs = read_artifact(folder.dialogs, "dialogs") if is_published else make_dialogs()
        free_memory()
        tuned = tune(dialogs, over=sft, from_base=from_base, sft_share=sft_share)
        free_memory()
        figures = compare(tuned)
        draw_curves(folder.metrics, folder.curves)
        with open_record(self.inputs, self.prefix, resume_step=_LAST) as tracker:
            tracker.figure("curves", folder.curves)
            for picture in sorted(folder.figures.glob("*.png")):
                tracker.figure(picture.stem, picture)
            tracker.summary(figures)
        return end_step(folder)

    def record(self) -> AbstractContextManager[Tracker]:
        """The record of the sampling from its start: figures of cached batches are logged again."""
        return open_record(self.inputs, self.prefix, resume_step=None)

    def make_batches(
        self,
        tracker: Tracker,
        train: Sequence[Items],
        held_out: Sequence[Items],
        *,
        make: Callable[[int, Items], Mapping[str, Any]],
        read: Callable[[Items, Mapping[str, Any], bool], BatchResult],
        unit: str,
    ) -> list[dict[str, float]]:
        """Make each batch that is not in the cache, and return the figures of the training batches.

        `make(number, items)` samples a batch as JSON values, `read(items, values, is_held_out)` processes these. When
        the hours are over, no further training batch is begun (`unit` names its items), but the held-out ones are
        made: they are small, and measure the tuning. The first batch is made in any case.
        """
        batches = list(enumerate((*train, *held_out), start=1))
        names = [f"batch-{number:05d}" for number, _ in batches]
        rows: list[dict[str, float]] = []
        num_left_out = 0
        done = sum(map(self.cache.has, names))
        with StepProgress(self.inputs.step, steps=len(batches), done=done) as progress:
            for name, (number, items) in zip(names, batches, strict=True):
                is_new, is_held_out = not self.cache.has(name), number > len(train)
                if is_new and not is_held_out and self.hours.ended_by is not None:
                    num_left_out += len(items)
                    continue
                values = self.cache.get_or_make(name, lambda n=number, of=items: make(n, of))
                if is_new and number < len(train):
                    self.hours.are_over(f"batch {number} of {len(train)}")
                if is_new:
                    self.hours.save(self.cache.folder)
                result = read(items, values, is_held_out)
                if not is_held_out:
                    rows.append(result.figures)
                    tracker.log(number, result.figures)
                    tracker.samples(number, result.samples)
                if is_new:
                    progress.step(number, result.headline)
        if num_left_out:
            self.dropped[f"{unit} left out: {self.hours.key} is used up"] += num_left_out
        return rows

    def end_sampling(self, tracker: Tracker, figures: Mapping[str, float]) -> None:
        """Write record and summary before the dialogs are published: a resumed command does not repeat this."""
        tracker.sync()
        tracker.summary(figures)

    def publish(
        self,
        lines: Sequence[str],
        held_out: Sequence[str],
        *,
        details: Mapping[str, Any],
        dropped: Mapping[str, int] | None = None,
        earlier: Mapping[str, Artifact] | None = None,
    ) -> Artifact:
        """Publish the training dialogs and some validation dialogs; `earlier` are the artifacts whose dialogs are
        included."""
        inputs = self.inputs

        def write(place: Path) -> None:
            write_text(place / DIALOGS, "".join(lines))
            if held_out:
                write_text(place / HELD_OUT_DIALOGS, "".join(held_out))

        return publish_step(
            inputs,
            "dialogs",
            write,
            read=read_by(inputs) | {f"dialogs/{step}": artifact for step, artifact in (earlier or {}).items()},
            dropped=dict(self.dropped) | dict(dropped or {}),
            details={"dialogs": len(lines)} | dict(details) | self.hours.details,
        )

    def first_evaluation(self, session: AnswerSession) -> tuple[Evaluation, Constants]:
        """The step's first policy on test prompts, and the constants that put all scores of the step on one scale."""

        def make() -> dict[str, Any]:
            evaluation, constants = self._evaluate(session, None)
            return {"evaluation": asdict(evaluation), "constants": asdict(constants)}

        values = self.cache.get_or_make("test-first", make)
        return Evaluation(**values["evaluation"]), Constants.from_plain(values["constants"])

    def _evaluate(self, session: AnswerSession, constants: Constants | None) -> tuple[Evaluation, Constants]:
        responses, scored = session.answer_held_out(session.prompts.test)
        return evaluation_of(responses, scored, constants, scoring=self.inputs.scoring)

    def compare(self, session: AnswerSession) -> tuple[Evaluation, Evaluation, dict[str, float]]:
        """Compare the first policy with the tuned one, which `session` holds, on test prompts: plots and figures."""
        first, constants = self.first_evaluation(session)

        def make() -> dict[str, Any]:
            return asdict(self._evaluate(session, constants)[0])

        final = Evaluation(**self.cache.get_or_make("test-final", make))
        draw_comparison(first, final, self.inputs.folder.figures / "test_scores.png")
        return first, final, comparison(self.prefix, first, final)


def dialog_line(context: Iterable[Message], answer: str, origin: Mapping[str, Any]) -> str:
    """A dialog as it is published: only the last answer is trained on; `origin` says where it comes from."""
    messages: list[dict[str, Any]] = []
    for message in context:
        read_only = {"train": False} if message.role == "assistant" else {}
        messages.append({"role": message.role, "content": message.content, **read_only})
    messages.append({"role": "assistant", "content": answer})
    return json.dumps({"messages": messages, SAMPLED: dict(origin)}) + "\n"


def check_choice(inputs: StepInputs, section: str, *, temperature: object, samples: int, otherwise: str) -> None:
    """Refuse several answers at temperature 0, since they leave nothing to choose from."""
    if temperature is None and inputs.rollout.temperature == 0 and samples > 1:
        raise ConfigError(
            f"rollout.temperature: 0, but {section}.samples_per_prompt is {samples}. At temperature 0 all answers to a "
            f"prompt are identical, so there is nothing to choose from. Set it to 1, or {otherwise}."
        )


def batch_costs(started: float, tokens: int | None = None) -> dict[str, float]:
    """Time, speed and peak memory of a batch that started at `started` and sampled `tokens` tokens."""
    seconds = time.monotonic() - started
    speed = {} if tokens is None else {"throughput/rollout_tokens_per_s": tokens / max(seconds, 1e-9)}
    return {"time/step_s": seconds, **speed, "memory/peak_gib": peak_memory()}


def step_costs(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Total time, speed and peak memory of all batches."""
    return {
        "time/rollout_s": sum(row["time/step_s"] for row in rows),
        "memory/peak_gib": max((row["memory/peak_gib"] for row in rows), default=0.0),
    }


def counted(counts: Mapping[str, int]) -> str:
    """The numbers of records left out, as text."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items())) or "nothing left out"
