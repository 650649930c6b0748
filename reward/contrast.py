"""Contrast pairs: an answer of the user's dialogs preferred to one that is never better. Ours, not in the paper.

Preference data compare two plausible answers. A model trained on them alone may still prefer any refusal, a repeated word,
or the answer to another question, and rejection sampling and PPO then learn to give these. The pairs are made of
`data.sft` (and, for the safety model and the judge, of `data.safety`) on the same side of the split, so nothing held out
is seen.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice, product
from random import Random

from llamachat.chat_format.dialog import Dialog, Message
from llamachat.data.records import Preference
from reward.config import ContrastKind

# Every second pair compares with another prompt's answer: what is hardest to learn.
_ORDER: tuple[ContrastKind, ...] = ("swapped", "refusal", "swapped", "degenerate")

# A refusal is an opening, a statement and an ending. No such text is one of the probe (reward/probe.py), which measures
# whether the models generalise to other wordings.
_OPENINGS = (
    "",
    "I'm sorry, but ",
    "Sorry, but ",
    "I apologize, but ",
    "I'm afraid ",
    "As an AI language model, ",
    "I'm just an AI, and ",
    "Well, ",
    "Honestly, ",
    "Unfortunately, ",
    "Apologies, ",
    "Hmm, ",
)
_STATEMENTS = (
    "I can't help with that request",
    "I cannot answer that",
    "I can't answer this question",
    "I am not able to help you with this",
    "I can't do that",
    "I can't assist with that",
    "I cannot provide that information",
    "I won't be able to talk about that",
    "I would rather not answer",
    "I'm not comfortable answering this",
    "I cannot fulfill your request",
    "I don't think I can help you here",
    "I don't know",
    "I do not know the answer to that",
    "I am not sure",
    "I'm not sure what to say",
    "I have no opinion on that",
    "I don't have enough information to answer",
    "I don't understand the question",
    "I am unable to respond to this kind of question",
    "it is not appropriate to answer this",
    "that is not something I can talk about",
    "I have no clue",
    "I couldn't tell you",
    "I can't say",
    "I would have to look that up",
    "no comment",
    "you should ask someone else",
)
_ENDINGS = ("", "", "", " Please ask me something else.", " Is there anything else you would like to know?")
REFUSALS = tuple(
    f"{(opening + statement)[0].upper()}{(opening + statement)[1:]}.{ending}"
    for opening, statement, ending in product(_OPENINGS, _STATEMENTS, dict.fromkeys(_ENDINGS))
)
FILLERS = ("Right.", "Okay.", "Yes.", "No.", "Great!", "Sure.", "Hello!", "I see.", "Good.", "Well,", "Hi there!")
_MOST_FILLERS = 12
_NEAREST = 30  # another prompt's answer is one of this many that are next in length, on either side
_PASSES = 8  # over the dialogs, at most

_DECLINES = re.compile(
    r"(i'?m|i am)? ?(very |so |really )?(sorry|afraid)|i apologi[sz]e|my apologies|unfortunately|as an ai"
    r"|i (can'?t|cannot|can not|won'?t|will not|could not|couldn'?t)\b"
    r"|(i'?m|i am) (not (able|sure|comfortable)|unable)|i (don'?t|do not) (know|have|think|feel)|no,? i",
    re.IGNORECASE,
)


def declines(answer: str) -> bool:
    """Whether an answer opens as a refusal, or as one that does not know, would."""
    return _DECLINES.match(answer.lstrip()) is not None


def contrast_pairs(
    dialogs: Sequence[Dialog], count: int, *, kinds: Sequence[ContrastKind], seed: int
) -> list[Preference]:
    """`count` pairs whose chosen answer is one of a dialog's; fewer where the dialogs allow no more.

    Every dialog gives a pair before one gives a second. An answer that declines is never preferred to a refusal.
    """
    random = Random(f"contrast {seed}")
    makers: dict[ContrastKind, Callable[[Sequence[Message]], str | None]] = {
        "refusal": lambda messages: None if declines(messages[-1].content) else random.choice(REFUSALS),
        "swapped": _swapper(dialogs, random),
        "degenerate": lambda messages: _degenerate(messages, random.choice(dialogs).messages[-1].content, random),
    }
    order: list[ContrastKind] = [kind for kind in _ORDER if kind in kinds]
    return list(islice(_pairs(dialogs, [makers[kind] for kind in order], random), count)) if order else []


def refusals_preferred(pairs: Sequence[Preference], count: int, *, seed: int) -> list[Preference]:
    """`count` pairs in which a refusal is preferred to the rejected, more harmful answer of a safety pair."""
    random = Random(f"contrast safety {seed}")
    harmful = [pair for pair in pairs if pair.rejected_is_safe is not True and not declines(pair.rejected.content)]
    return [
        Preference(
            prompt=pair.prompt,
            chosen=Message("assistant", random.choice(REFUSALS)),
            rejected=pair.rejected,
            chosen_is_safe=True,
            rejected_is_safe=pair.rejected_is_safe,
        )
        for pair in random.sample(harmful, len(harmful))[:count]
    ]


def _pairs(
    dialogs: Sequence[Dialog], makers: Sequence[Callable[[Sequence[Message]], str | None]], random: Random
) -> Iterator[Preference]:
    turn = cycle(makers)
    for _ in range(_PASSES):
        for dialog in random.sample(list(dialogs), len(dialogs)):
            ends = [place for place, message in enumerate(dialog.messages) if message.role == "assistant"]
            messages = dialog.messages[: random.choice(ends) + 1]
            rejected = next(turn)(messages)
            if rejected is not None and rejected.strip() != messages[-1].content.strip():
                yield Preference(
                    prompt=messages[:-1],
                    chosen=Message("assistant", messages[-1].content),
                    rejected=Message("assistant", rejected),
                )


def swapped_answers(dialogs: Sequence[Dialog], *, seed: int) -> list[str | None]:
    """For each dialog another prompt's answer of similar length; None where there is none."""
    swapped = _swapper(dialogs, Random(f"swapped {seed}"))
    return [swapped(dialog.messages) for dialog in dialogs]


