"""How long a policy follows an instruction from the first turn: measured by checkers at each turn, by recall questions
if there is no checker (Llama 2, arXiv:2307.09288, in the form of table 30).

The dialogs are held out, and so are the values of the constraints; each dialog has one constraint, so that families can
be compared. The chance rate is measured on the policy's answers without any instruction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from llamachat.answers.groups import is_allowed
from llamachat.answers.session import AnswerSession
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Dialog, Message
from llamachat.config.sections import Data
from llamachat.constraints.families import Family
from llamachat.constraints.instruction import Instruction, draw_instruction, is_kept, recall_questions, recalled
from llamachat.data.loading import fraction, load_mixture
from llamachat.data.packing import epoch_order
from llamachat.errors import DataError
from llamachat.maths.intervals import Difference, paired_bootstrap, proportion_interval
from llamachat.rollout.engine import RolloutEngine, Sampling, scatter_generate
from llamachat.tables import plural

CHECKED, RECALLED = "consistency", "recall"
_TURN_SHARE = (
    8  # a user turn has at most one in this many tokens of the context: several turns must fit, with their answers
)
_EVALUATION_SEED = 900_000  # for the turns of trials, beyond those of other batches

Turns = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """One held-out dialog and the instruction to follow in it."""

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
    """Whether each trial followed its instruction, by turn (None past the context), and answers for people to read."""

    kept: dict[int, list[bool | None]]
    answers: dict[int, list[str]]

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> "Outcome":
        def by_turn(name: str) -> dict[int, Any]:
            return {int(turn): items for turn, items in values[name].items()}

        return Outcome(kept=by_turn("kept"), answers=by_turn("answers"))


@dataclass(frozen=True, slots=True)
class Rate(Difference):
    """A share or a difference of shares, with the number of trials."""

    trials: int


def held_out_trials(families: Mapping[str, Family], dialogs: Sequence[Turns], *, count: int, seed: int) -> list[Trial]:
    """`count` trials, each of one constraint with a held-out value, the same number for each family."""
    names = sorted(families)
    trials = []
    for index in range(count if names and dialogs else 0):
        family = names[index % len(names)]
        instruction = draw_instruction(
            seed=seed, index=index, side="held_out", families={family: families[family]}, most=1
        )
        trials.append(Trial(dialogs[index % len(dialogs)], instruction))
    return trials


def run_trials(
    session: AnswerSession,
    trials: Sequence[Trial],
    *,
    turns: Sequence[int],
    has_instruction: bool,
    temperature: float | None = None,
) -> Outcome:
    """Answer all trials turn by turn up to the last of `turns`, with the instruction in the first turn or without any.

    A recall question replaces the user's turn; the dialog continues without it.
    """
    engine, chat_format, inputs = session.engine, session.chat_format, session.inputs
    samplings = [session.sampling(_EVALUATION_SEED + turn, temperature=temperature) for turn in range(max(turns))]
    max_tokens = inputs.base.max_tokens - inputs.rollout.max_new_tokens - 1
    dialogs = [[Message("system", trial.instruction.text)] if has_instruction else [] for trial in trials]
    kept: dict[int, list[bool | None]] = {}
    answers: dict[int, list[str]] = {}
    live = set(range(len(trials)))
    for turn, sampling in enumerate(samplings, start=1):
        for dialog, trial in zip(dialogs, trials, strict=True):
            dialog.append(Message("user", trial.turns[turn - 1]))
        live -= {place for place in live if len(chat_format.encode_prompt(dialogs[place])) > max_tokens}
        replies = _replies(engine, chat_format, {place: dialogs[place] for place in sorted(live)}, sampling)
        if turn in turns:
            asking = {
                place: [*dialogs[place][:-1], Message("user", question)]
                for place in sorted(live)
                if (question := _recall_question(trials[place], turn)) is not None
            }
            fitting = {k: v for k, v in asking.items() if len(chat_format.encode_prompt(v)) <= max_tokens}
            measured = {k: v for k, v in replies.items() if k not in asking}
            measured |= _replies(engine, chat_format, fitting, sampling)
            kept[turn] = [
                _is_kept(trial, measured[place]) if place in measured else None for place, trial in enumerate(trials)
            ]
            answers[turn] = [measured.get(place, "") for place in range(len(trials))]
        for place in live:
            dialogs[place].append(as_said(chat_format, replies[place]))
    return Outcome(kept=kept, answers=answers)


def as_said(chat_format: ChatFormat, answer: str) -> Message:
    """The answer as a message; dots replace one that a dialog cannot contain (empty, or with a tag of the format)."""
    return Message("assistant", answer.strip() if is_allowed(chat_format, answer) else "...")


def rates(outcome: Outcome, trials: Sequence[Trial], *, kind: str, family: str | None = None) -> dict[int, Rate]:
    """The share of the trials of a kind, or of one family, that followed their instruction, by turn."""
    by_turn = {}
    for turn, kept in outcome.kept.items():
        pairs = [(float(value), trial.turns) for value, trial in _of(kept, trials, kind, family) if value is not None]
        if pairs:
            values, dialogs = zip(*pairs, strict=True)
            low, high = proportion_interval(values, groups=dialogs)
            by_turn[turn] = Rate(fmean(values), low, high, len(values))
    return by_turn


def differences(one: Outcome, other: Outcome, trials: Sequence[Trial], *, kind: str) -> dict[int, Rate]:
    """Share of one minus that of the other, trial by trial, with its 95% interval, by turn."""
    by_turn = {}
    for turn in one.kept:
        both = zip(_of(one.kept[turn], trials, kind), _of(other.kept[turn], trials, kind), strict=True)
        pairs = [(float(a), float(b), trial.turns) for (a, trial), (b, _) in both if a is not None and b is not None]
        if pairs:
            ones, others, dialogs = zip(*pairs, strict=True)
            gap = paired_bootstrap(ones, others, groups=dialogs)
            by_turn[turn] = Rate(gap.value, gap.low, gap.high, len(pairs))
    return by_turn


def _of(
    kept: Sequence[bool | None], trials: Sequence[Trial], kind: str, family: str | None = None
) -> list[tuple[bool | None, Trial]]:
    """Outcomes of a kind, each with its trial; trials of one dialog have the same turns, by which they are grouped."""
    return [
        (value, trial)
        for value, trial in zip(kept, trials, strict=True)
        if trial.kind == kind and family in (None, trial.family)
    ]


def _replies(
    engine: RolloutEngine, chat_format: ChatFormat, dialogs: Mapping[int, Sequence[Message]], sampling: Sampling
) -> dict[int, str]:
    if not dialogs:
        return {}
    prompts = [chat_format.encode_prompt(dialog) for dialog in dialogs.values()]
    completions = scatter_generate(engine, prompts, samples_per_prompt=1, sampling=sampling)
    return {
        place: chat_format.decode_answer(completion.token_ids)
        for place, (completion,) in zip(dialogs, completions, strict=True)
    }


def _recall_question(trial: Trial, turn: int) -> str | None:
    """The question that replaces the user's turn if there is no checker."""
    questions = recall_questions(trial.instruction.constraints[0])
    if trial.kind == CHECKED or not questions:
        return None
    return questions[int(fraction(f"{' '.join(trial.turns)} {turn}", salt="gatt asked") * len(questions))]


