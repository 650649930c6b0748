"""PPO (Llama 2, arXiv:2307.09288, section 3.2.3): prompts, a chat policy and reward models -> a policy they like better.

An iteration: answers are sampled from the policy; both reward models score them, the gate makes one score of two, which
is whitened over the batch and put on the last token; every token pays for its distance from the starting policy; the
critic says what was expected, and policy and critic take a few clipped steps. Reads the prompts of `data`; writes the
step folder's metrics.jsonl, samples.jsonl, checkpoints/, summary.json, curves.png, figures/ and artifact/. One thing
surprises: what is published is the best of the policies that were evaluated, which may be an earlier one than the last.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging as transformers_logging

from llamachat import distributed
from llamachat.answers.evaluation import Evaluation, comparison, comparison_table
from llamachat.answers.packed import sequence_of
from llamachat.answers.pictures import draw_comparison, histograms, sample_rows
from llamachat.answers.responses import open_engine, refresh, sample
from llamachat.errors import DivergedError
from llamachat.maths.logprobs import response_kl
from llamachat.rollout.engine import LocalEngine, Sampling
from llamachat.runs.artifacts import ITERATIONS_DONE, Artifact
from llamachat.runs.checkpoints import newest, writing
from llamachat.runs.cost import peak_memory
from llamachat.runs.folder import StepFolder
from llamachat.runs.inputs import StepInputs
from llamachat.runs.record import MetricsRecord
from llamachat.tracking.curves import draw_curves
from llamachat.tracking.tracker import Tracker, open_tracker
from llamachat.training.progress import StepProgress
from ppo.config import CPU_ROW_TOKENS, Config
from ppo.evaluation import Evaluator, heldout_figures, mean_kl
from ppo.experience import cut, make_experience, measure
from ppo.figures import iteration_figures
from ppo.kl_control import AdaptiveKl, FixedKl
from ppo.start import Start, open_start, publish_policy
from ppo.state import End, State, load_state, policy_weights, put_best, save_state
from ppo.update import Optimizers, Updater, make_optimizers

log = logging.getLogger(__name__)

SHOWN = 16  # answers a person is shown of each evaluation
BEST = "best"  # beside the checkpoints: the best policy of a training that broke

# Seeds of what is sampled: iteration i has i + 1, held-out prompts have 0 in every evaluation.
_SEEDS = 1_000_003

# What summary.json says of a training beside the comparison on test prompts, each one's last value.
SUMMARY = (
    "ppo/reward/combined",
    "ppo/reward/helpfulness",
    "ppo/reward/safety",
    "ppo/kl_to_reference",
    "ppo/entropy",
    "ppo/response_tokens",
    "ppo/truncated_fraction",
    "ppo/heldout/score",
    "memory/peak_gib",
)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train, measure and publish. Killed at any moment, the same call goes on from the newest whole checkpoint."""
    # Its bars for loading and writing weights would break up ours.
    transformers_logging.disable_progress_bar()
    folder = inputs.folder
    start = open_start(config, inputs)
    resume = distributed.broadcast_object(newest(folder.checkpoints))
    with open_tracker(
        inputs.tracking,
        step_folder=folder,
        run_dir=Path(inputs.run.dir),
        step=inputs.step,
        prefix="ppo",
        config=inputs.identity,
        resume_step=resume.step if resume else None,
    ) as tracker:
        session = open_session(config, inputs, start, tracker)
        session.train()
        # Before the artifact, which ends the step: a command killed between the two would never come back to write it.
        tracker.summary(session.finish())
        state = session.state
        notes = {"iteration": state.best_iteration, ITERATIONS_DONE: state.iteration, "end": state.end}
        return publish_policy(start, inputs, folder, notes=notes | ended_by(state.end))


def ended_by(end: End | None) -> dict[str, str]:
    """Which hours ended the training, in the words of the other steps' manifests; nothing where none did."""
    keys: dict[End | None, str] = {"hours": "max_hours", "run_hours": "run.max_hours"}
    return {"ended_by": keys[end]} if end in keys else {}


