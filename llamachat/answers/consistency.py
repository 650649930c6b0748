"""How far a policy keeps an instruction from the first turn: by checker at each turn, by recall questions where there is
no checker (Llama 2, arXiv:2307.09288, table 30 in shape).

The dialogs are held out, and so are the values of the constraints; each has one constraint, so that families can be told
apart. What the tuned policy's answers do without any instruction is measured beside it: the chance rate.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from llamachat.answers.groups import is_allowed
from llamachat.answers.sequences import Turns
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.constraints import Family, Instruction, draw_instruction, is_kept, recall_questions, recalled
from llamachat.data.loading import fraction
from llamachat.maths.intervals import paired_bootstrap, proportion_interval
from llamachat.rollout.engine import RolloutEngine, Sampling, scatter_generate

CHECKED, RECALLED = "consistency", "recall"


@dataclass(frozen=True, slots=True)
class Trial:
    """One held-out dialog and the instruction to keep in it."""

    turns: Turns
    instruction: Instruction

    @property
    def family(self) -> str:
        return self.instruction.constraints[0].family

    @property
    def kind(self) -> str:
        """How it is measured."""
        return CHECKED if self.instruction.checkable else RECALLED


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Whether each trial kept its instruction, by turn (None past the context), and answers for people to read."""

    kept: dict[int, list[bool | None]]
    answers: dict[int, list[str]]

    def to_plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> "Outcome":
        def by_turn(name: str) -> dict[int, Any]:
            return {int(turn): found for turn, found in values[name].items()}

        return Outcome(kept=by_turn("kept"), answers=by_turn("answers"))


@dataclass(frozen=True, slots=True)
class Rate:
    """A share or a difference of shares, its 95% interval, and of how many trials."""

    value: float
    low: float
    high: float
    trials: int


def held_out_trials(families: Mapping[str, Family], dialogs: Sequence[Turns], *, count: int, seed: int) -> list[Trial]:
    """So many trials, each of one constraint with a held-out value, all these families alike."""
    names = sorted(families)
    found = []
    for index in range(count if names and dialogs else 0):
        family = names[index % len(names)]
        instruction = draw_instruction(
            seed=seed, index=index, side="held_out", families={family: families[family]}, most=1
        )
        found.append(Trial(dialogs[index % len(dialogs)], instruction))
    return found


def measure(
    engine: RolloutEngine,
    chat_format: ChatFormat,
    trials: Sequence[Trial],
    *,
    turns: Sequence[int],
    samplings: Sequence[Sampling],
    max_tokens: int,
    is_told: bool,
) -> Outcome:
    """Talk through all trials, with the instruction in the first turn where the policy is told of it.

    `samplings` has an entry for each turn up to the last that is measured. A recall question stands in the place of the
    user's turn; the dialog goes on without it.
    """
    dialogs = [[Message("system", trial.instruction.text)] if is_told else [] for trial in trials]
    kept: dict[int, list[bool | None]] = {}
    answers: dict[int, list[str]] = {}
    live = set(range(len(trials)))
    for turn, sampling in enumerate(samplings, start=1):
        said = [Message("user", trial.turns[turn - 1]) for trial in trials]
        for trial_dialog, message in zip(dialogs, said, strict=True):
            trial_dialog.append(message)
        live -= {place for place in live if len(chat_format.encode_prompt(dialogs[place])) > max_tokens}
        found = _answers(engine, chat_format, {place: dialogs[place] for place in sorted(live)}, sampling)
        if turn in turns:
            asked = {
                place: [*dialogs[place][:-1], Message("user", question)]
                for place in sorted(live)
                if (question := _recall_question(trials[place], turn)) is not None
            }
            fitting = {k: v for k, v in asked.items() if len(chat_format.encode_prompt(v)) <= max_tokens}
            told = {k: v for k, v in found.items() if k not in asked} | _answers(engine, chat_format, fitting, sampling)
            kept[turn] = [_is_kept(trial, told[place]) if place in told else None for place, trial in enumerate(trials)]
            answers[turn] = [told.get(place, "") for place in range(len(trials))]
        for place in live:
            dialogs[place].append(as_said(chat_format, found[place]))
    return Outcome(kept=kept, answers=answers)


def as_said(chat_format: ChatFormat, answer: str) -> Message:
    """The answer as it stands in the dialog: what is empty or holds a tag cannot, and the next turns are still asked."""
    return Message("assistant", answer.strip() if is_allowed(chat_format, answer) else "...")


def rates(outcome: Outcome, trials: Sequence[Trial], *, kind: str, family: str | None = None) -> dict[int, Rate]:
    """The share of the trials of a kind, or of one family, that kept their instruction, by turn."""
    found = {}
    for turn, kept in outcome.kept.items():
        told = [(float(value), trial.turns) for value, trial in _of(kept, trials, kind, family) if value is not None]
        if told:
            values, dialogs = zip(*told, strict=True)
            low, high = proportion_interval(values, groups=dialogs)
            found[turn] = Rate(fmean(values), low, high, len(values))
    return found


def differences(one: Outcome, other: Outcome, trials: Sequence[Trial], *, kind: str) -> dict[int, Rate]:
    """Share of one less that of the other, trial by trial, with its 95% interval, by turn."""
    found = {}
    for turn in one.kept:
        both = zip(_of(one.kept[turn], trials, kind), _of(other.kept[turn], trials, kind), strict=True)
        pairs = [(float(a), float(b), trial.turns) for (a, trial), (b, _) in both if a is not None and b is not None]
        if pairs:
            ones, others, dialogs = zip(*pairs, strict=True)
            gap = paired_bootstrap(ones, others, groups=dialogs)
            found[turn] = Rate(gap.value, gap.low, gap.high, len(pairs))
    return found


def _of(
    kept: Sequence[bool | None], trials: Sequence[Trial], kind: str, family: str | None = None
) -> list[tuple[bool | None, Trial]]:
    """Outcomes of a kind, each with its trial: a dialog that several trials are of is no new evidence each time."""
    return [
        (value, trial)
        for value, trial in zip(kept, trials, strict=True)
        if trial.kind == kind and family in (None, trial.family)
    ]


def _answers(
    engine: RolloutEngine, chat_format: ChatFormat, dialogs: Mapping[int, Sequence[Message]], sampling: Sampling
) -> dict[int, str]:
    if not dialogs:
        return {}
    prompts = [chat_format.encode_prompt(dialog) for dialog in dialogs.values()]
    found = scatter_generate(engine, prompts, samples_per_prompt=1, sampling=sampling)
    return {
        place: chat_format.decode_answer(completion.token_ids)
        for place, (completion,) in zip(dialogs, found, strict=True)
    }


def _recall_question(trial: Trial, turn: int) -> str | None:
    """What is asked in place of the user's turn, where there is no checker."""
    questions = recall_questions(trial.instruction.constraints[0])
    if trial.kind == CHECKED or not questions:
        return None
    return questions[int(fraction(f"{' '.join(trial.turns)} {turn}", salt="gatt asked") * len(questions))]


def _is_kept(trial: Trial, answer: str) -> bool:
    constraint = trial.instruction.constraints[0]
    return is_kept(constraint, answer) if trial.kind == CHECKED else recalled(constraint, answer)
