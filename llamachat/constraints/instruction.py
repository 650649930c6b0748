"""Instructions that apply to a whole dialog: one to three compatible random constraints (section 3.3), and answers
repaired to satisfy them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log1p

from llamachat.constraints.checkers import names
from llamachat.constraints.families import Constraint, Family, are_compatible
from llamachat.constraints.texts import sentences, words
from llamachat.constraints.values import Side, side_of
from llamachat.data.loading import fraction
from llamachat.errors import ConfigError

# First words that keep their capital: "I", names and abbreviations.
_KEEPS_CAPITAL = re.compile(r"I\b|[A-Z][a-z]+ (?!I\b)[A-Z]|[A-Z]{2}")


@dataclass(frozen=True, slots=True)
class Instruction:
    """Constraints and the text that states them."""

    constraints: tuple[Constraint, ...]
    text: str
    is_shortened: bool

    @property
    def checkable(self) -> tuple[Constraint, ...]:
        """The constraints that have a checker."""
        return tuple(constraint for constraint in self.constraints if constraint.checker)


def draw_instruction(
    *,
    seed: int | str,
    index: int,
    side: Side,
    families: Mapping[str, Family],
    most: int = 3,
    weights: Mapping[str, float] | None = None,
) -> Instruction:
    """Draw instruction number `index`; the result depends only on `index`, seed, side and families.

    It has one to `most` constraints, each count equally likely if the families allow it, and is shortened half of the
    time (Llama 2 section 3.3). Values come from one side; a family without values is on both. A family of weight 2 is
    drawn first twice as often as one of weight 1, the default.
    """
    shares = {name: (weights or {}).get(name, 1.0) for name in families}
    assert families and most >= 1 and min(shares.values()) > 0, "the recipe is checked before"
    key = f"{seed} {index} {side}"
    sides = {name: values_of(family, side) for name, family in families.items()}
    count = 1 + _place(most, f"{key} number")
    chosen: list[Constraint] = []
    # Competing exponential clocks whose rates are the weights.
    clocks = {name: -log1p(-fraction(f"{key} {name}", salt="family")) / share for name, share in shares.items()}
    for name in sorted(clocks, key=clocks.__getitem__):
        # An incompatible value is replaced by another one of its family.
        for value in _in_random_order(sides[name], f"{key} {name}"):
            constraint = constrain(families[name], value, key=key)
            if all(are_compatible(constraint, other) for other in chosen):
                chosen.append(constraint)
                break
        if len(chosen) == count:
            break
    is_shortened = fraction(key, salt="shortened") < 0.5
    parts = [constraint.short if is_shortened else constraint.long for constraint in chosen]
    return Instruction(tuple(chosen), " ".join(parts), is_shortened)


def constrain(family: Family, value: str, *, key: str = "") -> Constraint:
    """The family's constraint with this value; `key` selects one of its wordings."""
    long = family.long[_place(len(family.long), f"{key} {family.name} wording")]
    return Constraint(family.name, value, long.format(value), family.short.format(value), family.checker, family.recall)


def values_of(family: Family, side: Side) -> tuple[str, ...]:
    """The family's values on this side; ("",) if it has none."""
    if not family.has_values:
        return family.values
    values = tuple(value for value in family.values if side_of(family.name, value) == side)
    if not values:
        use = "train with" if side == "train" else "measure with"
        raise ConfigError(
            f"The constraints '{family.name}' have {len(family.values)} values, none of them to {use}: a hash of each value "
            "decides what is trained on and what is held out, a quarter. Give a longer list."
        )
    return values


def passes(instruction: Instruction, answer: str) -> bool:
    """Whether the answer satisfies every checkable constraint; an answer without words satisfies none."""
    return bool(words(answer)) and all(is_kept(constraint, answer) for constraint in instruction.checkable)


def is_kept(constraint: Constraint, answer: str) -> bool:
    """Whether the answer satisfies this constraint, which must have a checker."""
    assert constraint.checker, "the caller asks for checkable constraints"
    return constraint.checker(answer, constraint.value)


def recall_questions(constraint: Constraint) -> tuple[str, ...]:
    """Questions that test whether the constraint is remembered; none if every answer is checked for it."""
    return tuple(question for question, _ in constraint.recall)


def recalled(constraint: Constraint, answer: str) -> bool:
    """Whether the answer to a recall question names the constraint's value."""
    assert constraint.recall, "the caller asks for constraints with recall questions"
    return names(answer, constraint.value)


def repaired(instruction: Instruction, answer: str) -> str | None:
    """Repair the answer to satisfy the instruction; None if changing words, case and quotes does not suffice. Ours.

    The paper samples answers from a policy that follows instructions. With 5 M parameters, only one sample in a hundred
    contains a word because of the instruction. A repaired answer is checked like any sample and counted separately.
    """
    text = answer.strip()
    values = {constraint.family: constraint.value for constraint in instruction.checkable}
    if not text:
        return None
    if "one_sentence" in values:
        text = (sentences(text) or [text])[0]
    if "ends_with" in values:
        # A question remains a question.
        text = f"{text.rstrip(' .!?')}, {values['ends_with']}{'?' if text.endswith('?') else '.'}"
    first = [values[family] for family in ("begins_with", "calls_user") if family in values]
    if first:
        text = ", ".join([*first, text if _KEEPS_CAPITAL.match(text) else text[0].lower() + text[1:]])
    if "capitals" in values:
        text = text.upper()
    if "small_letters" in values:
        text = text.lower()
    if "quoted" in values:
        text = '"' + text.replace('"', "'") + '"'
    return text if passes(instruction, text) else None


def plain_recall(constraint: Constraint, question: str) -> str:
    """The plain answer to a recall question of the constraint: "I am Galileo Galilei."."""
    assert constraint.recall, "the caller asks for constraints with recall questions"
    return dict(constraint.recall)[question].format(constraint.value)


def _place(count: int, key: str) -> int:
    return int(fraction(key, salt="instruction") * count)


def _in_random_order(values: Sequence[str], key: str) -> list[str]:
    return sorted(values, key=lambda value: fraction(f"{key} {value}", salt="value"))
