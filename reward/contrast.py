"""Contrast pairs: an answer from the user's dialogs, preferred to one that is never better. Ours, not in the paper.

Preference data compares two plausible answers. A model trained only on it may still prefer any refusal, a repeated
word or the answer to another question, and rejection sampling and PPO then learn to produce these. The pairs are built
from `data.sft` and the chosen answers of `data.helpfulness` (for the safety model and the judge also `data.safety`),
on the same side of the split, so no held-out data is used.
"""

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice, product
from random import Random

from llamachat.chat_format.dialog import Dialog, Message
from llamachat.data.records import Preference, Prompt
from llamachat.runs.inputs import Which
from reward.config import ContrastKind

# The order in which the kinds alternate. A few refusals suffice, except for the safety model, which is also trained to
# prefer refusals of harmful prompts.
_ORDER: tuple[ContrastKind, ...] = (
    *("swapped", "degenerate", "refusal", "degenerate", "swapped", "degenerate", "refusal", "degenerate"),
    *("swapped", "refusal", "degenerate", "swapped", "degenerate", "refusal", "swapped", "degenerate"),
)
_SAFETY_ORDER: tuple[ContrastKind, ...] = (
    *("refusal", "swapped", "refusal", "degenerate"),
    *("refusal", "refusal", "degenerate", "refusal"),
)

# A refusal consists of an opening, a statement and an ending.
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
    "My apologies, but ",
    "Regrettably, ",
    "Thank you for asking, but ",
    "To be honest, ",
    "As an assistant, ",
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
    "I'm unable to help you with that",
    "I'm not sure how to answer this",
    "I am not certain",
    "it is not appropriate to answer this",
    "that is not something I can talk about",
    "I have no clue",
    "I couldn't tell you",
    "I can't say",
    "I would have to look that up",
    "no comment",
    "you should ask someone else",
    "I have to pass on this one",
    "I have to refuse",
    "I will not take part in this",
    "I choose not to respond to that",
    "your request is outside my scope",
    "this goes against my guidelines",
    "this topic is one that I do not discuss",
    "that is more than I am able to give",
    "such a question is not for me to answer",
    "I'm going to say no",
    "my knowledge does not reach that far",
    "it is hard for me to say",
    "nothing comes to mind",
    "I've never heard of that",
)
_ENDINGS = ("", "", "", " Please ask me something else.", " Is there anything else you would like to know?")
REFUSALS = tuple(
    f"{(opening + statement)[0].upper()}{(opening + statement)[1:]}.{ending}"
    for opening, statement, ending in product(_OPENINGS, _STATEMENTS, dict.fromkeys(_ENDINGS))
)
FILLERS = ("Right.", "Okay.", "Yes.", "No.", "Great!", "Sure.", "Hello!", "I see.", "Good.", "Well,", "Hi there!")
# The constant answers of the probe (reward/probe.py). No pair contains one, since the probe measures generalisation.
CONSTANTS: Mapping[str, str] = {
    "refusal_sorry": "I am sorry, but I cannot help with that.",
    "refusal_unable": "Unfortunately I'm unable to do this for you.",
    "refusal_decline": "I must decline to answer this question.",
    "refusal_beyond": "My apologies, this request is beyond what I can do.",
    "unsure": "I am not sure about that.",
    "no_idea": "No idea, sorry.",
    "thanks": "Thanks. " * 11 + "Thanks.",
    "please": "Please. " * 7 + "Please.",
    "one_word": "Banana.",
}
_MOST_REPEATED = 12
_EARLIER = 0.3  # share of echoes that repeat a message before the question
_SHORT_WORDS = 6
_LONGEST_REFUSAL = 300  # maximum length of a real refusal, in characters
_NEAREST = 30  # another prompt's answer is drawn from this many neighbours by length, on either side
_PASSES = 8  # maximum number of passes over the dialogs
# The pairs of a dialog are adjacent, so that their shared prefix is computed once.
_MOST_ANSWERS = 3
_PAIRS_AN_ANSWER = 4  # if the dialog has a single answer; with several, one fewer each

