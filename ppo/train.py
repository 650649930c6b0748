"""PPO (Llama 2, arXiv:2307.09288, section 3.2.3): prompts, a chat policy and reward models -> a policy with higher
scores.

In each iteration, the policy samples answers and both reward models score them. The gate combines the two scores; the
result is whitened over the batch and added to the last token's reward. Every token is penalised by its KL to the
starting policy. The critic provides the baseline, and policy and critic take a few clipped steps. Reads the prompts of
`data`; writes the step folder's metrics.jsonl, samples.jsonl, checkpoints/, summary.json, curves.png, figures/ and
artifact/. The published policy is the best evaluated one, not necessarily the last.
"""

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llamachat import distributed
from llamachat.answers.evaluation import (
    Evaluation,
    comparison,
    comparison_table,
    draw_comparison,
    superiority_over,
)
from llamachat.answers.packed import sequence_of
from llamachat.answers.session import AnswerSession
from llamachat.errors import DivergedError, RewardFunctionError
from llamachat.runs.artifacts import ITERATIONS_DONE, Artifact, StepFolder
from llamachat.runs.checkpoints import Checkpoint, newest, writing
from llamachat.runs.inputs import StepInputs
from llamachat.runs.record import MetricsRecord
from llamachat.runs.state import peak_memory
from llamachat.scoring.standardising import Constants
from llamachat.tracking.curves import draw_curves
from llamachat.tracking.diagnosis import Watch
from llamachat.tracking.tracker import Tracker, open_record
from llamachat.training.hours import Hours, open_hours
from llamachat.training.progress import StepProgress
from ppo.collapse import collapses
from ppo.config import CPU_ROW_TOKENS, Config
from ppo.experience import check_engine_gap, iteration_figures, make_experience, model_outputs, split_minibatches
from ppo.session import evaluate, heldout_figures, mean_kl, open_ppo, publish_policy, show
from ppo.state import GUARDS, State, first_coefficient, load_state, policy_weights
from ppo.update import Updater, make_optimizers

if TYPE_CHECKING:
    from llamachat.models.roles import RoleBank

log = logging.getLogger(__name__)

AS_GOOD = 0.5  # superiority of a policy over itself
NEGATIVE_KL = (
    "a KL slightly below 0 is sampling noise: it is estimated from the sampled tokens, and only its expectation cannot be"
    " negative. ppo/kl_k3 estimates the same quantity and is never negative."
)
BEST = "best"  # next to the checkpoints: the best policy of a training that diverged

