"""Dialogs whose system text requests a form, and whose answers have that form.

Each constraint takes a real dialog and either converts every answer to the requested form, or rejects the dialog if an
answer does not already have it. Requests are phrased in several ways, so that no single sentence is memorised.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from tools.cutting.choosing import Dialog, chosen, dialog_of, pick, text_of, turns_of
from tools.cutting.cleaning import sentences, words


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """A request and how to fulfil it: `obeyed` returns the answer in that form, or None if impossible."""

    name: str
    instructions: tuple[str, ...]
    options: tuple[str, ...]
    obeyed: Callable[[str, str], str | None]


def _one_sentence(answer: str, _option: str) -> str | None:
    first = sentences(answer.split("\n")[0])[0]
    return first if 3 <= len(words(first)) <= 40 and first[-1] in ".!?" else None


def _ends_with(answer: str, ending: str) -> str | None:
    return f"{answer} {ending}" if answer[-1] in '.!?"' else None


def _begins_with(answer: str, beginning: str) -> str | None:
    return f"{beginning} {answer}"


def _in_capitals(answer: str, _option: str) -> str | None:
    return answer.upper()


def _in_small_letters(answer: str, _option: str) -> str | None:
    return answer.lower()


def _at_most_words(answer: str, limit: str) -> str | None:
    for text in (answer, _one_sentence(answer, "")):
        # At least half the limit, or the number would be meaningless.
        if text and int(limit) // 2 <= len(words(text)) <= int(limit):
            return text
    return None


def _without_letter(answer: str, letter: str) -> str | None:
    return answer if letter not in answer.lower() and len(answer) >= 25 else None


def _without_exclamation(answer: str, _option: str) -> str | None:
    return re.sub(r"!+", ".", answer) if "!" in answer else None


def _in_quotation_marks(answer: str, _option: str) -> str | None:
    return f'"{answer}"' if '"' not in answer else None


def _addressed(answer: str, name: str) -> str | None:
    lowered = answer if re.match(r"I\b|[A-Z][a-z]+ (?!I\b)[A-Z]|[A-Z]{2}", answer) else answer[0].lower() + answer[1:]
    return f"{name}, {lowered}"


CONSTRAINTS = (
    Constraint(
        name="one_sentence",
        instructions=(
            "Always answer in one sentence.",
            "Answer in a single sentence.",
            "Keep every answer to one sentence.",
            "Use only one sentence in each reply.",
        ),
        options=("",),
        obeyed=_one_sentence,
    ),
    Constraint(
        name="ends_with",
        instructions=(
            'Always end with "{}"',
            'End every answer with "{}"',
            'Finish each reply with the words "{}"',
            'The last words of your answers must be "{}"',
        ),
        options=(
            "Have a nice day!", "Thank you for asking.", "I hope this helps.", "Over and out.", "What do you think?",
            "Take care!", "That is all.", "Do you want to know more?", "Stay curious!", "Cheers!",
        ),
        obeyed=_ends_with,
    ),
    Constraint(
        name="begins_with",
        instructions=(
            'Begin every answer with "{}"',
            'Always start with "{}"',
            'Start each reply with the words "{}"',
            'The first words of your answers must be "{}"',
        ),
        options=(
            "Well, well.", "Good question!", "Let me think.", "Dear friend:", "Of course!", "Ahoy!", "Listen:",
            "To be honest:", "Aha!", "As you wish.",
        ),
        obeyed=_begins_with,
    ),
    Constraint(
        name="capitals",
        instructions=(
            "Answer in capital letters.",
            "Write every answer in capital letters only.",
            "Always use upper case.",
            "Reply in all caps.",
        ),
        options=("",),
        obeyed=_in_capitals,
    ),
    Constraint(
        name="small_letters",
        instructions=(
            "Answer in small letters only.",
            "Never use capital letters.",
            "Write every answer in lower case.",
            "Always reply in lowercase.",
        ),
        options=("",),
        obeyed=_in_small_letters,
    ),
    Constraint(
        name="at_most_words",
        instructions=(
            "Answer in at most {} words.",
            "Never use more than {} words.",
            "Keep every answer to {} words or fewer.",
            "Your answers must not be longer than {} words.",
        ),
        options=("5", "8", "10", "12", "15", "20"),
        obeyed=_at_most_words,
    ),
    Constraint(
        name="without_letter",
        instructions=(
            'Never use the letter "{}".',
            'Answer without the letter "{}".',
            'Do not write the letter "{}" in your answers.',
            'Avoid words with the letter "{}".',
        ),
        options=("b", "c", "f", "g", "k", "m", "p", "u", "v", "w", "y"),
        obeyed=_without_letter,
    ),
    Constraint(
        name="without_exclamation",
        instructions=(
            "Do not use exclamation marks.",
            "Never write an exclamation mark.",
            "Stay calm: no exclamation marks in your answers.",
        ),
        options=("",),
        obeyed=_without_exclamation,
    ),
    Constraint(
        name="quotation_marks",
        instructions=(
            "Put every answer in quotation marks.",
            "Write your answers between quotation marks.",
            "Always wrap your reply in double quotes.",
        ),
        options=("",),
        obeyed=_in_quotation_marks,
    ),
    Constraint(
        name="addressed",
        instructions=(
            "Address the user as {} in every answer.",
            "The user is called {}. Begin each answer with this name.",
            "Call the user {} at the start of every reply.",
        ),
        options=("Anna", "Captain", "Ben", "Maria", "Professor", "Sam", "Your Majesty", "Tom", "Doctor", "Lily"),
        obeyed=_addressed,
    ),
)  # fmt: skip


def constrained(dialog: Dialog, constraint: Constraint) -> Dialog | None:
    """The dialog under the constraint, or None if an answer cannot obey it."""
    key = text_of(dialog) + constraint.name
    options = chosen(constraint.options, len(constraint.options), key=lambda option: option + key, salt="option")
    turns = turns_of(dialog)
    for option in options:
        obeyed = [constraint.obeyed(turn, option) for turn in turns[1::2]]
        if all(obeyed):
            new = [turn if index % 2 == 0 else str(obeyed[index // 2]) for index, turn in enumerate(turns)]
            return dialog_of(new, system=pick(constraint.instructions, key, salt="asked").format(option))
    return None


def constrained_dialogs(pool: list[Dialog], count: int) -> list[Dialog]:
    """`count` dialogs, evenly divided among constraints, each from a different dialog of the pool while it lasts."""
    rest = chosen(pool, len(pool), key=text_of, salt="constrained")
    dialogs: list[Dialog] = []
    for number, constraint in enumerate(CONSTRAINTS, start=1):
        unused = []
        for dialog in rest:
            wanted = len(dialogs) < count * number // len(CONSTRAINTS)
            rewritten = constrained(dialog, constraint) if wanted else None
            if rewritten:
                dialogs.append(rewritten)
            else:
                unused.append(dialog)
        rest = unused
    return dialogs
