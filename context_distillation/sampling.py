"""The answers of one step: batch by batch, each written down whole before the next is sampled."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any
from zlib import crc32

from context_distillation.asking import WAYS, Asked, Way, asked_prompts
from context_distillation.choosing import REASONS, Choice, Groups, choose, safety_of, score_lists
from context_distillation.config import Config
from llamachat.answers.batches import Batches
from llamachat.answers.desk import Desk
from llamachat.answers.groups import Group, batches_of, scored_groups
from llamachat.answers.responses import sample
from llamachat.answers.store import Store
from llamachat.data.prompts import EncodedPrompt
from llamachat.maths.intervals import paired_bootstrap
from llamachat.runs.cost import peak_memory
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.standardising import Constants
from llamachat.tracking.tracker import Tracker
from llamachat.training.hours import Hours
from llamachat.training.progress import StepProgress

log = logging.getLogger(__name__)

SHOWN = 4  # prompts of a batch whose plain and best distilled answer a person is shown


@dataclass(slots=True)
class Distilling:
    """The answers of one step, batch by batch, and what comes of them."""

    config: Config
    inputs: StepInputs
    desk: Desk
    constants: Constants
    store: Store
    hours: Hours
    groups: list[Groups] = field(default_factory=list)  # of the training side's prompts
    choices: list[Choice] = field(default_factory=list)  # theirs
    held_out: list[Choice] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)

    def go(self, tracker: Tracker) -> dict[str, float]:
        """Sample all batches, those that lie in the store aside; the step's figures."""
        config, count = self.config, self.config.samples_per_prompt * len(WAYS)
        prompts = self._asked(self.desk.prompts.drawn(config.prompts, seed=self.inputs.run.seed), self.dropped)
        validation = self._asked(self.desk.prompts.validation[: config.validation_prompts], Counter())
        log.info(
            "%d adversarial prompts, the category of %d of them known; %d answers each way at temperature %g",
            len(prompts),
            sum(asked.category is not None for asked in prompts),
            config.samples_per_prompt,
            self._temperature,
        )
        batches = Batches(self.store, self.hours, batches_of(prompts, count), batches_of(validation, count))
        rows: list[dict[str, float]] = []
        with StepProgress(self.inputs.step, steps=batches.num_batches, done=batches.num_done) as progress:
            for batch in batches.go(self._sample):
                groups = [_from_plain(values) for values in batch.made["groups"]]
                choices = [self._choose(asked, group) for asked, group in zip(batch.asked, groups, strict=True)]
                if batch.is_held_out:
                    self.held_out += choices
                else:
                    self.groups += groups
                    self.choices += choices
                    rows.append(batch.made["figures"] | batch_figures(groups, choices))
                    tracker.log(batch.number, rows[-1])
                    tracker.samples(batch.number, _shown(choices))
                if batch.is_new:
                    kept = sum(choice.is_kept for choice in choices)
                    progress.step(batch.number, f"kept {kept} of {len(choices)}")
        for name, scores in score_lists(self.groups, self.choices).items():
            tracker.histogram(len(batches.train), f"safety/{name}", scores)
        self.dropped.update(left_out(self.choices) | batches.left_out("prompts"))
        return step_figures(self.groups, self.choices) | {
            "time/rollout_s": sum(row["time/step_s"] for row in rows),
            "memory/peak_gib": max((row["memory/peak_gib"] for row in rows), default=0.0),
        }

    @property
    def _temperature(self) -> float:
        own = self.config.temperature
        return self.inputs.rollout.temperature if own is None else own

    def _asked(self, prompts: Sequence[EncodedPrompt], dropped: Counter[str]) -> list[Asked]:
        base, rollout = self.inputs.base, self.inputs.rollout
        longest = (
            base.max_tokens - rollout.max_new_tokens - 1
        )  # the reward models read the prompt without the preprompt
        return asked_prompts(prompts, self.config, self.desk.bank.chat_format, max_tokens=longest, dropped=dropped)

    def _choose(self, asked: Asked, groups: Groups) -> Choice:
        return choose(asked.original, groups, keeps_all=self.config.keep == "all", margin=self.config.margin)

    def _sample(self, number: int, batch: Sequence[Asked]) -> dict[str, Any]:
        started, tokens = time.monotonic(), 0
        found: list[Groups] = [{} for _ in batch]
        for place, way in enumerate(WAYS):
            at = [index for index, asked in enumerate(batch) if asked.way(way) is not None]
            groups = self._answers([batch[index] for index in at], way, number * len(WAYS) + place) if at else []
            for index, group in zip(at, groups, strict=True):
                found[index][way] = group
            tokens += sum(sum(group.tokens) for group in groups)
        seconds = time.monotonic() - started
        return {
            "groups": [{way: group.to_plain() for way, group in groups.items()} for groups in found],
            "figures": {
                "time/step_s": seconds,
                "throughput/rollout_tokens_per_s": tokens / max(seconds, 1e-9),
                "memory/peak_gib": peak_memory(),
            },
        }

    def _answers(self, batch: Sequence[Asked], way: Way, number: int) -> list[Group]:
        """The answers to prompts asked this way, scored as answers to the prompts themselves."""
        count = self.config.samples_per_prompt
        asked = [prompt for one in batch if (prompt := one.way(way)) is not None]
        # Steps of one recipe ask the same prompts in the same order, and each draws answers of its own.
        sampling = self.desk.sampling(crc32(self.inputs.step.encode()) + number, temperature=self._temperature)
        responses = sample(self.desk.engine, self.desk.bank.chat_format, asked, sampling, samples_per_prompt=count)
        by_prompt = [
            [replace(response, prompt=one.original) for response in responses[place * count : (place + 1) * count]]
            for place, one in enumerate(batch)
        ]
        return scored_groups(self.desk, by_prompt, self.constants)