def open_session(config: Config, inputs: StepInputs, start: Start, tracker: Tracker) -> "Session":
    """Engine, optimizers and state: those of the newest checkpoint, or new ones."""
    bank = start.bank
    engine = open_engine(bank, inputs.rollout)
    row_tokens = config.tokens_per_microbatch
    if row_tokens == "auto":
        row_tokens = CPU_ROW_TOKENS if bank.device.type == "cpu" else 2 * inputs.base.max_tokens
    held_out = Sampling(
        temperature=inputs.rollout.temperature,
        top_p=1.0,
        max_new_tokens=inputs.rollout.max_new_tokens,
        seed=inputs.run.seed * _SEEDS,
    )
    evaluator = Evaluator(bank, engine, start.scorer, held_out, row_tokens)
    checkpoint = distributed.broadcast_object(newest(inputs.folder.checkpoints))
    kl = controller(config)
    if checkpoint is None:
        state = first_state(config, inputs, start, evaluator, tracker, kl)
        optimizers = make_optimizers(bank, config)
    else:
        optimizers = make_optimizers(bank, config)
        state = load_state(checkpoint.path, bank, optimizers, kl)
    return Session(config, inputs, start, engine, evaluator, optimizers, state, tracker, row_tokens)


def controller(config: Config) -> FixedKl | AdaptiveKl:
    """The coefficient of the KL penalty as training begins."""
    if config.kl_control == "adaptive":
        return AdaptiveKl(config.kl_coef, target=config.kl_target, gain=config.kl_gain)
    return FixedKl(config.kl_coef)


def first_state(
    config: Config, inputs: StepInputs, start: Start, evaluator: Evaluator, tracker: Tracker, kl: FixedKl | AdaptiveKl
) -> State:
    """Measure the starting policy, which is what all later ones are compared with, and fit the critic to the rewards."""
    started = time.monotonic()
    bank, prompts = start.bank, start.prompts
    validation, constants = evaluator.evaluate(prompts.validation, None)
    first_test, _ = evaluator.evaluate(prompts.test, constants)
    if inputs.scoring.shaping != "none":
        # The critic's head predicts raw scores, and rewards come whitened.
        scale = constants.helpfulness or constants.safety
        if scale is not None:
            bank.scale_critic(mean=scale.mean, std=scale.deviation)
    tracker.log(0, heldout_figures(validation) | {"time/eval_s": time.monotonic() - started})
    show(tracker, 0, start, validation)
    return State(
        kl=kl,
        constants=constants,
        first_test=first_test,
        best_iteration=0,
        best_score=validation.score,
        best_weights=policy_weights(bank),
    )


def show(tracker: Tracker, iteration: int, start: Start, evaluation: Evaluation) -> None:
    """Samples with their scores, and histograms."""
    prompts = [prompt.messages[-1].content for prompt in start.prompts.validation]
    tracker.samples(iteration, sample_rows(evaluation, prompts, count=SHOWN))
    for name, values in histograms(evaluation).items():
        tracker.histogram(iteration, f"histogram/{name}", values)


