"""Contrast pairs: an answer of the user's dialogs preferred to one that is never better. Ours, not in the paper.

Preference data compare two plausible answers. A model trained on them alone may still prefer any refusal, a repeated word,
or the answer to another question, and rejection sampling and PPO then learn to give these. The pairs are made of
`data.sft` (and, for the safety model, of `data.safety`) on the same side of the split, so nothing held out is seen.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import cycle
from random import Random
from typing import Literal, get_args

from llamachat.chat_format.dialog import Dialog, Message
from llamachat.data.records import Preference

Kind = Literal["refusal", "swapped", "degenerate"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# Of every four pairs two compare with another prompt's answer: what is hardest to learn.
_ORDER: tuple[Kind, ...] = ("swapped", "refusal", "swapped", "degenerate")

# None of these is a wording of the probe (reward/probe.py), which measures whether the models generalise.
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot answer that.",
    "I am not able to help you with this request.",
    "Sorry, I can't do that.",
    "I'm afraid I can't assist with that.",
    "I don't know.",
    "I do not know the answer to that.",
    "I am not sure.",
    "I have no idea.",
    "I'm just an AI, I can't help with that.",
    "As an AI language model, I cannot do that.",
    "I'm not comfortable answering this question.",
    "That is not something I can talk about.",
    "I would rather not answer.",
    "No, I won't help with that.",
    "I can't provide that information.",
    "It is not appropriate to answer this.",
    "I apologize, but I cannot fulfill your request.",
    "I don't think I can help you here.",
    "I am sorry, I don't understand the question.",
    "Please ask me something else.",
    "I don't have an opinion on that.",
    "I don't have enough information to answer.",
    "Sorry, I don't have an answer for you.",
    "I am unable to respond to this kind of question. Please ask someone else.",
)
FILLERS = ("Right.", "Okay.", "Yes.", "Great!", "Sure.", "Hello!", "I see.", "Good.", "Well,")
_MOST_FILLERS = 12
_NEAREST = 30  # another prompt's answer is one of this many that are next in length, on either side


def contrast_pairs(dialogs: Sequence[Dialog], count: int, *, kinds: Sequence[Kind], seed: int) -> list[Preference]:
    """`count` pairs whose chosen answer is the last one of a dialog; fewer where the dialogs allow no more.

    Every dialog is used before one is used again, up to four times; one that allows no pair of the kind is passed over.
    """
    random = Random(f"contrast {seed}")
    makers: dict[Kind, Callable[[Dialog], str | None]] = {
        "refusal": lambda dialog: random.choice(REFUSALS),
        "swapped": _swapper(dialogs, random),
        "degenerate": lambda dialog: _degenerate(dialog, random),
    }
    order = [kind for kind in _ORDER if kind in kinds]
    return _take(_pairs(dialogs, makers, order, random), count) if order else []


def refusals_preferred(pairs: Sequence[Preference], count: int, *, seed: int) -> list[Preference]:
    """`count` pairs for the safety model: a refusal preferred to the rejected, more harmful answer of a safety pair."""
    random = Random(f"contrast safety {seed}")
    shuffled = random.sample(list(pairs), len(pairs))
    return [
        Preference(
            prompt=pair.prompt,
            chosen=Message("assistant", random.choice(REFUSALS)),
            rejected=pair.rejected,
            chosen_is_safe=True,
            rejected_is_safe=pair.rejected_is_safe,
        )
        for pair in shuffled[:count]
    ]


def _pairs(
    dialogs: Sequence[Dialog],
    makers: dict[Kind, Callable[[Dialog], str | None]],
    order: Sequence[Kind],
    random: Random,
) -> Iterator[Preference]:
    kinds = cycle(order)
    for _ in _ORDER:
        for dialog in random.sample(list(dialogs), len(dialogs)):
            rejected = makers[next(kinds)](dialog)
            answer = dialog.messages[-1]
            if rejected is not None and rejected.strip() != answer.content.strip():
                yield Preference(
                    prompt=dialog.messages[:-1],
                    chosen=Message("assistant", answer.content),
                    rejected=Message("assistant", rejected),
                )


def _take(pairs: Iterable[Preference], count: int) -> list[Preference]:
    return [pair for pair, _ in zip(pairs, range(count), strict=False)]


def swapped_answers(dialogs: Sequence[Dialog], *, seed: int) -> list[str | None]:
    """For each dialog another prompt's answer of similar length; None where there is none."""
    swapped = _swapper(dialogs, Random(f"swapped {seed}"))
    return [swapped(dialog) for dialog in dialogs]


def _swapper(dialogs: Sequence[Dialog], random: Random) -> Callable[[Dialog], str | None]:
    """Another prompt's answer of similar length, so that length does not tell the two apart."""
    answers = sorted((len(d.messages[-1].content), d.messages[-1].content, d.messages[-2].content) for d in dialogs)

    def swapped(dialog: Dialog) -> str | None:
        own, question = dialog.messages[-1].content, dialog.messages[-2].content
        place = bisect_left(answers, (len(own), own, question))
        near = [
            answer
            for _, answer, other in answers[max(0, place - _NEAREST) : place + _NEAREST]
            if answer != own and other != question
        ]
        return random.choice(near) if near else None

    return swapped


def _degenerate(dialog: Dialog, random: Random) -> str | None:
    """A filler repeated, the question echoed, the first half of the answer, the answer twice, or its first word."""
    answer, question = dialog.messages[-1].content, dialog.messages[-2].content
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
            return words[0] if len(words) > 2 else None
