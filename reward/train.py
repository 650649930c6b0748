"""Reward models (Llama 2, arXiv:2307.09288, section 3.2.2): preferences and a chat policy -> a model that scores answers.

Reads the preferences and labels of `data` and a policy (or the base); writes the step folder's metrics.jsonl,
checkpoints/, summary.json, curves.png, figures/ and artifact/. One thing surprises: a rating is used as a margin only; the order
of a pair alone says which answer is better. What is published is the last state; only where `max_hours` ends the training
it is the best one that was evaluated.
"""

import logging
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from transformers.utils import logging as transformers_logging

from llamachat import distributed
from llamachat.models.reward_model import RewardStart, build_reward_model
from llamachat.models.sequence_attention import use_sequence_attention
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
from reward.batches import Batches, plan_batches, smaller
from reward.config import CPU_ROW_TOKENS, Config
from reward.heldout import check_finite, held_out_figures, test_figures
from reward.pairs import Examples, load_examples
from reward.publishing import publish_reward_model
from reward.trainer import PackedRewardTrainer, make_optimizer, names_of, trainer_arguments

log = logging.getLogger(__name__)

LEAST_ROW_TOKENS = 16

# What summary.json says of a training beside the figures on test pairs, each one's last value.
SUMMARY = ("loss", "accuracy", "eval_loss", "eval_accuracy", "epoch")


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train, measure and publish. Killed at any moment, the same call goes on from the newest whole checkpoint."""
    # Its bars for loading and writing weights would break up ours.
    transformers_logging.disable_progress_bar()
    check_optimizer(config.optimizer, where="reward.optimizer")
    folder = inputs.folder
    resume = distributed.broadcast_object(newest(folder.checkpoints))
    assert inputs.which is not None
    hours = open_hours(inputs.step, "reward", config.max_hours, inputs.deadline, resume.path if resume else None)
    start = build_reward_model(inputs.base, inputs.tuning, policy=inputs.policy, seed=inputs.run.seed, device="auto")
    if start.device.type == "cpu":
        use_sequence_attention(start.model)
    examples = load_examples(
        config,
        inputs.data,
        start.chat_format,
        which=inputs.which,
        system=inputs.base.system,
        max_tokens=inputs.base.max_tokens,
        seed=inputs.run.seed,
    )
    batches = plan_training(config, inputs, examples, device=start.device)
    with open_tracker(
        inputs.tracking,
        step_folder=folder,
        run_dir=Path(inputs.run.dir),
        step=inputs.step,
        prefix=inputs.step,
        config=inputs.identity,
        resume_step=resume.step if resume else None,
    ) as tracker:
        session = Session(config, inputs, start, examples, batches, tracker, hours)
        best = session.train(first_step=resume.step if resume else 0)
        # Before the artifact, which ends the step: a command killed between the two would never come back to write it.
        tracker.summary(session.finish(folder, best))
        return publish_reward_model(
            start,
            inputs,
            dropped=examples.dropped,
            safety_labels=learnt_labels(config, inputs, examples),
            notes=hours.details | ({"optimizer_step": best.step} if best else {}),
        )


def plan_training(config: Config, inputs: StepInputs, examples: Examples, *, device: torch.device) -> Batches:
    """Which pairs and labelled responses make which optimizer step."""
    auto = CPU_ROW_TOKENS if device.type == "cpu" else 2 * inputs.base.max_tokens
    return plan_batches(
        examples.train,
        examples.labels,
        pairs_per_step=config.pairs_per_step,
        epochs=config.epochs,
        seed=inputs.run.seed,
        row_tokens=auto if config.row_tokens == "auto" else config.row_tokens,
        has_pair_labels=inputs.which == "safety" and config.safety_auxiliary_weight > 0,
    )


def learnt_labels(config: Config, inputs: StepInputs, examples: Examples) -> int:
    """Answers whose safety label was learnt, single ones and those of pairs; each as often as it stands in an epoch."""
    if inputs.which != "safety" or config.safety_auxiliary_weight == 0:
        return 0
    of_pairs = (
        is_safe
        for pair in examples.train
        for is_safe in (pair.preference.chosen_is_safe, pair.preference.rejected_is_safe)
    )
    return len(examples.labels) + sum(is_safe is not None for is_safe in of_pairs)


@dataclass(frozen=True, slots=True)
class Session:
    """One training: what is trained, with what, and who is told."""

    config: Config
    inputs: StepInputs
    start: RewardStart
    examples: Examples
    batches: Batches
    tracker: Tracker
    hours: Hours

    @property
    def best(self) -> BestWeights:
        return BestWeights(self.inputs.folder.checkpoints)

    def name(self, figure: str) -> str:
        """The metric's name for this model."""
        return f"rm/{self.inputs.which}/{figure}"

    def train(self, *, first_step: int) -> Evaluated | None:
        """To the last optimizer step; `first_step` of them are in the newest checkpoint.

        Where its hours end it the model becomes the best one that was evaluated, which is returned.
        """
        plan = self.batches.plan
        log.info(
            "%d pairs and %d labelled responses to train on, %d pairs held out; %d optimizer steps of %d pairs in %d rows",
            len(self.examples.train),
            len(self.examples.labels),
            len(self.examples.validation),
            plan.num_steps,
            self.config.pairs_per_step,
            plan.rows_per_step,
        )
        if first_step == 0:
            self.measure(0)
        with StepProgress(self.inputs.step, steps=plan.num_steps, done=first_step) as progress:
            halving(
                cast(Session, self),  # `replace` gives a Session, where the type of self would ask for Self
                train=lambda session: session._train_on(progress),
                halve=Session._in_smaller_parts,
                step=self.inputs.step,
                section="reward",
                unit="pair",
            )
        return None if self.hours.ended_by is None else self.best.put(self.start.model)

    def _train_on(self, progress: StepProgress) -> None:
        """From the newest checkpoint, or from the beginning."""
        plan, tracking = self.batches.plan, self.inputs.tracking
        checkpoint = newest(self.inputs.folder.checkpoints)
        with tempfile.TemporaryDirectory() as scratch:

            def on_log(step: int, figures: dict[str, float]) -> None:
                loss = figures[self.name("loss")]
                check_finite(loss, f"{self.inputs.step}: the training loss at step {step}")
                epochs = step * self.config.pairs_per_step / len(self.examples.train)
                self.tracker.log(step, figures | {self.name("epoch"): min(epochs, self.config.epochs)})
                progress.step(step, f"loss {loss:.3f}")

            def on_step(step: int) -> bool:
                is_over = step < plan.num_steps and self.hours.are_over(f"step {step}")
                # At the last step too, and before its checkpoint: whoever resumes there has nothing to measure again.
                if step % tracking.eval_every == 0 or is_over or step == plan.num_steps:
                    loss, accuracy = self.measure(step)
                    progress.say(
                        f"{self.inputs.step} step {step}: held-out pairs {accuracy:.3f} right, loss {loss:.4f}"
                    )
                    if self.hours.are_limited:
                        figures = {self.name("eval_loss"): loss, self.name("eval_accuracy"): accuracy}
                        self.best.offer(Evaluated(step, loss, figures), self.start.model)
                return is_over

            assert self.inputs.which is not None
            names = names_of(self.inputs.which)
            watch = Watch(plan.tokens_per_step, names=names, on_log=on_log, on_step=on_step)
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
        """The same optimizer steps in rows of half the length; None where the longest is one pair already."""
        longest = self.batches.longest_row()
        if longest // 2 < LEAST_ROW_TOKENS:
            return None
        batches = smaller(self.batches, longest // 2)
        if batches.longest_row() == longest:  # a long pair has its row for itself
            return None
        log.warning(
            "%s: the device's memory is too small for a forward and backward pass with reward.row_tokens %d. Going on "
            "from the last optimizer step with %d; the pairs of each step stay the same. Set reward.row_tokens=%d to "
            "begin with that.",
            self.inputs.step,
            longest,
            longest // 2,
            longest // 2,
        )
        return replace(self, batches=batches)

    def _trainer(self, watch: Watch, scratch: Path) -> PackedRewardTrainer:
        config, tracking, plan = self.config, self.inputs.tracking, self.batches.plan
        arguments = trainer_arguments(
            config,
            folder=scratch,
            rows_per_step=plan.microbatches_per_step,
            seed=self.inputs.run.seed,
            log_every=tracking.log_every,
            save_every=tracking.save_every,
        )
        return PackedRewardTrainer(
            model=self.start.model,
            args=arguments,
            data_collator=collator(self.batches.collate),
            train_dataset=row_numbers(len(plan.rows)),
            processing_class=self.start.fast_tokenizer(scratch),
            optimizers=make_optimizer(self.start.model, config, steps=plan.num_steps),
            checkpoints=self.inputs.folder.checkpoints,
            before_save=self.tracker.sync,
            watch=watch,
            hours=self.hours,
            safety_auxiliary_weight=config.safety_auxiliary_weight,
        )

    def measure(self, step: int) -> tuple[float, float]:
        """Log ranking loss without margin and accuracy on held-out pairs at `step`, and return them."""
        started = time.monotonic()
        loss, accuracy = held_out_figures(self.start.model, self.examples.validation)
        check_finite(loss, f"{self.inputs.step}: the loss on held-out pairs at step {step}")
        figures = {self.name("eval_loss"): loss, self.name("eval_accuracy"): accuracy}
        self.tracker.log(step, figures | {"time/eval_s": time.monotonic() - started})
        return loss, accuracy

    def finish(self, folder: StepFolder, best: Evaluated | None) -> dict[str, float]:
        """Draw curves and figures, and return the step's final figures, those on test pairs among them."""
        draw_curves(folder.metrics, folder.curves)
        self.tracker.figure("curves", folder.curves)
        # From the record, since a resumed command has seen only the end of the training itself.
        record = list(MetricsRecord(folder.metrics).read())
        names = [*map(self.name, SUMMARY), "memory/peak_gib"]
        figures = {name: row[name] for row in record for name in names if row.get(name) is not None}
        figures["time/train_s"] = sum(row.get("time/step_s") or 0.0 for row in record)
        if best is not None:
            log.info("the weights of step %d are the best that were evaluated: they are published", best.step)
            figures |= best.figures
        started = time.monotonic()
        assert self.inputs.which is not None
        figures |= test_figures(self.start.model, self.inputs.which, self.examples, folder=folder, tracker=self.tracker)
        figures["time/eval_s"] = time.monotonic() - started
        return figures


__all__ = ["Session", "plan_training", "run"]