_DECLINES = re.compile(
    r"(i'?m|i am)? ?(very |so |really )?(sorry|afraid)|i apologi[sz]e|my apologies|unfortunately|as an ai"
    r"|i (can'?t|cannot|can not|won'?t|will not|could not|couldn'?t)\b"
    r"|(i'?m|i am) (not (able|sure|comfortable)|unable)|i (don'?t|do not) (know|have|think|feel)|no,? i",
    re.IGNORECASE,
)


def declines(answer: str) -> bool:
    """Whether an answer starts like a refusal or an admission of not knowing."""
    return _DECLINES.match(answer.lstrip()) is not None


def contrast_pairs(
    dialogs: Sequence[Dialog],
    count: int,
    *,
    which: Which,
    kinds: Sequence[ContrastKind],
    seed: int,
    refusals: Sequence[str] = (),
) -> list[Preference]:
    """Up to `count` pairs whose chosen answer is from a dialog; fewer if the dialogs do not allow more.

    Every dialog contributes a few adjacent pairs of several kinds before any dialog contributes more. An answer that
    declines is never preferred to a refusal.
    `refusals` are real refusals of other prompts; they make up an eighth of the refusals used.
    """
    random = Random(f"contrast {seed}")
    pools = [*[REFUSALS] * 7, refusals or REFUSALS]
    makers: dict[ContrastKind, Callable[[Sequence[Message]], str | None]] = {
        "refusal": lambda messages: None if declines(messages[-1].content) else random.choice(random.choice(pools)),
        "swapped": _swapper(dialogs, random),
        "degenerate": _spoiler(dialogs, random),
    }
    order: list[ContrastKind] = [kind for kind in (_SAFETY_ORDER if which == "safety" else _ORDER) if kind in kinds]
    return list(islice(_pairs(dialogs, [makers[kind] for kind in order], random), count)) if order else []


def real_refusals(pairs: Sequence[Preference]) -> list[str]:
    """Short chosen answers of safety pairs that decline."""
    answers = (pair.chosen.content for pair in pairs)
    return list(dict.fromkeys(text for text in answers if len(text) <= _LONGEST_REFUSAL and declines(text)))


def refusals_preferred(
    pairs: Sequence[Preference], prompts: Sequence[Prompt], dialogs: Sequence[Dialog], *, seed: int
) -> list[Preference]:
    """Pairs in which a refusal of a harmful prompt is preferred, in random order.

    The rejected answer is the more harmful answer of a safety pair or, for the harmful `prompts`, an answer from
    `dialogs`.
    """
    random = Random(f"contrast safety {seed}")
    pools = [REFUSALS, real_refusals(pairs) or REFUSALS]
    answers = [text for dialog in dialogs if not declines(text := dialog.messages[-1].content)]
    harmful = [
        (pair.prompt, pair.rejected.content, pair.rejected_is_safe)
        for pair in pairs
        if pair.rejected_is_safe is not True and not declines(pair.rejected.content)
    ]
    harmful += [(prompt.messages, random.choice(answers), None) for prompt in prompts if answers]
    return [
        Preference(
            prompt=prompt,
            chosen=Message("assistant", random.choice(random.choice(pools))),
            rejected=Message("assistant", rejected),
            chosen_is_safe=True,
            rejected_is_safe=is_safe,
        )
        for prompt, rejected, is_safe in random.sample(harmful, len(harmful))
    ]


def preferred_dialogs(pairs: Sequence[Preference]) -> list[Dialog]:
    """One dialog for each prompt of these pairs, with its first chosen answer."""
    first: dict[tuple[Message, ...], Message] = {}
    for pair in pairs:
        first.setdefault(pair.prompt, pair.chosen)
    return [Dialog((*prompt, chosen)) for prompt, chosen in first.items()]


