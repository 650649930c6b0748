"""One round of rejection sampling (Llama 2, arXiv:2307.09288, section 3.2.3): prompts, a policy and reward models ->
dialogs of the best answers -> a policy tuned on them.

The policy samples K answers to each prompt and the reward models score them. The best answer becomes a new gold answer,
pooled with those of all earlier rounds, and the policy is fine-tuned on the pool as in supervised tuning. Writes the
step folder's sampling/, metrics.jsonl, samples.jsonl, dialogs/, figures/, summary.json and, through the tuning,
artifact/. A killed step resumes after its last complete batch. If `max_hours` ends sampling early, the answers sampled
so far are used; batches are interchangeable.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from llamachat.answers.dialog_step import BatchResult, DialogStep, batch_costs, check_choice, counted, step_costs
from llamachat.answers.evaluation import comparison_table
from llamachat.answers.groups import Group, Sampler, batches_of, sample_groups
from llamachat.answers.scorer import longest_prompt
from llamachat.answers.session import AnswerSession, open_session
from llamachat.data.prompts import EncodedPrompt
from llamachat.errors import DataError
from llamachat.rollout.engine import Sampling
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.standardising import Constants
from llamachat.tables import plural
from llamachat.tracking.tracker import Tracker
from rejection_sampling.config import Config
from rejection_sampling.sweep import load_sampler, round_temperatures, run_sweep, sweep_figures
from rejection_sampling.winners import Winner, earlier_winners, filtered, pooled_winners, winner_line, winners_of

log = logging.getLogger(__name__)

# Seeds differ by round: each round answers the same prompts in the same order, so with equal seeds a policy that
# changed little would give the same answers again.
_SEEDS_OF_A_ROUND = 10**9
_SHOWN = 4  # prompts per batch whose best and worst answers are logged


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Sample, choose, pool and publish the dialogs; tune on them; compare; finish the step."""
    step = dialog_step(config, inputs)
    is_from_base = config.start == "base"
    return step.run(
        make_dialogs=lambda: make_dialogs(config, step),
        compare=lambda tuned: compare(config, step, tuned),
        sft=config.sft,
        from_base=is_from_base,
        sft_share=1.0 if is_from_base else 0.0,
    )


def dialog_step(config: Config, inputs: StepInputs) -> DialogStep:
    return DialogStep(inputs, section="rejection_sampling", prefix="rs", max_hours=config.max_hours)


def make_dialogs(config: Config, step: DialogStep) -> Artifact:
    """Sample, choose and publish the dialogs; cached answers are not sampled again."""
    inputs = step.inputs
    check_choice(
        inputs,
        "rejection_sampling",
        temperature=config.temperature,
        samples=config.samples_per_prompt,
        otherwise="rejection_sampling.temperature to sweep",
    )
    session = _open(config, inputs, inputs.policy)
    # Before sampling: a line broken by an edit is reported now, not after hours.
    longest = longest_prompt(inputs.base, inputs.rollout, session.bank)
    earlier = earlier_winners(inputs.pooled, session.chat_format, max_tokens=longest, dropped=step.dropped)
    with step.record() as tracker:
        _, constants = step.first_evaluation(session)
        sampler = None if config.sampler is None else load_sampler(config.sampler, session)
        curves = run_sweep(config, step, session, constants, sampler)
        temperatures = round_temperatures(config, inputs.rollout.temperature, curves)
        step.hours.save(step.cache.folder)  # a sweep uses part of the time budget
        sampled = Round(config, step, session, constants, temperatures, sampler)
        figures = sampled.sample(tracker)
        pool = pooled_winners(
            session.scorer,
            sampled.winners,
            earlier,
            keeps_all=config.pool == "all",
            draw_seed=_draw_seed(config, inputs),
        )
        if not pool:
            raise DataError(
                f"{inputs.step}: no answer can be trained on ({counted(step.dropped)}). Raise rollout.max_new_tokens or "
                "rejection_sampling.samples_per_prompt, or tune the policy (`make sft`) until its answers end."
            )
        from_earlier = sum(winner.round != inputs.step for winner in pool)
        log.info(
            "%d winners in the pool, %d of them from earlier rounds (%s); %s",
            len(pool),
            from_earlier,
            ", ".join(inputs.pooled) or "none",
            counted(step.dropped),
        )
        pool_figures = {"rs/pool_size": float(len(pool)), "rs/pool_from_earlier": float(from_earlier)}
        step.end_sampling(tracker, figures | sweep_figures(curves, samples=config.samples_per_prompt) | pool_figures)
    return step.publish(
        [winner_line(winner) for winner in pool],
        [winner_line(winner) for winner in sampled.held_out],
        details={"temperatures": list(temperatures)},
        dropped=session.prompts.dropped,
        earlier=inputs.pooled,
    )


def compare(config: Config, step: DialogStep, tuned: Artifact) -> dict[str, float]:
    """Compare the tuned policy with the previous one on test prompts; return the final figures and draw plots."""
    _, _, figures = step.compare(_open(config, step.inputs, tuned))
    log.info("%s", comparison_table("rs", figures))
    if config.select == "best" and figures["rs/test/superiority"] <= 0.5:
        log.warning(
            "%s: the tuned policy does not rank above the one before on test prompts. More prompts or a larger K, more "
            "epochs (rejection_sampling.sft), or a more accurate reward model may help.",
            step.inputs.step,
        )
    return figures


