"""Dialogs in which an instruction is kept: sampled with it in every turn, stored with it in the first alone.

Llama 2, arXiv:2307.09288, section 3.3: an instruction to hold throughout is concatenated to all user messages of a
dialog; answers are sampled with the present policy; for training it stays in the first turn only, as the system text,
and the loss is on the last answer alone, so that a model learns to attend to it from afar.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from llamachat.answers import making
from llamachat.answers.groups import is_allowed
from llamachat.answers.responses import Response
from llamachat.answers.sequences import Turns
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.constraints import (
    Constraint,
    Instruction,
    mended,
    passes,
    plain_recall,
    recall_questions,
    recalled,
)
from llamachat.data.loading import fraction
from llamachat.data.prompts import EncodedPrompt
from llamachat.rollout.engine import Completion, RolloutEngine, Sampling, scatter_generate

Rank = Callable[[Sequence[Sequence[Response]]], list[list[int]]]  # places of each prompt's answers, best first


@dataclass(slots=True)
class Conversation:
    """One dialog as it grows: what the user will say, what the policy has said, and why it ended early, if it did."""

    instruction: Instruction
    turns: Turns
    asked: Constraint | None = None  # what the last turn asks for, where it is a recall question
    answers: list[str] = field(default_factory=list)
    dropped: str | None = None

    @property
    def is_open(self) -> bool:
        return self.dropped is None and len(self.answers) < len(self.turns)

    def keeps(self, answer: str) -> bool:
        """Whether an answer to the present turn keeps the instruction, and remembers what it was asked for."""
        is_last = len(self.answers) == len(self.turns) - 1
        remembers = not is_last or self.asked is None or recalled(self.asked, answer)
        return remembers and (not self.instruction.checkable or passes(self.instruction, answer))

    def prompt(self) -> tuple[Message, ...]:
        """The present turn with all before it, the instruction on each."""
        messages: list[Message] = []
        for turn, answer in zip(self.turns, [*self.answers, None], strict=False):
            messages.append(Message("user", with_instruction(self.instruction.text, turn)))
            if answer is None:
                break
            messages.append(Message("assistant", answer))
        return tuple(messages)


@dataclass(frozen=True, slots=True)
class Made:
    """A whole dialog, ready to be stored."""

    instruction: str
    families: list[str]
    turns: list[str]
    answers: list[str]
    tokens: int  # of the last answer
    passing: float  # share of the samples of the last turn that kept the instruction
    is_mended: bool  # none of them did, and the answer was put right by rule

    def to_plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> "Made":
        return Made(**values)


def with_instruction(instruction: str, turn: str) -> str:
    """A user turn as the policy is asked it while dialogs are made."""
    return f"{turn} {instruction}"


def conversation(instruction: Instruction, sequence: Turns, *, key: str, recall_share: float) -> Conversation:
    """The first turns of the sequence, two of them at least; a share of those with a figure or hobby end by asking for it."""
    count = 2 + int(fraction(key, salt="gatt turns") * (len(sequence) - 1))
    turns, asked = sequence[:count], None
    remembered = [constraint for constraint in instruction.constraints if constraint.recall]
    if remembered and fraction(key, salt="gatt recall") < recall_share:
        asked = remembered[0]
        questions = recall_questions(asked)
        question = questions[int(fraction(key, salt="gatt question") * len(questions))]
        turns = (*turns[:-1], question)
    return Conversation(instruction, turns, asked)


@dataclass(frozen=True, slots=True)
class Speaker:
    """What answers: an engine, how it samples, and the rank of answers where reward models give one."""

    engine: RolloutEngine
    chat_format: ChatFormat
    samples_per_turn: int
    max_tokens: int  # of a prompt
    mends: bool
    rank: Rank | None = None  # by reward models


def speak(speaker: Speaker, conversations: Sequence[Conversation], sampling: Sequence[Sampling]) -> list[Made]:
    """Carry the conversations to their ends, turn by turn and all together; `sampling` has an entry for each turn.

    In each turn one of the samples that keep the instruction goes on, in earlier turns another whole one where none does.
    """
    last: dict[int, _Said] = {}
    for turn in sampling:
        live = [one for one in conversations if one.is_open]
        prompts = _prompts(speaker, live)
        live = [one for one in live if one.is_open]
        if not live:
            break
        found = scatter_generate(speaker.engine, prompts, samples_per_prompt=speaker.samples_per_turn, sampling=turn)
        order = _order(speaker, live, prompts, found)
        for one, samples, places in zip(live, found, order, strict=True):
            last[id(one)] = _go_on(one, samples, places, speaker)
    return [
        Made(
            one.instruction.text,
            [constraint.family for constraint in one.instruction.constraints],
            list(one.turns),
            one.answers,
            tokens=last[id(one)].tokens,
            passing=last[id(one)].passing,
            is_mended=last[id(one)].is_mended,
        )
        for one in conversations
        if one.dropped is None
    ]


def dialog_line(made: Made, step: str) -> str:
    """A dialog as it is stored: the instruction in the first turn, and the last answer to be learnt."""
    context = [Message("system", made.instruction)]
    for turn, answer in zip(made.turns, [*made.answers[:-1], None], strict=True):
        context.append(Message("user", turn))
        if answer is not None:
            context.append(Message("assistant", answer))
    return making.dialog_line(context, made.answers[-1], {"step": step, "families": made.families})


def counted(conversations: Sequence[Conversation]) -> dict[str, int]:
    """Dialogs left out, by reason."""
    return dict(Counter(one.dropped for one in conversations if one.dropped is not None))


def _prompts(speaker: Speaker, live: Sequence[Conversation]) -> list[list[int]]:
    """Token ids of the prompts that fit; a conversation whose prompt does not is left out."""
    found = []
    for one in live:
        ids = list(speaker.chat_format.encode_prompt(one.prompt()))
        if len(ids) > speaker.max_tokens:
            one.dropped = (
                "dialogs left out: the instruction and one turn are longer than the context"
                if not one.answers
                else "dialogs left out: with the instruction in every turn they are longer than the context"
            )
        else:
            found.append(ids)
    return found


def _order(
    speaker: Speaker,
    live: Sequence[Conversation],
    prompts: Sequence[Sequence[int]],
    found: Sequence[Sequence[Completion]],
) -> list[list[int]]:
    if speaker.rank is None:
        return [list(range(len(samples))) for samples in found]
    by_prompt = []
    for one, ids, samples in zip(live, prompts, found, strict=True):
        prompt = EncodedPrompt(one.prompt(), tuple(ids), is_safety=False, name="")
        by_prompt.append(
            [
                Response(
                    prompt=prompt,
                    ids=sample.token_ids,
                    logprobs=sample.logprobs,
                    is_finished=sample.is_finished,
                    text=speaker.chat_format.decode_answer(sample.token_ids),
                )
                for sample in samples
            ]
        )
    return speaker.rank(by_prompt)


@dataclass(frozen=True, slots=True)
class _Said:
    """What came of one turn."""

    passing: float = 0.0
    tokens: int = 0
    is_mended: bool = False


def _go_on(one: Conversation, samples: Sequence[Completion], order: Sequence[int], speaker: Speaker) -> _Said:
    """Take one of the samples as the answer."""
    chat_format = speaker.chat_format
    texts = [chat_format.decode_answer(sample.token_ids) for sample in samples]
    whole = [place for place in order if samples[place].is_finished and is_allowed(chat_format, texts[place])]
    kept = [place for place in whole if one.keeps(texts[place])]
    is_last = len(one.answers) == len(one.turns) - 1
    if not whole:
        one.dropped = "dialogs left out: an answer is empty, or cut by the length limit"
        return _Said()
    taken = (kept or whole)[0]
    text: str | None = texts[taken].strip()
    if is_last and not kept:
        text = put_right(one, texts[taken]) if speaker.mends else None
        if text is None or not is_allowed(chat_format, text):
            one.dropped = "dialogs left out: no sample of the last answer keeps the instruction"
            return _Said()
    assert text is not None, "what is taken says something"
    one.answers.append(text)
    return _Said(len(kept) / len(samples), len(samples[taken].token_ids), is_mended=is_last and not kept)


def put_right(one: Conversation, answer: str) -> str | None:
    """The last answer made to keep the instruction and to name what it was asked for; None where no rule does that."""
    if one.asked is not None and not recalled(one.asked, answer):
        answer = plain_recall(one.asked, one.turns[-1])
    text = mended(one.instruction, answer) if one.instruction.checkable else answer
    return text if text is not None and one.keeps(text) else None
