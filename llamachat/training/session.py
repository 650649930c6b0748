"""One training by optimizer steps, for sft, dpo and reward models: loop, clock, record, best weights, resuming.

A stage defines what is trained (`Training`); this module runs it. If it is killed, the same call resumes from the
newest complete checkpoint. The last state is the result; only if `max_hours` or `run.max_hours` end the training is it
the best one that was evaluated.
"""

import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llamachat import distributed
from llamachat.chat_format import ChatFormat
from llamachat.config.optimizer import OptimizerSection
from llamachat.data.packing import StepPlan
from llamachat.errors import DivergedError, first_line
from llamachat.models.start_checks import fast_tokenizer
from llamachat.runs.atomic import incoming_file, storage_errors
from llamachat.runs.checkpoints import Checkpoint, newest
from llamachat.runs.inputs import StepInputs
from llamachat.runs.record import MetricsRecord
from llamachat.tracking.curves import draw_curves
from llamachat.tracking.tracker import Tracker, open_record
from llamachat.training.hours import Hours, open_hours
from llamachat.training.master_weights import check_optimizer
from llamachat.training.out_of_memory import MicrobatchTooLargeError, halving
from llamachat.training.progress import StepProgress
from llamachat.training.trainer import AtomicCheckpoints, Watch, collator, row_numbers, trainer_arguments

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The result of one evaluation: the number of optimizer steps, and the held-out figures by metric name."""

    step: int
    loss: float
    figures: Mapping[str, float]
    words: str = ""  # the figures for people, not stored


class Training(Protocol):
    """What a stage trains: its examples in optimizer steps, its trainer, its figures."""

    @property
    def config(self) -> OptimizerSection: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def chat_format(self) -> ChatFormat: ...

    @property
    def plan(self) -> StepPlan: ...

    @property
    def names(self) -> Mapping[str, str]:
        """The trainer's figures by our names; the first is the training loss."""
        ...

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of these rows of the plan."""
        ...

    def trainer(self, arguments: dict[str, Any], **parts: Any) -> AtomicCheckpoints:
        """TRL's trainer, built from these parts with these arguments of its configuration."""
        ...

    def progress(self, step: int) -> dict[str, float]:
        """Figures for the progress after `step` optimizer steps."""
        ...

    def evaluate(self, step: int) -> Evaluated:
        """The model on held-out examples, after `step` optimizer steps."""
        ...

    def sample(self, tracker: Tracker, step: int) -> None:
        """Record sampled answers for people to read, if the stage samples any."""
        ...

    def smaller(self) -> "Training | None":
        """The same optimizer steps in micro-batches of half the size; None if that is impossible."""
        ...


@dataclass(frozen=True, slots=True)
class BestWeights:
    """The trained weights with the lowest held-out loss so far.

    One file next to the checkpoints, replaced atomically. It may come from a later step than the checkpoint that a
    killed training resumes from, since those weights were evaluated all the same.
    """

    checkpoints: Path

    @property
    def path(self) -> Path:
        return self.checkpoints / "best.safetensors"

    def read(self) -> Evaluated | None:
        """The evaluation of the best weights; None before the first evaluation, or if the file is damaged."""
        if not self.path.is_file():
            return None
        try:
            with storage_errors(self.path), safe_open(self.path, framework="pt") as stored:
                return Evaluated(**json.loads(stored.metadata()["evaluated"]))
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            log.warning("warning: %s: skipped: the file is damaged (%s)", self.path, first_line(error))
            return None

    def offer(self, evaluated: Evaluated, model: nn.Module) -> None:
        """Keep the model's trained weights if their loss is the lowest so far."""
        trained = distributed.full_tensors(_trained(model))
        best = self.read()
        if not distributed.is_first() or (best is not None and best.loss <= evaluated.loss):
            return
        weights = {name: weight.detach().cpu().contiguous() for name, weight in trained.items()}
        described = {"step": evaluated.step, "loss": evaluated.loss, "figures": dict(evaluated.figures)}
        with incoming_file(self.path) as side:
            digest = _digest_of((name, weights[name]) for name in sorted(weights))
            save_file(weights, side, metadata={"evaluated": json.dumps(described), "digest": digest})

    def put(self, model: nn.Module) -> Evaluated | None:
        """Load the best weights into the model; None if the file is damaged, and the model is unchanged."""
        distributed.wait()  # for the first process, which writes it
        best = self.read()
        trained = _trained(model)
        if best is not None:
            with storage_errors(self.path), safe_open(self.path, framework="pt") as stored, torch.no_grad():
                digest = stored.metadata().get("digest")  # missing in files of an earlier version
                if digest in (None, _digest_of((name, stored.get_tensor(name)) for name in sorted(trained))):
                    for name, weight in trained.items():
                        weight.copy_(distributed.shard_like(stored.get_tensor(name), weight))
                    return best
        log.warning("warning: %s has changed since it was saved: using the last weights instead of the best", self.path)
        return None


