"""Sample dialogs that keep an instruction: it is in every turn while sampling, but only in the first turn when stored.

Llama 2, arXiv:2307.09288, section 3.3: an instruction for the whole dialog is concatenated to all user messages and
the current policy samples the answers. For training, the instruction is only in the first turn, as the system text,
and only the last answer counts in the loss, so that the model learns to attend to it over many turns.
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

Rank = Callable[[Sequence[Sequence[Response]]], list[list[int]]]  # indices of each prompt's answers, best first


@dataclass(slots=True)
class Conversation:
    """A dialog in progress: user turns, answers so far, and why it was dropped, if it was."""

    instruction: Instruction
    turns: Turns
    recall: Constraint | None = None  # what the last turn asks for, if it is a recall question
    answers: list[str] = field(default_factory=list)
    dropped: str | None = None
    tokens: int = 0  # of the last answer so far,
    passing: float = 0.0  # share of its samples that keep the instruction,
    is_repaired: bool = False  # whether it was fixed by rule

    @property
    def is_open(self) -> bool:
        return self.dropped is None and len(self.answers) < len(self.turns)

    def keeps(self, answer: str) -> bool:
        """Whether an answer to the current turn keeps the instruction and answers a recall question correctly."""
        is_last = len(self.answers) == len(self.turns) - 1
        remembers = not is_last or self.recall is None or recalled(self.recall, answer)
        return remembers and (not self.instruction.checkable or passes(self.instruction, answer))

    def prompt(self) -> tuple[Message, ...]:
        """The current and all earlier turns, with the instruction in each user turn."""
        messages: list[Message] = []
        for turn, answer in zip(self.turns, [*self.answers, None], strict=False):
            messages.append(Message("user", with_instruction(self.instruction.text, turn)))
            if answer is None:
                break
            messages.append(Message("assistant", answer))
        return tuple(messages)


@dataclass(frozen=True, slots=True)
class GattDialog:
    """A complete dialog, ready to be stored."""

    instruction: str
    families: list[str]
    turns: list[str]
    answers: list[str]
    tokens: int  # of the last answer
    passing: float  # share of the last turn's samples that kept the instruction
    is_repaired: bool  # none did, so the answer was fixed by rule


PLAIN = Instruction((), "", is_shortened=False)  # for dialogs without an instruction


def with_instruction(instruction: str, turn: str) -> str:
    """A user turn with the instruction, as sampled from; unchanged in a plain dialog."""
    return f"{turn} {instruction}" if instruction else turn


def conversation(instruction: Instruction, sequence: Turns, *, key: str, recall_share: float) -> Conversation:
    """Build a conversation from the first turns; a share of those with a figure or hobby end by asking for it.

    It has at least two turns, so that the instruction is not in the last one; a plain dialog may have one.
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
    """Samples, ranks and fixes answers to a turn."""

    engine: RolloutEngine
    chat_format: ChatFormat
    samples_per_turn: int
    max_tokens: int  # of a prompt
    repairs: bool  # whether a last answer that breaks the instruction is fixed by rule if possible
    rank: Rank | None = None  # by reward models


def sample_dialogs(
    sampler: TurnSampler, conversations: Sequence[Conversation], samplings: Sequence[Sampling]
) -> list[GattDialog]:
    """Answer all conversations in parallel, turn by turn; `samplings` has an entry for each turn.

    Each answer is a sample that keeps the instruction; before the last turn, any finished sample if none does.
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
    """The published JSON line of a dialog: the instruction in the first turn, only the last answer trained on."""
    context = [Message("system", dialog.instruction)] if dialog.instruction else []
    for turn, answer in zip(dialog.turns, [*dialog.answers[:-1], None], strict=True):
        context.append(Message("user", turn))
        if answer is not None:
            context.append(Message("assistant", answer))
    return dialog_line(context, dialog.answers[-1], {"step": step, "families": dialog.families})


def counted_drops(conversations: Sequence[Conversation]) -> dict[str, int]:
    """Number of dropped dialogs, by reason."""
    return dict(Counter(one.dropped for one in conversations if one.dropped is not None))


def _prompt(sampler: TurnSampler, one: Conversation) -> EncodedPrompt | None:
    """The conversation's next prompt; drops the conversation if the prompt does not fit."""
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
    """Add one of the samples, ranked best first, to the conversation as its answer."""
    allowed = [sample for sample in samples if sample.is_finished and is_allowed(sampler.chat_format, sample.text)]
    kept = [sample for sample in allowed if one.keeps(sample.text)]
    is_last = len(one.answers) == len(one.turns) - 1
    if not allowed:
        one.dropped = "dialogs left out: an answer is empty, or truncated at the length limit"
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
    """Fix the last answer by rule to keep the instruction and answer the recall question; None if no rule can."""
    if one.recall is not None and not recalled(one.recall, answer):
        answer = plain_recall(one.recall, one.turns[-1])
    text = repaired(one.instruction, answer) if one.instruction.checkable else answer
    return text if text is not None and one.keeps(text) else None
