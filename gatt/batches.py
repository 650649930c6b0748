"""The dialogs of a step, batch by batch, each written down whole before the next is begun."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from gatt.studio import Studio
from gatt.synthesize import Made, Rank, Speaker, conversation, counted, speak
from llamachat.answers.batches import Batches
from llamachat.answers.desk import Desk
from llamachat.answers.groups import ANSWERS_PER_BATCH
from llamachat.answers.responses import Response
from llamachat.answers.sequences import Turns
from llamachat.answers.store import Store
from llamachat.constraints import draw_instruction
from llamachat.runs.cost import peak_memory
from llamachat.scoring.ranking import ranking
from llamachat.tracking.tracker import Tracker
from llamachat.training.hours import Hours
from llamachat.training.progress import StepProgress

_SHOWN = 4  # dialogs of a batch that a person is shown


@dataclass(slots=True)
class Dialogs:
    """What has been made, and what was left out."""

    studio: Studio
    store: Store
    hours: Hours
    made: list[Made] = field(default_factory=list)
    held_out: list[Made] = field(default_factory=list)  # of the validation side
    dropped: Counter[str] = field(default_factory=Counter)

    def go(self, tracker: Tracker) -> dict[str, float]:
        """Make all batches, those that lie in the store aside; mean figures."""
        config, sequences = self.studio.config, self.studio.sequences
        size = max(1, ANSWERS_PER_BATCH // config.samples_per_turn)
        parts = [range(first, min(first + size, config.dialogs)) for first in range(0, config.dialogs, size)]
        held_out = [range(min(size, len(sequences.validation)))] if sequences.validation else []
        batches = Batches(self.store, self.hours, parts, held_out)
        figures: list[dict[str, float]] = []
        with StepProgress(self.studio.inputs.step, steps=batches.num_batches, done=batches.num_done) as progress:
            for batch in batches.go(
                lambda number, indices: self._make(
                    number, indices, sequences.train if number <= len(parts) else sequences.validation
                )
            ):
                found = [Made.from_plain(values) for values in batch.made["made"]]
                if batch.is_held_out:
                    self.held_out = found
                    continue
                self.made += found
                self.dropped.update(batch.made["dropped"])
                figures.append(batch.made["figures"])
                tracker.log(batch.number, figures[-1])
                tracker.samples(batch.number, _shown(found))
                if batch.is_new:
                    progress.step(batch.number, f"kept {figures[-1]['gatt/kept_fraction']:.0%} of the dialogs")
        self.dropped.update(batches.left_out("dialogs"))
        names = [name for name in figures[0] if name.startswith("gatt/")]
        return {name: fmean(batch[name] for batch in figures) for name in names}

    def _make(self, number: int, indices: Sequence[int], source: Sequence[Turns]) -> dict[str, Any]:
        studio, config = self.studio, self.studio.config
        # A second such step of a recipe draws others.
        seed = f"{studio.inputs.run.seed} {studio.inputs.step}"
        started = time.monotonic()
        conversations = [
            conversation(
                draw_instruction(
                    seed=seed,
                    index=index,
                    side="train",
                    families=studio.families,
                    most=config.most_constraints,
                    weights=config.weights,
                ),
                source[index % len(source)][: config.turns],
                key=f"{seed} {number} {index}",
                recall_share=config.recall_share,
            )
            for index in indices
        ]
        speaker = Speaker(
            studio.desk.engine,
            studio.desk.bank.chat_format,
            config.samples_per_turn,
            studio.longest,
            config.mends,
            rank=by_reward(studio.desk) if config.ranks_by_reward else None,
        )
        made = speak(speaker, conversations, studio.samplings(number * config.turns, config.turns))
        seconds = time.monotonic() - started
        return {
            "made": [one.to_plain() for one in made],
            "dropped": counted(conversations),
            "figures": {
                "gatt/kept_fraction": len(made) / len(conversations),
                "gatt/passing_fraction": fmean(one.passing for one in made) if made else 0.0,
                "gatt/mended_fraction": fmean(one.is_mended for one in made) if made else 0.0,
                "gatt/answer_tokens": fmean(one.tokens for one in made) if made else 0.0,
                "gatt/turns": fmean(len(one.turns) for one in made) if made else 0.0,
                "time/step_s": seconds,
                "memory/peak_gib": peak_memory(),
            },
        }


def by_reward(desk: Desk) -> Rank:
    """The order of each prompt's answers by the reward models."""

    def rank(by_question: Sequence[Sequence[Response]]) -> list[list[int]]:
        responses = [response for group in by_question for response in group]
        combined = desk.scorer.score(responses, with_judge=False).combined
        return ranking(combined, samples_per_prompt=len(by_question[0])).tolist()

    return rank


def _shown(made: Sequence[Made]) -> list[dict[str, Any]]:
    return [
        {"instruction": one.instruction, "turns": one.turns, "answers": one.answers, "passing": round(one.passing, 3)}
        for one in made[:_SHOWN]
    ]
