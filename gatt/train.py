"""Ghost Attention (Llama 2, arXiv:2307.09288, section 3.3): dialogs and a policy -> a policy that keeps instructions.

Instructions are drawn at random and the policy answers dialogs with the instruction in every turn. Training uses these
dialogs with the instruction only in the first turn and the loss on the last answer. Before and after, held-out dialogs
with held-out values measure how long an instruction is kept. Writes the step folder's sampling/, metrics.jsonl,
samples.jsonl, dialogs/, figures/, summary.json and, through the tuning, artifact/. A killed step resumes after its
last complete batch. If `max_hours` ends sampling early, the dialogs sampled so far are used; batches are interchangeable.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from gatt.attention import draw_attention, strongest_attention, to_instruction
from gatt.config import Config
from gatt.figures import MOMENTS, consistency_figures, consistency_table, draw_consistency
from gatt.session import GattSession, open_gatt
from gatt.synthesize import (
    PLAIN,
    GattDialog,
    Rank,
    TurnSampler,
    conversation,
    counted_drops,
    dialog_text,
    sample_dialogs,
)
from llamachat import distributed
from llamachat.answers.consistency import Outcome, Trial, Turns, as_said
from llamachat.answers.dialog_step import BatchResult, DialogStep, batch_costs, counted
from llamachat.answers.groups import ANSWERS_PER_BATCH
from llamachat.answers.responses import Response
from llamachat.answers.scorer import Scorer
from llamachat.answers.session import free_memory
from llamachat.chat_format import TrainOn
from llamachat.chat_format.dialog import Message
from llamachat.constraints.instruction import Instruction, draw_instruction
from llamachat.data.loading import fraction
from llamachat.errors import DataError
from llamachat.models.loading import load_base, load_policy
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.combining import ranking
from llamachat.tracking.tracker import Tracker

if TYPE_CHECKING:
    from llamachat.models.loading import LanguageModel

log = logging.getLogger(__name__)

_SHOWN = 4  # dialogs logged per batch


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Sample dialogs, tune on their last answers, evaluate, and finish the step."""
    step = dialog_step(config, inputs)
    return step.run(
        make_dialogs=lambda: make_dialogs(config, step),
        compare=lambda tuned: compare(config, step, tuned),
        sft=config.sft,  # earlier answers of sampled dialogs have train: false; all answers of data.sft are trained on
        sft_share=config.sft_share,
    )


def dialog_step(config: Config, inputs: StepInputs) -> DialogStep:
    return DialogStep(inputs, section="gatt", prefix="gatt", max_hours=config.max_hours)


def make_dialogs(config: Config, step: DialogStep) -> Artifact:
    """Sample and publish the dialogs; cached ones are not sampled again."""
    inputs = step.inputs
    session = open_gatt(config, inputs, inputs.policy)
    step.cache.get_or_make("consistency-start", lambda: asdict(session.measure(has_instruction=True)))
    with step.record() as tracker:
        dialogs = Dialogs(session, step)
        figures = dialogs.sample(tracker)
        if dialogs.plain == len(dialogs.train):
            raise DataError(
                f"{inputs.step}: none of the {config.dialogs} dialogs with an instruction is left ({counted(step.dropped)}). Raise "
                "gatt.samples_per_turn, choose gatt.families that the policy can follow, or raise rollout.max_new_tokens or "
                "base.max_tokens."
            )
        log.info(
            "%d training dialogs, %d held out; %s", len(dialogs.train), len(dialogs.held_out), counted(step.dropped)
        )
        counts = {"gatt/dialogs": float(len(dialogs.train)), "gatt/plain_dialogs": float(dialogs.plain)}
        step.end_sampling(tracker, figures | counts)
    return step.publish(
        [dialog_text(dialog, inputs.step) for dialog in dialogs.train],
        [dialog_text(dialog, inputs.step) for dialog in dialogs.held_out],
        details={},
    )


def compare(config: Config, step: DialogStep, tuned: Artifact) -> dict[str, float]:
    """Compare consistency by turn before and after tuning; return the final figures and draw plots."""
    inputs, cache = step.inputs, step.cache
    session = open_gatt(config, inputs, tuned)
    trials = session.trials()
    # The chance level of the tuned policy, without an instruction: tuning may have raised it.
    for moment, has_instruction in (("final", True), ("chance", False)):
        cache.get_or_make(
            f"consistency-{moment}", lambda reads=has_instruction: asdict(session.measure(has_instruction=reads))
        )
    outcomes = {moment: Outcome.from_plain(cache.get_or_make(f"consistency-{moment}", dict)) for moment in MOMENTS}
    if trials:
        log.info("%s", consistency_table(outcomes, trials))
        draw_consistency(outcomes, trials, inputs.folder.figures / "consistency.png")
        if distributed.is_first():
            picture = inputs.folder.figures / "attention.png"
            _draw_attention(session, inputs, tuned, trials[0], outcomes["final"], picture)
    return consistency_figures(outcomes, trials)


def _draw_attention(
    session: GattSession, inputs: StepInputs, tuned: Artifact, trial: Trial, outcome: Outcome, path: Path
) -> None:
    """Draw the attention of the starting policy (or base) and the tuned one on a dialog answered by the tuned one."""
    chat_format = session.answers.chat_format
    messages = [Message("system", trial.instruction.text)]
    for turn in sorted(outcome.answers):
        if outcome.kept[turn][0] is None:  # no answer, since the dialog exceeded the context
            break
        messages += [Message("user", trial.turns[turn - 1]), as_said(chat_format, outcome.answers[turn][0])]
    if len(messages) == 1:
        return
    ids = chat_format.encode_dialog(messages, train_on=TrainOn.LAST_ANSWER).input_ids
    maps, by_answer = [], []
    for name, artifact in (("before", inputs.policy), ("after", tuned)):
        attention_TT = strongest_attention(_eager(inputs, artifact), ids)
        maps.append((name, attention_TT))
        by_answer.append((name, to_instruction(attention_TT, chat_format, messages)))
        free_memory()
    draw_attention(maps, by_answer, path)