def batch_figures(groups: Sequence[Groups], choices: Sequence[Choice]) -> dict[str, float]:
    """Mean safety scores of all answers by how they were asked for, and of those that are learnt."""
    found: dict[str, float] = {}
    for way in WAYS:
        answers = [group[way] for group in groups if way in group]
        if answers:
            found[f"distill/safety/{way}"] = fmean(score for group in answers for score in safety_of(group))
            found[f"distill/finished_fraction/{way}"] = fmean(done for group in answers for done in group.finished)
            found[f"distill/response_tokens/{way}"] = fmean(count for group in answers for count in group.tokens)
    kept = [choice for choice in choices if choice.is_kept]
    if kept:
        found["distill/safety/kept"] = fmean(choice.score for choice in kept)
        found["distill/safety/replaced"] = fmean(choice.original_score for choice in kept)
    return found | {"distill/kept_fraction": len(kept) / len(choices)}


def step_figures(groups: Sequence[Groups], choices: Sequence[Choice]) -> dict[str, float]:
    """The same over all prompts, counts, and what the preprompts alone do to the scores, with 95% intervals."""
    if not choices:
        return {}
    found = batch_figures(groups, choices)
    for way in WAYS[1:]:
        pairs = [(safety_of(group[way]), safety_of(group["original"])) for group in groups if way in group]
        if pairs:
            gap = paired_bootstrap([fmean(one) for one, _ in pairs], [fmean(other) for _, other in pairs])
            name = f"distill/effect/{way}"
            found |= {name: gap.value, f"{name}_low": gap.low, f"{name}_high": gap.high}
    reasons = Counter(choice.refused for choice in choices)
    found |= {f"distill/refused/{reason}": float(reasons[reason]) for reason in REASONS}
    return found | {"distill/prompts": float(len(choices)), "distill/kept": float(reasons[None])}


def left_out(choices: Sequence[Choice]) -> dict[str, int]:
    """How many distilled answers are not learnt, by reason."""
    counts = Counter(choice.refused for choice in choices if choice.refused is not None)
    return {f"distilled answers left out: {REASONS[reason]}": count for reason, count in counts.items()}


def _shown(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Plain and best distilled answers to some prompts, for people to read."""
    return [
        {
            "prompt": choice.prompt.messages[-1].content,
            "original": choice.original,
            "distilled": choice.text,
            "way": choice.way,
            "safety_original": round(choice.original_score, 4),
            "safety_distilled": round(choice.score, 4),
            "refused": choice.refused or "",
        }
        for choice in choices[:SHOWN]
    ]


def _from_plain(values: dict[Way, Any]) -> Groups:
    return {way: Group.from_plain(group) for way, group in values.items()}