def _draw_seed(config: Config, inputs: StepInputs) -> int | None:
    """The seed with which the control draws random answers; None if the best answer is selected."""
    return inputs.run.seed if config.select == "random" else None


def _open(config: Config, inputs: StepInputs, policy: Artifact | None) -> AnswerSession:
    held_out = (max(config.validation_prompts, config.sweep_prompts), config.test_prompts)
    return open_session(inputs, policy=policy, held_out=held_out)


@dataclass(slots=True)
class Round:
    """Samples K answers to each prompt, batch by batch, and selects the winners."""

    config: Config
    step: DialogStep
    session: AnswerSession
    constants: Constants
    temperatures: tuple[float, ...]
    sampler: Sampler | None
    winners: list[Winner] = field(default_factory=list)
    held_out: list[Winner] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # number of prompts of each training batch

    def sample(self, tracker: Tracker) -> dict[str, float]:
        """Sample all batches that are not cached; return mean figures over the training prompts."""
        config, prompts, count = self.config, self.session.prompts, self.config.samples_per_prompt
        selected = prompts.drawn(config.prompts, seed=self.step.inputs.run.seed)
        temperatures = ", ".join(f"{temperature:g}" for temperature in self.temperatures)
        log.info(
            "%s, %s each at temperature %s", plural(len(selected), "prompt"), plural(count, "answer"), temperatures
        )
        rows = self.step.make_batches(
            tracker,
            batches_of(selected, count),
            batches_of(prompts.validation[: config.validation_prompts], count),
            make=self._make,
            read=self._read,
            unit="prompts",
        )
        total = float(sum(self.sizes))
        names = [name for name in rows[0] if name.startswith("rs/")]
        means = {
            name: sum(row[name] * size for row, size in zip(rows, self.sizes, strict=True)) / total for name in names
        }
        return means | {"rs/prompts": total, "rs/winners": float(len(self.winners)), **step_costs(rows)}

    def _make(self, number: int, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        started = time.monotonic()
        groups = sample_groups(self.session, prompts, self._samplings(number), self.constants, sampler=self.sampler)
        costs = batch_costs(started, sum(sum(group.tokens) for group in groups))
        return {
            "groups": [asdict(group) for group in groups],
            "figures": {**group_figures(groups), "rs/temperature": fmean(self.temperatures), **costs},
        }

    def _samplings(self, number: int) -> list[tuple[Sampling, int]]:
        """Each temperature and its number of the K samples; the first ones take the remainder."""
        share, rest = divmod(self.config.samples_per_prompt, len(self.temperatures))
        first = _SEEDS_OF_A_ROUND * len(self.step.inputs.pooled) + number * len(self.temperatures)
        return [
            (self.session.sampling(first + index, temperature=temperature), share + (index < rest))
            for index, temperature in enumerate(self.temperatures)
        ]

    def _read(self, prompts: Sequence[EncodedPrompt], values: Mapping[str, Any], is_held_out: bool) -> BatchResult:
        groups = [Group(**group) for group in values["groups"]]
        inputs = self.step.inputs
        winners = winners_of(prompts, groups, inputs.step, draw_seed=_draw_seed(self.config, inputs))
        figures = values["figures"]
        if is_held_out:
            self.held_out += winners
        else:
            self.winners += winners
            self.sizes.append(len(prompts))
            self.step.dropped.update(filtered(groups))
        headline = f"best {figures['rs/reward_best']:+.3f}  mean {figures['rs/reward_mean']:+.3f}"
        return BatchResult(figures, _shown(prompts, groups), headline)


def group_figures(groups: Sequence[Group]) -> dict[str, float]:
    """Figures of a batch. Best, median and mean are over each prompt's eligible answers; prompts without any are left
    out."""
    scores = [
        [group.combined[place] for place in group.order if group.finished[place] and group.allowed[place]]
        for group in groups
    ]
    answers, usable = sum(len(group.texts) for group in groups), sum(map(len, scores))
    scores = [of_prompt for of_prompt in scores if of_prompt] or [[0.0]]
    return {
        "rs/reward_best": fmean(of_prompt[0] for of_prompt in scores),
        "rs/reward_median": fmean(median(of_prompt) for of_prompt in scores),
        "rs/reward_mean": fmean(fmean(of_prompt) for of_prompt in scores),
        "rs/standardised_best": fmean(
            group.standardised[group.candidates[0]] if group.candidates else min(group.standardised) for group in groups
        ),
        "rs/usable_fraction": usable / answers,
        "rs/finished_fraction": sum(sum(group.finished) for group in groups) / answers,
        "rs/response_tokens": sum(sum(group.tokens) for group in groups) / answers,
    }


def _shown(prompts: Sequence[EncodedPrompt], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Best and worst answers to some prompts, to be logged as samples."""
    return [
        {
            "prompt": prompt.messages[-1].content,
            "which": which,
            "answer": group.texts[place],
            "score": round(group.combined[place], 4),
            "tokens": group.tokens[place],
            "finished": group.finished[place],
        }
        for prompt, group in list(zip(prompts, groups, strict=True))[:_SHOWN]
        for which, place in (("best", [*group.candidates, *group.order][0]), ("worst", group.order[-1]))
    ]
