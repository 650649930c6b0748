"""Supervised fine-tuning (Llama 2, arXiv:2307.09288, section 3.1): dialogs -> policy.

Reads the dialogs of `data.sft` and a base (or an earlier policy); writes the step folder's metrics.jsonl,
samples.jsonl, checkpoints/, summary.json, curves.png and artifact/. The autoregressive loss is zero on everything but
answers and their EOS; dialogs packed into one row do not see one another (ours, not stated in the paper). What is
published is the last state; only where `max_hours` ends the training it is the best one that was evaluated.
"""

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from llamachat import distributed
from llamachat.chat_format import TrainOn
from llamachat.data.packing import StepPlan, collate_packed, collate_padded, plan_steps
from llamachat.errors import DataError
from llamachat.rollout.engine import Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from llamachat.runs.artifacts import Artifact
from llamachat.runs.checkpoints import newest
from llamachat.runs.folder import StepFolder
from llamachat.runs.inputs import StepInputs
from llamachat.runs.record import MetricsRecord
from llamachat.tracking.curves import draw_curves
from llamachat.tracking.tracker import Tracker, open_tracker
from llamachat.training.best import BestWeights, Evaluated
from llamachat.training.hours import Hours, open_hours
from llamachat.training.master_weights import check_optimizer
from llamachat.training.out_of_memory import MicrobatchTooLargeError, halving
from llamachat.training.progress import StepProgress
from llamachat.training.trainer import Watch, collator, row_numbers
from sft.config import Config
from sft.evaluation import answer_loss, check_finite, sample_answers
from sft.examples import Examples, load_examples
from sft.loss import SHAPE_MULTIPLE
from sft.start import Start, load_start, publish_policy
from sft.trainer import NAMES, AtomicCheckpointTrainer, make_optimizer, trainer_arguments

log = logging.getLogger(__name__)

# Attention over a packed row costs its square, and a CPU feels it: 1.4 times the tokens a second of rows of 1024.
CPU_ROW_TOKENS = 512

# What summary.json says of a training, each figure's last value.
SUMMARY = (
    "sft/eval_loss_base",
    "sft/eval_loss",
    "sft/loss",
    "sft/epoch",
    "sft/trained_tokens",
    "sft/finished_fraction",
    "sft/answer_tokens",
    "memory/peak_gib",
)

