"""Dialogs in which an instruction is kept: sampled with it in every turn, stored with it in the first alone.

Llama 2, arXiv:2307.09288, section 3.3: an instruction to hold throughout is concatenated to all user messages of a
dialog; answers are sampled with the present policy; for training it stays in the first turn only, as the system text,
and the loss is on the last answer alone, so that a model learns to attend to it over many turns.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llamachat.answers.consistency import Turns
from llamachat.answers.dialog_step import dialog_line
from llamachat.answers.groups import is_allowed
from llamachat.answers.responses import Response, sample
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.constraints.families import Constraint
from llamachat.constraints.instruction import Instruction, passes, plain_recall, recall_questions, recalled, repaired
from llamachat.data.loading import fraction
from llamachat.data.prompts import EncodedPrompt
from llamachat.rollout.engine import RolloutEngine, Sampling

Rank = Callable[[Sequence[Sequence[Response]]], list[list[int]]]  # places of each prompt's answers, best first


@dataclass(slots=True)
class Conversation:
    """One dialog under way: the user's turns, the answers so far, and why it was left out, if it was."""

    instruction: Instruction
    turns: Turns
    recall: Constraint | None = None  # what the last turn asks for, where it is a recall question
    answers: list[str] = field(default_factory=list)
    dropped: str | None = None
    tokens: int = 0  # of the last answer so far,
    passing: float = 0.0  # the share of its samples that keep the instruction,
    is_repaired: bool = False  # and whether it was fixed by rule

    @property
    def is_open(self) -> bool:
        return self.dropped is None and len(self.answers) < len(self.turns)

    def keeps(self, answer: str) -> bool:
        """Whether an answer to the present turn keeps the instruction, and answers a recall question rightly."""
        is_last = len(self.answers) == len(self.turns) - 1
        remembers = not is_last or self.recall is None or recalled(self.recall, answer)
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
class GattDialog:
    """A whole dialog, ready to be stored."""

    instruction: str
    families: list[str]
    turns: list[str]
    answers: list[str]
    tokens: int  # of the last answer
    passing: float  # share of the samples of the last turn that kept the instruction
    is_repaired: bool  # none of them did, and the answer was corrected by rule


PLAIN = Instruction((), "", is_shortened=False)  # of a dialog without one


def with_instruction(instruction: str, turn: str) -> str:
    """A user turn as the policy reads it while dialogs are made; of a plain dialog as it is."""
    return f"{turn} {instruction}" if instruction else turn


def conversation(instruction: Instruction, sequence: Turns, *, key: str, recall_share: float) -> Conversation:
    """The first turns of the sequence; a share of those with a figure or hobby end by asking for it.

    They are two at least, so that the instruction is not in the last one; one is enough for a dialog without any.
    """
    fewest = 2 if instruction.text else 1
    count = fewest + int(fraction(key, salt="gatt turns") * (len(sequence) - fewest + 1))
    turns, recall = sequence[:count], None
    remembered = [constraint for constraint in instruction.constraints if constraint.recall]
    if remembered and fraction(key, salt="gatt recall") < recall_share:
        recall = remembered[0]
        questions = recall_questions(recall)
        question = questions[int(fraction(key, salt="gatt question") * len(questions))]
        turns = (*turns[:-1], question)
    return Conversation(instruction, turns, recall)


@dataclass(frozen=True, slots=True)
class TurnSampler:
    """How answers to a turn are sampled, ranked and fixed."""

    engine: RolloutEngine
    chat_format: ChatFormat
    samples_per_turn: int
    max_tokens: int  # of a prompt
    repairs: bool  # a last answer that breaks the instruction is fixed by rule where possible
    rank: Rank | None = None  # by reward models