# Metrics whose last value is written to summary.json, in addition to the comparison on test prompts.
SUMMARY = (
    "ppo/reward/combined",
    "ppo/reward/helpfulness",
    "ppo/reward/safety",
    "ppo/kl_to_reference",
    "ppo/entropy",
    "ppo/response_tokens",
    "ppo/truncated_fraction",
    "ppo/heldout/score",
    "ppo/heldout/superiority",
    "memory/peak_gib",
)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train, evaluate and publish; a killed step resumes from its newest complete checkpoint."""
    session = open_ppo(config, inputs)
    frozen_digest = session.bank.frozen_digest()
    checkpoint = distributed.broadcast_object(newest(inputs.folder.checkpoints))
    with open_record(inputs, "ppo", resume_step=checkpoint.step if checkpoint else None) as tracker:
        training = start_or_resume(config, session, tracker, checkpoint, frozen_digest)
        training.train()
        # Written before the artifact, which marks the step as finished: a resumed command would skip it.
        tracker.summary(training.finish())
        state = training.state
        notes = {"iteration": state.best_iteration, ITERATIONS_DONE: state.iteration, "end": state.end}
        return training.publish(inputs.folder, notes | training.hours.details)


def start_or_resume(
    config: Config, session: AnswerSession, tracker: Tracker, checkpoint: Checkpoint | None, frozen_digest: str
) -> "Training":
    """The training resumed from a checkpoint, or a new one, whose starting policy is evaluated first."""
    inputs, bank = session.inputs, session.bank
    row_tokens = config.tokens_per_microbatch
    if row_tokens == "auto":
        row_tokens = CPU_ROW_TOKENS if bank.device.type == "cpu" else 2 * inputs.base.max_tokens
    saved = checkpoint.path if checkpoint else None
    hours = open_hours(inputs.step, "ppo", config.max_hours, inputs.deadline, saved)
    if saved is None:
        state = first_state(config, session, tracker, row_tokens)
        optimizers = make_optimizers(bank, config)
    else:
        optimizers = make_optimizers(bank, config)
        state = load_state(saved, bank, optimizers, first_coefficient(config))
    temperature = inputs.rollout.temperature
    updater = Updater(bank, optimizers, config, temperature=temperature, row_tokens=row_tokens, step=inputs.step)
    watch = Watch(MetricsRecord(inputs.folder.metrics).read())
    return Training(config, session, updater, state, tracker, watch, hours, row_tokens, frozen_digest)


def first_state(config: Config, session: AnswerSession, tracker: Tracker, row_tokens: int) -> State:
    """Evaluate the starting policy, the baseline of all comparisons, and fit the critic to the rewards."""
    started = time.monotonic()
    validation, constants = evaluate(session, session.prompts.validation, None, row_tokens)
    first_test, _ = evaluate(session, session.prompts.test, constants, row_tokens)
    if session.inputs.scoring.shaping != "none":
        whiten_critic(session.bank, constants)
    figures = heldout_figures(validation, validation, superiority=AS_GOOD)
    tracker.log(0, figures | {"time/eval_s": time.monotonic() - started})
    show(tracker, 0, session, validation)
    return State(
        kl=first_coefficient(config),
        constants=constants,
        first_validation=validation,
        first_test=first_test,
        best_iteration=0,
        best_superiority=AS_GOOD,
        best_weights=policy_weights(session.bank),
    )


def whiten_critic(bank: "RoleBank", constants: Constants) -> None:
    """Rescale the critic's head to whitened units: initialised from a reward model, it predicts raw scores.

    A zero head is left unchanged, since whitened returns have mean 0.
    """
    scales = {"helpfulness": constants.helpfulness, "safety": constants.safety}
    scale = scales.get(bank.critic_begins_as or "")
    if scale is not None:
        bank.scale_critic(mean=scale.mean, std=scale.deviation)


@dataclass(slots=True)
class Training:
    """One PPO run: models, optimizers, progress and tracker."""

    config: Config
    session: AnswerSession
    updater: Updater
    state: State
    tracker: Tracker
    watch: Watch
    hours: Hours
    row_tokens: int  # of evaluations
    frozen_digest: str  # of all weights that are not trained

    def train(self) -> None:
        """Train until the last iteration, a guard or the time budget ends it."""
        config, state, prompts, step = self.config, self.state, self.session.prompts, self.session.inputs.step
        log.info(
            "%d training, %d validation and %d test prompts; at most %d iterations of %d responses, with %d optimizer steps each",
            len(prompts.train),
            len(prompts.validation),
            len(prompts.test),
            config.iterations,
            config.responses_per_iteration,
            config.epochs * (config.responses_per_iteration // config.responses_per_minibatch),
        )
        is_explained = False
        with StepProgress(step, steps=config.iterations, done=state.iteration) as progress:
            while state.end is None or state.unvalidated is not None:
                try:
                    figures = self.iterate_and_validate(progress)
                except DivergedError as error:
                    raise self._with_best_policy(error) from None
                except RewardFunctionError:
                    self._save_here()
                    raise
                if state.iteration % self.session.inputs.tracking.log_every == 0 or "ppo/heldout/score" in figures:
                    self.tracker.log(state.iteration, figures)
                    for finding in self.watch.add(state.iteration, figures):
                        log.warning("%s: %s", step, finding.sentence())
                reward, kl = figures["ppo/reward/combined"], figures["ppo/kl_to_reference"]
                kl = round(kl, 2) + 0.0  # avoids -0.0
                progress.step(state.iteration, f"reward {reward:+.3f}  KL {kl:.2f}")
                if kl < 0 and not is_explained:
                    progress.say(f"{step}: {NEGATIVE_KL}")
                    is_explained = True
                if state.end is not None or state.iteration % config.save_every == 0:
                    self.save()

    def iterate_and_validate(self, progress: StepProgress) -> dict[str, float]:
        """Run an iteration and its evaluation, or only the evaluation if a checkpoint was saved between the two."""
        state = self.state
        figures = state.unvalidated
        if figures is None:
            figures = self.iterate()
            state.iteration += 1
            self._check_end(figures)
            if state.end == "kl_guard" or not (state.end or state.iteration % self.config.validation_every == 0):
                return figures
            state.unvalidated = figures
        figures = figures | self.validate(progress)
        state.unvalidated = None
        return figures

    def iterate(self) -> dict[str, float]:
        """Sample, score and update; return the figures of the iteration."""
        config, session, state, bank = self.config, self.session, self.state, self.session.bank
        began = time.monotonic()
        prompts = session.prompts.batch(
            state.iteration,
            count=config.responses_per_iteration // config.responses_per_prompt,
            seed=session.inputs.run.seed,
        )
        session.refresh()
        responses = session.sample(
            prompts, session.sampling(state.iteration + 1), samples_per_prompt=config.responses_per_prompt
        )
        session.engine.release()  # free its memory for the update
        sampled = time.monotonic()
        sequences = [sequence_of(response) for response in responses]
        minibatches = split_minibatches(
            sequences,
            responses_per_minibatch=config.responses_per_minibatch,
            row_tokens=self.updater.row_tokens,
            device=bank.device,
        )
        rows = [row for minibatch in minibatches for row in minibatch.rows]
        temperature, scoring = session.inputs.rollout.temperature, session.inputs.scoring
        outputs = model_outputs(bank, sequences, rows, temperature=temperature, with_values=bank.has_critic)
        scored = session.scorer.score(responses, with_judge=False)
        kl_coef = state.kl.coef
        experience = make_experience(
            responses,
            sequences,
            minibatches,
            outputs,
            scored,
            config=config,
            scoring=scoring,
            kl_coef=kl_coef,
            limit=session.inputs.rollout.max_new_tokens,
            start_tokens=state.first_validation.figures()["response_tokens"],
        )
        figures = iteration_figures(responses, outputs, scored, experience, kl_coef=kl_coef)
        check_engine_gap(figures, session.inputs.step)
        judged = time.monotonic()
        trains_policy = state.iteration >= config.critic_warmup
        figures |= self.updater.update(experience, trains_policy=trains_policy)
        ended = time.monotonic()
        state.kl = state.kl.after(figures["ppo/kl_to_reference"])
        tokens = sum(len(sequence.response) for sequence in sequences)
        return figures | {
            "optim/learning_rate": config.learning_rate if trains_policy else 0.0,
            "time/rollout_s": sampled - began,
            "time/score_s": judged - sampled,
            "time/update_s": ended - judged,
            "time/step_s": ended - began,
            "throughput/rollout_tokens_per_s": tokens / max(sampled - began, 1e-9),
            "throughput/tokens_per_s": sum(len(sequence.ids) for sequence in sequences) / max(ended - began, 1e-9),
            "memory/peak_gib": peak_memory(),
        }

    def _check_end(self, figures: dict[str, float]) -> None:
        """End training if the KL guard triggers, after the last iteration, or when the time budget is used up."""
        state, config, kl = self.state, self.config, figures["ppo/kl_to_reference"]
        if config.kl_guard is not None and kl > config.kl_guard:
            self._end_by_guard(kl, "this iteration's responses")
        elif state.iteration >= config.iterations:
            state.end = "iterations"
        elif self.hours.are_over(f"iteration {state.iteration}"):
            state.end = self.hours.ended_by

    def validate(self, progress: StepProgress) -> dict[str, float]:
        """Evaluate on validation prompts, keep the policy if it is the best, and check guards and patience."""
        state, config, session = self.state, self.config, self.session
        started = time.monotonic()
        session.refresh()
        evaluation, _ = evaluate(session, session.prompts.validation, state.constants, self.row_tokens)
        superiority = superiority_over(state.first_validation, evaluation).value
        if config.kl_guard is not None and mean_kl(evaluation) > config.kl_guard:
            self._end_by_guard(mean_kl(evaluation), "validation prompts")
        elif faults := self._collapses(evaluation):
            self._end_by_collapse(faults)
        else:
            state.offer(superiority, session.bank)
            is_patient = config.patience is None or state.evaluations_without_better < config.patience
            if state.end is None and not is_patient:
                state.end = "patience"
        show(self.tracker, state.iteration, session, evaluation)
        progress.say(
            f"{session.inputs.step} iteration {state.iteration}: validation answers rank above those of the start in "
            f"{superiority:.1%} of pairs (best {state.best_superiority:.1%} at {state.best_iteration}), "
            f"KL {mean_kl(evaluation):.2f}"
        )
        figures = heldout_figures(evaluation, state.first_validation, superiority=superiority)
        return figures | {"time/eval_s": time.monotonic() - started}

    def save(self) -> None:
        """Save a checkpoint of the finished iterations."""
        if distributed.is_first():
            self._save_here()
        distributed.wait()

    def _save_here(self) -> None:
        """Save a checkpoint from this process: the first, the only one that calls a reward function."""
        self.tracker.sync()
        with writing(self.session.inputs.folder.checkpoints, self.state.iteration) as side:
            self.state.save(side, self.session.bank, self.updater.optimizers)
            self.hours.save(side)

    def finish(self) -> dict[str, float]:
        """Load the best policy, compare it with the starting one on test prompts and draw; return the final figures."""
        folder, state, session = self.session.inputs.folder, self.state, self.session
        state.put_best(session.bank)
        if state.best_iteration == 0:
            advice = " More iterations, a higher ppo.learning_rate or a lower ppo.kl_coef may help."
            log.warning(
                "%s: no evaluated policy ranks above the starting one on validation prompts, so the starting one is published "
                "again.%s",
                session.inputs.step,
                "" if state.end in GUARDS else advice,
            )
        else:
            log.info("ended by %s; the policy of iteration %d is the best", state.end, state.best_iteration)
        started = time.monotonic()
        session.refresh()
        final, _ = evaluate(session, session.prompts.test, state.constants, self.row_tokens)
        figures = comparison("ppo", state.first_test, final)
        log.info("%s", comparison_table("ppo", figures))
        draw_curves(folder.metrics, folder.curves)
        self.tracker.figure("curves", folder.curves)
        picture = folder.figures / "test_scores.png"
        draw_comparison(state.first_test, final, picture)
        self.tracker.figure("test_scores", picture)
        # From the metrics file, since a resumed process has only seen the end of the training.
        record = list(MetricsRecord(folder.metrics).read())
        last: dict[str, float] = {name: row[name] for row in record for name in SUMMARY if row.get(name) is not None}
        last["time/train_s"] = sum(row.get("time/step_s") or 0.0 for row in record)
        best = {"ppo/best_iteration": float(state.best_iteration), "ppo/best_superiority": state.best_superiority}
        return last | best | figures | {"time/eval_s": time.monotonic() - started}

    def publish(self, folder: StepFolder, notes: dict[str, Any]) -> Artifact:
        """Publish the policy in this folder."""
        assert self.session.bank.frozen_digest() == self.frozen_digest, "reference and reward models are never written"
        return publish_policy(self.session, folder, notes)

    def _end_by_guard(self, kl: float, where: str) -> None:
        log.warning(
            "%s: KL to the starting policy is %.1f nats per response on %s at iteration %d, over ppo.kl_guard (%g). "
            "Training ends here, and the best policy below the limit is published (iteration %d). A higher ppo.kl_coef "
            "or a lower ppo.learning_rate keeps the policy closer.",
            self.session.inputs.step,
            kl,
            where,
            self.state.iteration,
            self.config.kl_guard,
            self.state.best_iteration,
        )
        self.state.end = "kl_guard"

    def _collapses(self, evaluation: Evaluation) -> list[str]:
        guard = self.config.collapse_guard
        return collapses(evaluation, self.state.first_validation, guard) if guard is not None else []

    def _end_by_collapse(self, faults: list[str]) -> None:
        log.warning(
            "%s: the answers to validation prompts have collapsed at iteration %d, by the bounds of ppo.collapse_guard: %s."
            " Training ends here, and the best policy before is published (iteration %d). A higher ppo.kl_coef or a lower "
            "ppo.learning_rate stays closer to the start, scoring.length holds the length; without the guard "
            "(ppo.collapse_guard=null) training continues.",
            self.session.inputs.step,
            self.state.iteration,
            "; ".join(faults),
            self.state.best_iteration,
        )
        self.state.end = "collapse_guard"

    def _with_best_policy(self, error: DivergedError) -> DivergedError:
        """Publish the best policy so far and return the error with its path added."""
        state, session = self.state, self.session
        if state.best_iteration == 0:
            return error
        state.put_best(session.bank)
        place = StepFolder(session.inputs.folder.checkpoints / BEST)
        self.publish(place, {"iteration": state.best_iteration, "end": "diverged"})
        return DivergedError(
            f"{error} The best policy so far, of iteration {state.best_iteration}, is in {place.artifact}: you can chat "
            "with it, and name it in base.policy."
        )