@dataclass(slots=True)
class Session:
    """One training: what is trained, with what, how far it is, and who is told."""

    config: Config
    inputs: StepInputs
    start: Start
    engine: LocalEngine
    evaluator: Evaluator
    optimizers: Optimizers
    state: State
    tracker: Tracker
    row_tokens: int

    def train(self) -> None:
        """To the last iteration, or to where a guard ends it."""
        config, state = self.config, self.state
        log.info(
            "%d prompts to train on, %d to validate and %d to test with; at most %d iterations of %d responses, %d steps each",
            len(self.start.prompts.train),
            len(self.start.prompts.validation),
            len(self.start.prompts.test),
            config.iterations,
            config.responses_per_iteration,
            config.epochs * (config.responses_per_iteration // config.responses_per_minibatch),
        )
        updater = Updater(
            self.start.bank,
            self.optimizers,
            config,
            temperature=self.inputs.rollout.temperature,
            row_tokens=self.row_tokens,
            step=self.inputs.step,
        )
        with StepProgress(self.inputs.step, steps=config.iterations, done=state.iteration) as progress:
            while state.end is None:
                try:
                    self.iterate(updater, progress)
                except DivergedError as error:
                    raise self._with_way_out(error) from None
                if state.end is not None or state.iteration % config.save_every == 0:
                    self.save()

    def iterate(self, updater: Updater, progress: StepProgress) -> None:
        """One iteration, its evaluation where one is due, and what ends the training."""
        state, config = self.state, self.config
        figures = self.step(updater)
        state.iteration += 1
        state.seconds += figures["time/step_s"]
        guard = config.kl_guard
        if guard is not None and figures["ppo/kl_to_reference"] > guard:
            self._end_by_guard(figures["ppo/kl_to_reference"], "this iteration's responses")
        elif state.iteration >= config.iterations:
            state.end = "iterations"
        else:
            state.end = distributed.broadcast_object(self._ended_by_hours())
            if state.end == "hours":
                log.warning(
                    "%s: ppo.max_hours (%g) are over at iteration %d",
                    self.inputs.step,
                    config.max_hours,
                    state.iteration,
                )
            elif state.end == "run_hours":
                log.warning("%s: run.max_hours are over at iteration %d", self.inputs.step, state.iteration)
        if state.end != "kl_guard" and (state.end or state.iteration % config.validation_every == 0):
            figures |= self.evaluate(progress)
        if state.iteration % self.inputs.tracking.log_every == 0 or "ppo/heldout/score" in figures:
            self.tracker.log(state.iteration, figures)
        reward, kl = figures["ppo/reward/combined"], figures["ppo/kl_to_reference"]
        progress.step(state.iteration, f"reward {reward:+.3f}  KL {kl:.2f}")

    def step(self, updater: Updater) -> dict[str, float]:
        """Sample, score, learn; the figures of it."""
        config, inputs, state, bank = self.config, self.inputs, self.state, self.start.bank
        began = time.monotonic()
        prompts = self.start.prompts.batch(state.iteration, count=config.responses_per_iteration, seed=inputs.run.seed)
        sampling = Sampling(
            temperature=inputs.rollout.temperature,
            top_p=1.0,
            max_new_tokens=inputs.rollout.max_new_tokens,
            seed=inputs.run.seed * _SEEDS + state.iteration + 1,
        )
        refresh(self.engine, bank)
        responses = sample(self.engine, bank.chat_format, prompts, sampling)
        sampled = time.monotonic()
        sequences = [sequence_of(response) for response in responses]
        minibatches = cut(
            sequences,
            responses_per_minibatch=config.responses_per_minibatch,
            row_tokens=updater.row_tokens,
            device=bank.device,
        )
        rows = [row for minibatch in minibatches for row in minibatch.rows]
        measured = measure(bank, sequences, rows, temperature=sampling.temperature, with_values=True)
        scored = self.start.scorer.score(responses, with_judge=False)
        experience = make_experience(
            responses, minibatches, measured, scored, config=config, scoring=inputs.scoring, kl_coef=state.kl.coef
        )
        figures = iteration_figures(responses, measured, scored, experience, kl_coef=state.kl.coef)
        judged = time.monotonic()
        figures |= updater.update(experience, trains_policy=state.iteration >= config.critic_warmup)
        ended = time.monotonic()
        kl_B = response_kl(measured.token_kl(), response_mask_BR=measured.response_mask_BR)
        state.kl = state.kl.after(float(kl_B.mean()))
        tokens = sum(len(sequence.response) for sequence in sequences)
        return figures | {
            "optim/learning_rate": config.learning_rate if state.iteration >= config.critic_warmup else 0.0,
            "time/rollout_s": sampled - began,
            "time/score_s": judged - sampled,
            "time/update_s": ended - judged,
            "time/step_s": ended - began,
            "throughput/rollout_tokens_per_s": tokens / max(sampled - began, 1e-9),
            "throughput/tokens_per_s": sum(len(sequence.ids) for sequence in sequences) / max(ended - began, 1e-9),
            "memory/peak_gib": peak_memory(),
        }

    def evaluate(self, progress: StepProgress) -> dict[str, float]:
        """The policy on validation prompts: keep it if it is the best, end where it strays or gets no better."""
        state, config = self.state, self.config
        started = time.monotonic()
        refresh(self.engine, self.start.bank)
        evaluation, _ = self.evaluator.evaluate(self.start.prompts.validation, state.constants)
        guard = config.kl_guard
        if guard is not None and mean_kl(evaluation) > guard:
            self._end_by_guard(mean_kl(evaluation), "validation prompts")
        else:
            state.offer(evaluation.score, self.start.bank)
            if (
                state.end is None
                and config.patience is not None
                and state.evaluations_without_better >= config.patience
            ):
                state.end = "patience"
        show(self.tracker, state.iteration, self.start, evaluation)
        progress.say(
            f"{self.inputs.step} iteration {state.iteration}: validation prompts score {evaluation.score:+.3f} "
            f"(best {state.best_score:+.3f} at {state.best_iteration}), KL {mean_kl(evaluation):.2f}"
        )
        return heldout_figures(evaluation) | {"time/eval_s": time.monotonic() - started}

    def save(self) -> None:
        """A checkpoint of the finished iterations."""
        self.tracker.sync()
        if distributed.is_first():
            with writing(self.inputs.folder.checkpoints, self.state.iteration) as side:
                save_state(side, self.state, self.start.bank, self.optimizers)
        distributed.wait()

    def finish(self) -> dict[str, float]:
        """Make the best policy the bank's, compare it with the first on test prompts, draw; the final figures."""
        folder, state = self.inputs.folder, self.state
        put_best(state, self.start.bank)
        if state.best_iteration == 0:
            log.warning(
                "%s: no evaluated policy scored above the starting one on validation prompts, so that one is published "
                "again. More iterations, a higher ppo.learning_rate or a lower ppo.kl_coef may help.",
                self.inputs.step,
            )
        else:
            log.info("ended by %s; the policy of iteration %d is the best", state.end, state.best_iteration)
        started = time.monotonic()
        refresh(self.engine, self.start.bank)
        final, _ = self.evaluator.evaluate(self.start.prompts.test, state.constants)
        figures = comparison("ppo", state.first_test, final)
        log.info("%s", comparison_table("ppo", figures))
        draw_curves(folder.metrics, folder.curves)
        self.tracker.figure("curves", folder.curves)
        picture = folder.figures / "test_scores.png"
        draw_comparison(state.first_test, final, picture)
        self.tracker.figure("test_scores", picture)
        # From the record, since a resumed command has seen only the end of the training itself.
        record = list(MetricsRecord(folder.metrics).read())
        last: dict[str, float] = {name: row[name] for row in record for name in SUMMARY if row.get(name) is not None}
        last["time/train_s"] = sum(row.get("time/step_s") or 0.0 for row in record)
        best = {"ppo/best_iteration": float(state.best_iteration), "ppo/best_score": state.best_score}
        return last | best | figures | {"time/eval_s": time.monotonic() - started}

    def _ended_by_hours(self) -> End | None:
        limit, deadline = self.config.max_hours, self.inputs.deadline
        if limit is not None and self.state.seconds > 3600 * limit:
            return "hours"
        return "run_hours" if deadline is not None and time.monotonic() > deadline else None

    def _end_by_guard(self, kl: float, where: str) -> None:
        state = self.state
        log.warning(
            "%s: KL to the starting policy is %.1f nats a response on %s at iteration %d, over ppo.kl_guard (%g). Training "
            "ends here, and the best policy under it is published (iteration %d). A higher ppo.kl_coef or a lower "
            "ppo.learning_rate stays closer.",
            self.inputs.step,
            kl,
            where,
            state.iteration,
            self.config.kl_guard,
            state.best_iteration,
        )
        state.end = "kl_guard"

    def _with_way_out(self, error: DivergedError) -> DivergedError:
        """The error, and where the best policy so far lies."""
        state = self.state
        if state.best_iteration == 0:
            return error
        put_best(state, self.start.bank)
        place = StepFolder(self.inputs.folder.checkpoints / BEST)
        notes: Mapping[str, object] = {"iteration": state.best_iteration, "end": "diverged"}
        publish_policy(self.start, self.inputs, place, notes=notes)
        return DivergedError(
            f"{error} The best policy so far, of iteration {state.best_iteration}, is in {place.artifact}: it can be talked "
            "to and named in base.policy."
        )