def _eager(inputs: StepInputs, policy: Artifact | None) -> "LanguageModel":
    """The policy, or the base, loaded with the only attention kernel that returns its weights."""
    if policy is None:
        return load_base(inputs.base.model_copy(update={"attention": "eager"}), device="auto").eval()
    return load_policy(policy.path, dtype=inputs.base.dtype, device="auto", attention="eager").model


@dataclass(slots=True)
class Dialogs:
    """Samples the dialogs of the step, batch by batch."""

    session: GattSession
    step: DialogStep
    train: list[GattDialog] = field(default_factory=list)
    held_out: list[GattDialog] = field(default_factory=list)  # from the validation split

    @property
    def plain(self) -> int:
        """Number of training dialogs without an instruction."""
        return sum(not dialog.instruction for dialog in self.train)

    def sample(self, tracker: Tracker) -> dict[str, float]:
        """Sample all batches that are not cached; return mean figures."""
        config, sequences = self.session.config, self.session.sequences
        size = max(1, ANSWERS_PER_BATCH // config.samples_per_turn)
        train = [range(first, min(first + size, config.dialogs)) for first in range(0, config.dialogs, size)]
        held_out = [range(min(size, len(sequences.validation)))] if sequences.validation else []
        rows = self.step.make_batches(
            tracker,
            train,
            held_out,
            make=lambda number, indices: self._make(
                number, indices, sequences.train if number <= len(train) else sequences.validation
            ),
            read=self._read,
            unit="dialogs",
        )
        names = [name for name in rows[0] if name.startswith("gatt/")]
        return {name: fmean(row[name] for row in rows) for name in names}

    def _make(self, number: int, indices: Sequence[int], source: Sequence[Turns]) -> dict[str, Any]:
        config, session, inputs = self.session.config, self.session.answers, self.step.inputs
        # Another gatt step of the same recipe draws other instructions.
        seed = f"{inputs.run.seed} {inputs.step}"
        started = time.monotonic()
        conversations = [
            conversation(
                self._instruction(seed, number, index),
                source[index % len(source)][: config.turns],
                key=f"{seed} {number} {index}",
                recall_share=config.recall_share,
            )
            for index in indices
        ]
        sampler = TurnSampler(
            session.engine,
            session.chat_format,
            config.samples_per_turn,
            inputs.base.max_tokens - inputs.rollout.max_new_tokens - 1,
            config.repairs,
            rank=by_reward(session.scorer) if config.ranks_by_reward else None,
        )
        samplings = [
            session.sampling(number * config.turns + turn, temperature=config.temperature)
            for turn in range(config.turns)
        ]
        dialogs = sample_dialogs(sampler, conversations, samplings)
        instructed = [dialog for dialog in dialogs if dialog.instruction]
        costs = batch_costs(started)
        return {
            "made": [asdict(dialog) for dialog in dialogs],
            "dropped": counted_drops(conversations),
            "figures": {
                "gatt/kept_fraction": len(dialogs) / len(conversations),
                "gatt/passing_fraction": fmean(dialog.passing for dialog in instructed) if instructed else 0.0,
                "gatt/repaired_fraction": fmean(dialog.is_repaired for dialog in instructed) if instructed else 0.0,
                "gatt/answer_tokens": fmean(dialog.tokens for dialog in dialogs) if dialogs else 0.0,
                "gatt/turns": fmean(len(dialog.turns) for dialog in dialogs) if dialogs else 0.0,
                **costs,
            },
        }

    def _instruction(self, seed: str, number: int, index: int) -> Instruction:
        """A random instruction, or none: the same turns with and without one teach the policy to read it."""
        config = self.session.config
        if fraction(f"{seed} {number} {index}", salt="gatt plain") < config.plain_share:
            return PLAIN
        return draw_instruction(
            seed=seed,
            index=index,
            side="train",
            families=self.session.families,
            most=config.most_constraints,
            weights=config.weights,
        )

    def _read(self, indices: Sequence[int], values: Mapping[str, Any], is_held_out: bool) -> BatchResult:
        dialogs = [GattDialog(**dialog) for dialog in values["made"]]
        if is_held_out:
            self.held_out += dialogs
        else:
            self.train += dialogs
            self.step.dropped.update(values["dropped"])
        shown = [
            {
                "instruction": dialog.instruction,
                "turns": dialog.turns,
                "answers": dialog.answers,
                "passing": round(dialog.passing, 3),
            }
            for dialog in dialogs[:_SHOWN]
        ]
        kept = values["figures"]["gatt/kept_fraction"]
        return BatchResult(values["figures"], shown, f"kept {kept:.0%} of the dialogs")


def by_reward(scorer: Scorer) -> Rank:
    """Rank each prompt's answers by the reward models."""

    def rank(by_prompt: Sequence[Sequence[Response]]) -> list[list[int]]:
        responses = [response for group in by_prompt for response in group]
        combined = scorer.score(responses, with_judge=False).combined
        return ranking(combined, samples_per_prompt=len(by_prompt[0])).tolist()

    return rank
