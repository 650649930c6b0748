"""The answers of one round: batch by batch, each written down whole before the next is sampled."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from llamachat.answers.batches import Batches
from llamachat.answers.desk import Desk
from llamachat.answers.groups import Group, Sampler, batches_of, sample_groups
from llamachat.answers.store import Store
from llamachat.data.prompts import EncodedPrompt
from llamachat.rollout.engine import Sampling
from llamachat.runs.cost import peak_memory
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.standardising import Constants
from llamachat.tracking.tracker import Tracker
from llamachat.training.hours import Hours
from llamachat.training.progress import StepProgress
from rejection_sampling.config import Config
from rejection_sampling.winners import Winner, filtered, winners_of

log = logging.getLogger(__name__)

# The same prompts in the same order are asked in each round: by the same draws a policy that moved little would answer
# the same again.
_SEEDS_OF_A_ROUND = 10**9
SHOWN = 4  # prompts of a batch whose best and worst answer a person is shown


@dataclass(slots=True)
class Round:
    """The answers of one round, batch by batch, and what comes of them."""

    config: Config
    inputs: StepInputs
    desk: Desk
    constants: Constants
    store: Store
    temperatures: tuple[float, ...]
    sampler: Sampler | None
    hours: Hours
    counts: Counter[str]  # what is left out, by reason
    winners: list[Winner] = field(default_factory=list)
    held_out: list[Winner] = field(default_factory=list)

    def go(self, tracker: Tracker) -> dict[str, float]:
        """Sample all batches, those that lie in the store aside; the round's mean figures."""
        count = self.config.samples_per_prompt
        prompts, validation = (
            self.desk.prompts.drawn(self.config.prompts, seed=self.inputs.run.seed),
            self.desk.prompts.validation,
        )
        log.info(
            "%d prompts, %d answers each at temperature %s",
            len(prompts),
            count,
            ", ".join(f"{temperature:g}" for temperature in self.temperatures),
        )
        held_out = batches_of(validation[: self.config.validation_prompts], count)
        batches = Batches(self.store, self.hours, batches_of(prompts, count), held_out)
        figures: list[dict[str, float]] = []
        with StepProgress(self.inputs.step, steps=batches.num_batches, done=batches.num_done) as progress:
            for batch in batches.go(self._sample):
                groups = [Group.from_plain(values) for values in batch.made["groups"]]
                chosen = winners_of(batch.asked, groups, self.inputs.step)
                told = batch.made["figures"]
                if batch.is_held_out:
                    self.held_out += chosen
                else:
                    self.winners += chosen
                    self.counts.update(filtered(groups))
                    figures.append(told | {"weight": float(len(batch.asked))})
                    tracker.log(batch.number, told)
                    tracker.samples(batch.number, _shown(batch.asked, groups))
                if batch.is_new:
                    words = f"best {told['rs/reward_best']:+.3f}  mean {told['rs/reward_mean']:+.3f}"
                    progress.step(batch.number, words)
        self.counts.update(batches.left_out("prompts"))
        return self._mean(figures)

    def _sample(self, number: int, prompts: Sequence[EncodedPrompt]) -> dict[str, Any]:
        started = time.monotonic()
        groups = sample_groups(self.desk, prompts, self._samplings(number), self.constants, sampler=self.sampler)
        seconds = time.monotonic() - started
        return {
            "groups": [group.to_plain() for group in groups],
            "figures": group_figures(groups)
            | {
                "rs/temperature": fmean(self.temperatures),
                "time/step_s": seconds,
                "throughput/rollout_tokens_per_s": sum(sum(group.tokens) for group in groups) / max(seconds, 1e-9),
                "memory/peak_gib": peak_memory(),
            },
        }

    def _samplings(self, number: int) -> list[tuple[Sampling, int]]:
        """Each temperature and its share of the K samples; the first ones take what is left over."""
        share, left = divmod(self.config.samples_per_prompt, len(self.temperatures))
        first = _SEEDS_OF_A_ROUND * len(self.inputs.pooled) + number * len(self.temperatures)
        found = []
        for index, temperature in enumerate(self.temperatures):
            sampling = self.desk.sampling(first + index, temperature=temperature)
            found.append((sampling, share + (index < left)))
        return found

    def _mean(self, figures: Sequence[dict[str, float]]) -> dict[str, float]:
        """Means over prompts, of batches that may differ in size."""
        total = sum(batch["weight"] for batch in figures)
        names = [name for name in figures[0] if name.startswith("rs/")]
        found = {name: sum(batch[name] * batch["weight"] for batch in figures) / total for name in names}
        return found | {
            "rs/prompts": total,
            "rs/winners": float(len(self.winners)),
            "time/rollout_s": sum(batch["time/step_s"] for batch in figures),
            "memory/peak_gib": max(batch["memory/peak_gib"] for batch in figures),
        }


def group_figures(groups: Sequence[Group]) -> dict[str, float]:
    """What a batch was like. Best, median and mean are of answers that can win, by prompt; prompts without are left out."""
    scores = [
        [group.combined[place] for place in group.order if group.finished[place] and group.allowed[place]]
        for group in groups
    ]
    answers, usable = (sum(map(len, found)) for found in ([group.texts for group in groups], scores))
    scores = [found for found in scores if found] or [[0.0]]
    return {
        "rs/reward_best": fmean(found[0] for found in scores),
        "rs/reward_median": fmean(median(found) for found in scores),
        "rs/reward_mean": fmean(fmean(found) for found in scores),
        "rs/standardised_best": fmean(
            group.standardised[group.candidates[0]] if group.candidates else min(group.standardised) for group in groups
        ),
        "rs/usable_fraction": usable / answers,
        "rs/finished_fraction": sum(sum(group.finished) for group in groups) / answers,
        "rs/response_tokens": sum(sum(group.tokens) for group in groups) / answers,
    }


def _shown(prompts: Sequence[EncodedPrompt], groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Best and worst answers to some prompts, for people to read."""
    rows = []
    for prompt, group in list(zip(prompts, groups, strict=True))[:SHOWN]:
        for which, place in (
            ("best", group.candidates[0] if group.candidates else group.order[0]),
            ("worst", group.order[-1]),
        ):
            rows.append(
                {
                    "prompt": prompt.messages[-1].content,
                    "which": which,
                    "answer": group.texts[place],
                    "score": round(group.combined[place], 4),
                    "tokens": group.tokens[place],
                    "finished": group.finished[place],
                }
            )
    return rows