def sample_dialogs(
    sampler: TurnSampler, conversations: Sequence[Conversation], samplings: Sequence[Sampling]
) -> list[GattDialog]:
    """Answer the conversations turn by turn, all together; `samplings` has an entry for each turn.

    Each answer is one of the samples that keep the instruction; in earlier turns another finished one where none does.
    """
    count = sampler.samples_per_turn
    for sampling in samplings:
        prompts = [prompt for one in conversations if one.is_open and (prompt := _prompt(sampler, one)) is not None]
        live = [one for one in conversations if one.is_open]
        if not live:
            break
        responses = sample(sampler.engine, sampler.chat_format, prompts, sampling, samples_per_prompt=count)
        groups = [responses[place * count : (place + 1) * count] for place in range(len(live))]
        order = sampler.rank(groups) if sampler.rank is not None else [list(range(count))] * len(live)
        for one, group, places in zip(live, groups, order, strict=True):
            _answer(one, [group[place] for place in places], sampler)
    return [
        GattDialog(
            one.instruction.text,
            [constraint.family for constraint in one.instruction.constraints],
            list(one.turns),
            one.answers,
            tokens=one.tokens,
            passing=one.passing,
            is_repaired=one.is_repaired,
        )
        for one in conversations
        if one.dropped is None
    ]


def dialog_text(dialog: GattDialog, step: str) -> str:
    """The line of a dialog as it is published: the instruction in the first turn, and only the last answer trained on."""
    context = [Message("system", dialog.instruction)] if dialog.instruction else []
    for turn, answer in zip(dialog.turns, [*dialog.answers[:-1], None], strict=True):
        context.append(Message("user", turn))
        if answer is not None:
            context.append(Message("assistant", answer))
    return dialog_line(context, dialog.answers[-1], {"step": step, "families": dialog.families})


def counted_drops(conversations: Sequence[Conversation]) -> dict[str, int]:
    """The number of dialogs left out, by reason."""
    return dict(Counter(one.dropped for one in conversations if one.dropped is not None))


def _prompt(sampler: TurnSampler, one: Conversation) -> EncodedPrompt | None:
    """The conversation's next prompt; a conversation whose prompt does not fit is left out."""
    messages = one.prompt()
    ids = tuple(sampler.chat_format.encode_prompt(messages))
    if len(ids) <= sampler.max_tokens:
        return EncodedPrompt(messages, ids, is_safety=False, name="")
    one.dropped = (
        "dialogs left out: the instruction and one turn are longer than the context"
        if not one.answers
        else "dialogs left out: with the instruction in every turn they are longer than the context"
    )
    return None


def _answer(one: Conversation, samples: Sequence[Response], sampler: TurnSampler) -> None:
    """Add one of the samples, which are ranked best first, to the conversation as its answer."""
    allowed = [sample for sample in samples if sample.is_finished and is_allowed(sampler.chat_format, sample.text)]
    kept = [sample for sample in allowed if one.keeps(sample.text)]
    is_last = len(one.answers) == len(one.turns) - 1
    if not allowed:
        one.dropped = "dialogs left out: an answer is empty, or cut by the length limit"
        return
    chosen = (kept or allowed)[0]
    text: str | None = chosen.text.strip()
    if is_last and not kept:
        text = put_right(one, chosen.text) if sampler.repairs else None
        if text is None or not is_allowed(sampler.chat_format, text):
            one.dropped = "dialogs left out: no sample of the last answer keeps the instruction"
            return
    assert text is not None, "an answer that is chosen has text"
    one.answers.append(text)
    one.passing, one.tokens = len(kept) / len(samples), len(chosen.ids)
    one.is_repaired = is_last and not kept


def put_right(one: Conversation, answer: str) -> str | None:
    """The last answer fixed so that it keeps the instruction and answers the recall question; None where no rule can."""
    if one.recall is not None and not recalled(one.recall, answer):
        answer = plain_recall(one.recall, one.turns[-1])
    text = repaired(one.instruction, answer) if one.instruction.checkable else answer
    return text if text is not None and one.keeps(text) else None