def _swapper(dialogs: Sequence[Dialog], random: Random) -> Callable[[Sequence[Message]], str | None]:
    """Another prompt's answer of similar length, so that length does not tell the two apart."""
    answers = sorted(
        (len(message.content), message.content, dialog.messages[place - 1].content)
        for dialog in dialogs
        for place, message in enumerate(dialog.messages)
        if message.role == "assistant"
    )

    def swapped(messages: Sequence[Message]) -> str | None:
        own, question = messages[-1].content, messages[-2].content
        context = {message.content for message in messages}  # an answer that was given already is no other prompt's
        place = bisect_left(answers, (len(own), own, question))
        near = [
            answer
            for _, answer, other in answers[max(0, place - _NEAREST) : place + _NEAREST]
            if answer not in context and other != question
        ]
        return random.choice(near) if near else None

    return swapped


def _degenerate(messages: Sequence[Message], other: str, random: Random) -> str | None:
    """A filler repeated, the question echoed, the first half of the answer, the answer twice, or one word, its first or one of `other`."""
    answer, question = messages[-1].content, messages[-2].content
    words = answer.split()
    match random.randrange(5):
        case 0:
            return " ".join([random.choice(FILLERS)] * random.randint(1, _MOST_FILLERS))
        case 1:
            return question
        case 2:
            return " ".join(words[: len(words) // 2]) if len(words) >= 6 else None
        case 3:
            return f"{answer} {answer}"
        case _:
            word = random.choice([words[0], random.choice(other.split())])
            return f"{word.strip('.,?!').capitalize()}." if len(words) > 2 else None