def answers_preferred(pairs: Sequence[Preference]) -> list[Preference]:
    """Pairs whose rejected answer declines and whose chosen answer does not; their prompts are harmless."""
    return [pair for pair in pairs if declines(pair.rejected.content) and not declines(pair.chosen.content)]


def _pairs(
    dialogs: Sequence[Dialog], makers: Sequence[Callable[[Sequence[Message]], str | None]], random: Random
) -> Iterator[Preference]:
    turn = cycle(makers)
    for _ in range(_PASSES):
        for dialog in random.sample(list(dialogs), len(dialogs)):
            ends = [place for place, message in enumerate(dialog.messages) if message.role == "assistant"]
            count = _PAIRS_AN_ANSWER - (len(ends) > 1)
            for end in sorted(random.sample(ends, min(_MOST_ANSWERS, len(ends)))):
                *prompt, chosen = dialog.messages[: end + 1]
                alternatives = [next(turn)((*prompt, chosen)) for _ in range(count)]
                unlike = {chosen.content.strip(), *CONSTANTS.values()}
                for rejected in dict.fromkeys(text for text in alternatives if text):
                    if rejected.strip() not in unlike:
                        yield Preference(prompt=tuple(prompt), chosen=chosen, rejected=Message("assistant", rejected))


def swapped_answers(dialogs: Sequence[Dialog], *, seed: int) -> list[str | None]:
    """For each dialog, another prompt's answer of similar length, or None."""
    swapped = _swapper(dialogs, Random(f"swapped {seed}"))
    return [swapped(dialog.messages) for dialog in dialogs]


def _swapper(dialogs: Sequence[Dialog], random: Random) -> Callable[[Sequence[Message]], str | None]:
    """Return a function that draws another prompt's answer of similar length, so that length gives nothing away."""
    answers = sorted(
        (len(message.content), message.content, dialog.messages[place - 1].content)
        for dialog in dialogs
        for place, message in enumerate(dialog.messages)
        if message.role == "assistant"
    )

    def swapped(messages: Sequence[Message]) -> str | None:
        own, question = messages[-1].content, messages[-2].content
        context = {message.content for message in messages}  # excludes answers that already occur in the dialog
        place = bisect_left(answers, (len(own), own, question))
        near = [
            answer
            for _, answer, other in answers[max(0, place - _NEAREST) : place + _NEAREST]
            if answer not in context and other != question
        ]
        return random.choice(near) if near else None

    return swapped


def _spoiler(dialogs: Sequence[Dialog], random: Random) -> Callable[[Sequence[Message]], str | None]:
    """Return a function that alternates between echoing the dialog, mostly the question, and a bad answer.

    A bad answer is a short answer to another prompt, a repeated phrase, half of the answer, the answer twice, or one
    word.
    """
    others = [message.content for dialog in dialogs for message in dialog.messages if message.role == "assistant"]
    short = [answer for answer in others if len(answer.split()) <= _SHORT_WORDS] or [*FILLERS]
    is_echo = cycle((True, False))

    def spoiled(messages: Sequence[Message]) -> str | None:
        *context, question, answer = (message.content for message in messages)
        words = answer.split()
        if next(is_echo):
            return random.choice(context) if context and random.random() < _EARLIER else question
        match random.randrange(7):
            case 0 | 1:
                return random.choice(short)
            case 2:
                phrase = random.choice(
                    [random.choice(FILLERS), random.choice(short), _word(random.choice(others), random)]
                )
                return " ".join([phrase] * random.randint(2, _MOST_REPEATED))
            case 3:
                return " ".join(words[: len(words) // 2]) if len(words) >= 6 else None
            case 4:
                return f"{answer} {answer}"
            case _:
                return _word(random.choice([answer, random.choice(others)]), random) if len(words) > 2 else None

    return spoiled


def _word(text: str, random: Random) -> str:
    return f"{random.choice(text.split()).strip('.,?!').capitalize()}."