def _is_kept(trial: Trial, answer: str) -> bool:
    constraint = trial.instruction.constraints[0]
    return is_kept(constraint, answer) if trial.kind == CHECKED else recalled(constraint, answer)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Sequences of user turns by split; no dialog is in two of them."""

    train: list[Turns]
    validation: list[Turns]
    test: list[Turns]


def load_sequences(
    data: Data, chat_format: ChatFormat, *, turns: int, context: int, seed: int, only_test: bool = False
) -> Sequences:
    """Sequences of `turns` user turns from the dialogs of `data.sft`, for a policy that reads `context` tokens.

    A shorter dialog is continued with other dialogs of its split: what matters is that many turns lie between the
    instruction and the last answer, not that they share a subject (ours; the paper takes dialogs as they are).
    With `only_test`, for measuring, there are only test sequences, and there may be none.
    """
    if only_test and not data.sft:
        return Sequences([], [], [])
    most_tokens = context // _TURN_SHARE
    mixture = load_mixture(data.sft, data.split, Dialog, forbidden=chat_format.forbidden, seed=seed)

    def of(side: str, dialogs: Sequence[Dialog]) -> list[Turns]:
        return joined(dialogs, chat_format, turns=turns, most_tokens=most_tokens, key=f"gatt {seed} {side}")

    test = of("test", mixture.test)
    if only_test:
        return Sequences([], [], test)
    train, validation = of("train", mixture.train), of("validation", mixture.validation)
    if not train or not test:
        raise DataError(
            f"data.sft: its dialogs give {plural(len(train), 'sequence')} of {turns} user turns of at most {most_tokens} tokens to "
            f"train on and {len(test)} for testing. Ghost Attention needs both. "
            "Add dialogs, or lower gatt.turns and gatt.evaluation_turns."
        )
    return Sequences(train, validation, test)


def joined(
    dialogs: Sequence[Dialog], chat_format: ChatFormat, *, turns: int, most_tokens: int, key: str
) -> list[Turns]:
    """User turns of the dialogs in a seeded order, `turns` per sequence; a dialog with a longer turn is left out."""
    sequences: list[Turns] = []
    begun: list[str] = []
    for place in epoch_order(len(dialogs), 1, key):
        said = [message.content for message in dialogs[place].messages if message.role == "user"]
        lengths = (len(chat_format.encode_prompt((Message("user", text),))) for text in said)
        if any(length > most_tokens for length in lengths):
            continue
        begun += said
        if len(begun) >= turns:
            sequences.append(tuple(begun[:turns]))
            begun = []
    return sequences