def _digest_of(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = sha256()
    for name, weight in weights:
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(weight.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumed:
    """Where a step's training resumes: the newest checkpoint, if any, and the clock."""

    inputs: StepInputs
    section: str  # of the recipe: sft, reward
    checkpoint: Checkpoint | None
    hours: Hours

    @property
    def step(self) -> int | None:
        return None if self.checkpoint is None else self.checkpoint.step

    @contextmanager
    def session(self, training: Training, *, prefix: str, unit: str) -> Iterator["Session"]:
        """A session with an open record; `prefix` is that of its metrics, `unit` is what a step consists of (a
        dialog)."""
        with open_record(self.inputs, prefix, resume_step=self.step) as tracker:
            yield Session(
                inputs=self.inputs,
                section=self.section,
                prefix=prefix,
                unit=unit,
                first_step=self.step or 0,
                training=training,
                tracker=tracker,
                hours=self.hours,
            )


def resume(inputs: StepInputs, section: str, config: OptimizerSection) -> Resumed:
    """Read where the step's training resumes, and start its clock."""
    check_optimizer(config.optimizer, where=f"{section}.optimizer")
    checkpoint = distributed.broadcast_object(newest(inputs.folder.checkpoints))
    saved = checkpoint.path if checkpoint else None
    hours = open_hours(inputs.step, section, config.max_hours, inputs.deadline, saved)
    return Resumed(inputs=inputs, section=section, checkpoint=checkpoint, hours=hours)


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One training in progress."""

    inputs: StepInputs
    section: str
    prefix: str
    unit: str
    first_step: int  # optimizer steps that are in the newest checkpoint
    training: Training
    tracker: Tracker
    hours: Hours

    @property
    def best(self) -> BestWeights:
        return BestWeights(self.inputs.folder.checkpoints)

    def train(self) -> Evaluated | None:
        """Train to the last optimizer step.

        If its hours end it, the best evaluated weights are loaded into the model, and their evaluation is returned.
        """
        if self.first_step == 0:
            self.measure(0)
        with StepProgress(self.inputs.step, steps=self.training.plan.num_steps, done=self.first_step) as progress:
            halving(
                self.training,
                train=lambda training: self._train_on(training, progress),
                halve=lambda training: training.smaller(),
                step=self.inputs.step,
                section=self.section,
                unit=self.unit,
            )
        return None if self.hours.ended_by is None else self.best.put(self.training.model)

    def _train_on(self, training: Training, progress: StepProgress) -> None:
        """Train from the newest checkpoint, or from the start."""
        steps, tracking, name = training.plan.num_steps, self.inputs.tracking, self.inputs.step
        loss_name = next(iter(training.names.values()))
        checkpoint = newest(self.inputs.folder.checkpoints)

        def on_log(step: int, figures: dict[str, float]) -> None:
            loss = figures[loss_name]
            check_finite(loss, f"{name}: the training loss at step {step}", section=self.section)
            self.tracker.log(step, figures | training.progress(step))
            progress.step(step, f"loss {loss:.3f}")

        def on_step(step: int) -> bool:
            is_over = step < steps and self.hours.are_over(f"step {step}")
            # Also at the last step, before its checkpoint: a command that resumes there has nothing left to measure.
            is_last = is_over or step == steps
            if step % tracking.eval_every == 0 or is_last:
                evaluated = self.measure(step)
                progress.say(f"{name} step {step}: {evaluated.words}")
                if self.hours.are_limited:
                    self.best.offer(evaluated, training.model)
            if step % tracking.sample_every == 0 or is_last:
                training.sample(self.tracker, step)
            return is_over

        with tempfile.TemporaryDirectory() as scratch:
            trainer = self.trainer(training, Path(scratch), on_log=on_log, on_step=on_step)
            if self.hours.ended_by is not None:  # an earlier, killed command has trained up to there
                assert checkpoint is not None, "the checkpoint records that the hours are over"
                trainer.take_as_trained(checkpoint.path)
                return
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
            except MicrobatchTooLargeError:
                trainer.save_last_step()
                raise

    def trainer(
        self,
        training: Training,
        scratch: Path,
        *,
        on_log: Callable[[int, dict[str, float]], None] = lambda *_: None,
        on_step: Callable[[int], object] = lambda _: None,
    ) -> AtomicCheckpoints:
        """The trainer for all rows of the plan; `scratch` is a folder for temporary files."""
        plan, tracking = training.plan, self.inputs.tracking
        arguments = trainer_arguments(
            training.config,
            plan,
            folder=scratch,
            seed=self.inputs.run.seed,
            log_every=tracking.log_every,
            save_every=tracking.save_every,
        )
        return training.trainer(
            arguments,
            data_collator=collator(training.collate),
            train_dataset=row_numbers(len(plan.rows)),
            processing_class=fast_tokenizer(training.chat_format, scratch),
            checkpoints=self.inputs.folder.checkpoints,
            before_save=self.tracker.sync,
            watch=Watch(plan.tokens_per_step, names=training.names, on_log=on_log, on_step=on_step),
            hours=self.hours,
        )

    def measure(self, step: int) -> Evaluated:
        """Evaluate on held-out examples and log the figures at `step`."""
        started = time.monotonic()
        evaluated = self.training.evaluate(step)
        what = f"{self.inputs.step}: the loss on held-out {self.unit}s at step {step}"
        check_finite(evaluated.loss, what, section=self.section, is_start=step == 0)
        self.tracker.log(step, {**evaluated.figures, "time/eval_s": time.monotonic() - started})
        return evaluated

    def finish(self, names: Sequence[str], best: Evaluated | None) -> dict[str, float]:
        """Draw the curves, and return the last value of each of these metrics in the record."""
        folder = self.inputs.folder
        draw_curves(folder.metrics, folder.curves)
        self.tracker.figure("curves", folder.curves)
        # From the record, since a resumed command has only seen the last part of the training.
        record = list(MetricsRecord(folder.metrics).read())
        figures = {name: row[name] for row in record for name in names if row.get(name) is not None}
        figures["time/train_s"] = sum(row.get("time/step_s") or 0.0 for row in record if f"{self.prefix}/step" in row)
        if best is not None:
            log.info("publishing the weights of step %d, which have the lowest held-out loss", best.step)
            figures |= best.figures
        return figures

    def notes(self, best: Evaluated | None) -> dict[str, Any]:
        """The manifest's details about how the training ended; empty if it ended normally."""
        return self.hours.details | ({"optimizer_step": best.step} if best else {})


def check_finite(loss: float, what: str, *, section: str, is_start: bool = False) -> None:
    """Stop at a loss that is NaN or infinite: such a model is neither saved nor published.

    `is_start`: nothing has been trained yet.
    """
    if not math.isfinite(loss) and is_start:
        raise DivergedError(
            f"{what} is {loss}, before the first training step. The starting model has weights that are not"
            " finite, or too large for base.dtype. Download the model again, or set base.dtype to bfloat16 or float32."
        )
    if not math.isfinite(loss):
        raise DivergedError(
            f"{what} is {loss}, and further training cannot repair the weights. Set a lower "
            f"{section}.learning_rate or a longer {section}.warmup_fraction, and restart the step with `--overwrite`."
        )