# The samples that people watch: the temperature and nucleus of everyday use, cut well above a usual answer.
WATCHED = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=256, seed=0)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train, measure and publish. Killed at any moment, the same call goes on from the newest whole checkpoint."""
    # Its bars for loading and writing weights would break up ours.
    transformers_logging.disable_progress_bar()
    check_optimizer(config.optimizer, where="sft.optimizer")
    folder = inputs.folder
    resume = distributed.broadcast_object(newest(folder.checkpoints))
    hours = open_hours(inputs.step, "sft", config.max_hours, inputs.deadline, resume.path if resume else None)
    start = load_start(inputs)
    examples = load_examples(
        inputs.data,
        start.chat_format,
        made=inputs.dialogs.path if inputs.dialogs else None,
        sft_share=inputs.sft_share,
        system=inputs.base.system,
        train_on=TrainOn(config.train_on),
        max_tokens=inputs.base.max_tokens,
        num_prompts=config.sample_prompts,
        seed=inputs.run.seed,
    )
    plan = plan_training(config, inputs, examples, device=start.device)
    with open_tracker(
        inputs.tracking,
        step_folder=folder,
        run_dir=Path(inputs.run.dir),
        step=inputs.step,
        prefix="sft",
        config=inputs.identity,
        resume_step=resume.step if resume else None,
    ) as tracker:
        session = Session(config, inputs, start, examples, plan, tracker, hours)
        best = session.train(first_step=resume.step if resume else 0)
        # Before the artifact, which ends the step: a command killed between the two would never come back to write it.
        tracker.summary(session.finish(folder, best))
        notes = hours.details | ({"optimizer_step": best.step} if best else {})
        return publish_policy(start, inputs, dropped=examples.dropped, notes=notes)


def plan_training(config: Config, inputs: StepInputs, examples: Examples, *, device: torch.device) -> StepPlan:
    """Which dialogs make which optimizer step."""
    if not examples.train or not examples.validation:
        raise DataError(
            f"{inputs.dialogs.path if inputs.dialogs else 'data.sft'}: {len(examples.train)} dialogs to train on and "
            f"{len(examples.validation)} to validate with are left after splitting by first user turn. Both are needed. Add "
            "dialogs, or change data.split."
        )
    row_tokens = (
        (CPU_ROW_TOKENS if device.type == "cpu" else inputs.base.max_tokens)
        if config.row_tokens == "auto"
        else config.row_tokens
    )
    return plan_steps(
        [len(example.input_ids) for example in examples.train],
        examples_per_step=config.examples_per_step,
        epochs=config.epochs,
        seed=inputs.run.seed,
        capacity=min(row_tokens, inputs.base.max_tokens),
        packing=config.packing,
        rows_per_microbatch=1 if config.packing else config.rows_per_microbatch,
        world_size=distributed.count(),
    )


@dataclass(frozen=True, slots=True)
class Session:
    """One training: what is trained, with what, and who is told."""

    config: Config
    inputs: StepInputs
    start: Start
    examples: Examples
    plan: StepPlan
    tracker: Tracker
    hours: Hours

    @property
    def best(self) -> BestWeights:
        return BestWeights(self.inputs.folder.checkpoints)

    def train(self, *, first_step: int) -> Evaluated | None:
        """To the last optimizer step; `first_step` of them are in the newest checkpoint.

        Where its hours end it the model becomes the best one that was evaluated, which is returned.
        """
        steps = self.plan.num_steps
        log.info(
            "%d dialogs to train on, %d held out; %d optimizer steps of %d dialogs in %d rows",
            len(self.examples.train),
            len(self.examples.validation),
            steps,
            self.config.examples_per_step,
            self.plan.rows_per_step,
        )
        if first_step == 0:
            self.measure(0, "sft/eval_loss_base", "sft/eval_loss")
        with StepProgress(self.inputs.step, steps=steps, done=first_step) as progress:
            halving(
                cast(Session, self),  # `replace` gives a Session, where the type of self would ask for Self
                train=lambda session: session._train_on(progress),
                halve=Session._in_smaller_parts,
                step=self.inputs.step,
                section="sft",
                unit="dialog",
            )
        return None if self.hours.ended_by is None else self.best.put(self.start.model)

    def _train_on(self, progress: StepProgress) -> None:
        """From the newest checkpoint, or from the beginning."""
        steps, tracking = self.plan.num_steps, self.inputs.tracking
        checkpoint = newest(self.inputs.folder.checkpoints)
        learnt = self._learnt_tokens()
        with tempfile.TemporaryDirectory() as scratch:

            def on_log(step: int, figures: dict[str, float]) -> None:
                check_finite(figures["sft/loss"], f"{self.inputs.step}: the training loss at step {step}")
                epochs = step * self.config.examples_per_step / len(self.examples.train)
                progress_figures = {
                    "sft/epoch": min(epochs, self.config.epochs),
                    "sft/trained_tokens": float(learnt[step - 1]),
                }
                self.tracker.log(step, figures | progress_figures)
                progress.step(step, f"loss {figures['sft/loss']:.3f}")

            def on_step(step: int) -> bool:
                is_over = step < steps and self.hours.are_over(f"step {step}")
                # At the last step too, and before its checkpoint: whoever resumes there has nothing to measure again.
                is_last = is_over or step == steps
                if step % tracking.eval_every == 0 or is_last:
                    loss = self.measure(step, "sft/eval_loss")
                    progress.say(f"{self.inputs.step} step {step}: held-out answers {loss:.4f} nats a token")
                    if self.hours.are_limited:
                        self.best.offer(Evaluated(step, loss, {"sft/eval_loss": loss}), self.start.model)
                if step % tracking.sample_every == 0 or is_last:
                    self.sample(step)
                return is_over

            watch = Watch(self.plan.tokens_per_step, names=NAMES, on_log=on_log, on_step=on_step)
            trainer = self._trainer(watch, Path(scratch))
            if self.hours.ended_by is not None:  # a killed command has trained to there
                trainer.take_as_trained()
                return
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
            except MicrobatchTooLargeError:
                trainer.save_last_step()
                raise

    def _in_smaller_parts(self) -> "Session | None":
        """The same optimizer steps in micro-batches of half the size; None where each is one dialog already."""
        longest = self._longest_row()
        if self.config.packing:
            key, before, least = "row_tokens", longest, 16
        else:
            key, before, least = "rows_per_microbatch", self.plan.rows_per_microbatch, 1
        after = before // 2
        if after < least:
            return None
        config = self.config.model_copy(update={key: after})
        plan = plan_training(config, self.inputs, self.examples, device=self.start.device)
        smaller = replace(self, config=config, plan=plan)
        if self.config.packing and smaller._longest_row() == longest:  # a long dialog has its row for itself
            return None
        log.warning(
            "%s: the device's memory is too small for a forward and backward pass with sft.%s %d. Going on from the last "
            "optimizer step with %d; the dialogs of each step stay the same. Set sft.%s=%d to begin with that.",
            self.inputs.step,
            key,
            before,
            after,
            key,
            after,
        )
        return smaller

    def _longest_row(self) -> int:
        """Tokens of the fullest row, without padding."""
        return max(sum(len(self.examples.train[index].input_ids) for index in row) for row in self.plan.rows)

    def _learnt_tokens(self) -> list[int]:
        """Answer tokens in the loss from the first step to each step."""
        sizes = [sum(example.loss_mask) for example in self.examples.train]
        return list(
            accumulate(
                sum(sizes[index] for row in self.plan.step_rows(step) for index in row)
                for step in range(self.plan.num_steps)
            )
        )

    def _trainer(self, watch: Watch, scratch: Path) -> AtomicCheckpointTrainer:
        config, tracking = self.config, self.inputs.tracking
        arguments = trainer_arguments(
            config,
            folder=scratch,
            rows_per_microbatch=self.plan.rows_per_microbatch,
            microbatches_per_step=self.plan.microbatches_per_step,
            seed=self.inputs.run.seed,
            log_every=tracking.log_every,
            save_every=tracking.save_every,
        )
        return AtomicCheckpointTrainer(
            model=self.start.model,
            args=arguments,
            data_collator=collator(self.collate),
            train_dataset=row_numbers(len(self.plan.rows)),
            processing_class=self.start.fast_tokenizer(scratch),
            optimizers=make_optimizer(self.start.model, config, steps=self.plan.num_steps),
            checkpoints=self.inputs.folder.checkpoints,
            before_save=self.tracker.sync,
            watch=watch,
            hours=self.hours,
        )

    def collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Tensors of some rows of the plan: one packed row, or several padded dialogs."""
        rows = [[self.examples.train[index] for index in self.plan.rows[number]] for number in numbers]
        if self.config.packing:
            (row,) = rows  # several packed rows in one forward pass would cost quadratic attention
            return collate_packed(row, multiple_of=SHAPE_MULTIPLE)
        return collate_padded([example for row in rows for example in row], rows=len(rows), multiple_of=SHAPE_MULTIPLE)

    def measure(self, step: int, *names: str) -> float:
        """Log the loss on held-out answers at `step`, under each of these names."""
        started = time.monotonic()
        loss = answer_loss(
            self.start.model,
            self.examples.validation,
            row_tokens=CPU_ROW_TOKENS,
            device=self.start.device,
        )
        check_finite(loss, f"{self.inputs.step}: the loss on held-out answers at step {step}")
        self.tracker.log(step, dict.fromkeys(names, loss) | {"time/eval_s": time.monotonic() - started})
        return loss

    def sample(self, step: int) -> None:
        """Sample answers to the same held-out prompts as every time, for people to read."""
        if not self.examples.prompts:
            return
        tokenizer = self.start.chat_format.tokenizer
        engine = HuggingFaceEngine(self.start.model, self.start.chat_format.stop_ids, tokenizer.pad_id)
        samples = sample_answers(engine, self.start.chat_format, self.examples.prompts, sampling=WATCHED)
        self.tracker.samples(
            step,
            [{"prompt": s.prompt, "answer": s.answer, "tokens": s.tokens, "finished": s.is_finished} for s in samples],
        )
        self.tracker.log(
            step,
            {
                "sft/finished_fraction": sum(s.is_finished for s in samples) / len(samples),
                "sft/answer_tokens": sum(s.tokens for s in samples) / len(samples),
            },
        )

    def finish(self, folder: StepFolder, best: Evaluated | None) -> dict[str, float]:
        """Draw the curves, and return the step's final figures."""
        draw_curves(folder.metrics, folder.curves)
        self.tracker.figure("curves", folder.curves)
        # From the record, since a resumed command has seen only the end of the training itself.
        record = list(MetricsRecord(folder.metrics).read())
        figures = {name: row[name] for row in record for name in SUMMARY if row.get(name) is not None}
        figures["time/train_s"] = sum(row.get("time/step_s") or 0.0 for row in record if "sft/step" in row)
        if best is not None:
            log.info("the weights of step %d are the best that were evaluated: they are published", best.step)
            figures |= best.figures
        before, after = figures["sft/eval_loss_base"], figures["sft/eval_loss"]
        log.info("held-out answers: %.4f nats a token before, %.4f after", before, after)
        return figures
