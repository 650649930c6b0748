"""The kinds of constraints there are: how each is asked for, its values, its checker, and how it is recalled.

Figures, hobbies and languages are the paper's (Llama 2, arXiv:2307.09288, section 3.3), with values from lists. The
checkable families are ours: only what can be checked can be measured without people.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from llamachat.constraints import checkers
from llamachat.constraints.texts import words
from llamachat.constraints.values import BEGINNINGS, ENDINGS, LETTERS, LIMITS, NAMES
from llamachat.errors import ConfigError

Checker = Callable[[str, str], bool]  # (answer, value)


@dataclass(frozen=True, slots=True)
class Recall:
    """Questions whose answer names the value, each with a plain answer (`{}` is the value), and what judges answers."""

    answers: tuple[tuple[str, str], ...]
    is_named: Checker


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of constraint. `{}` in a wording is the value; a family without values has the one value ""."""

    name: str
    long: tuple[str, ...]
    short: str
    values: tuple[str, ...] = ("",)
    checker: Checker | None = None
    recall: Recall | None = None
    is_language_free: bool = False  # holds, and can be checked, whatever language the answer is in
    excludes: frozenset[str] = frozenset()  # families that ask for the contrary

    @property
    def has_values(self) -> bool:
        """Whether values can be held out of training."""
        return self.values != ("",)


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an instruction asks for: a family's value, and its two wordings."""

    family: str
    value: str
    long: str
    short: str
    checker: Checker | None
    recall: Recall | None


_CHECKABLE = (
    Family(
        name="ends_with",
        long=("Always end with {}.", "End every answer with {}.", "The last word of each reply must be {}."),
        short="Last word: {}.",
        values=ENDINGS,
        checker=checkers.ends_with,
        excludes=frozenset({"asks_back"}),
        is_language_free=True,
    ),
    Family(
        name="begins_with",
        long=("Always start with {}.", "Begin every answer with {}.", "The first word of each reply must be {}."),
        short="First word: {}.",
        values=BEGINNINGS,
        checker=checkers.begins_with,
        is_language_free=True,
    ),
    Family(
        name="calls_user",
        long=("Always call me {}.", "In every answer address me as {}.", "My name in each reply must be {}."),
        short="User: {}.",
        values=NAMES,
        checker=checkers.says,
        is_language_free=True,
    ),
    Family(
        name="one_sentence",
        long=("Always answer in one sentence.", "Use only one sentence in each reply."),
        short="Length: one sentence.",
        checker=checkers.is_one_sentence,
        excludes=frozenset({"several_sentences"}),
    ),
    Family(
        name="several_sentences",
        long=("Always answer in two or more sentences.", "Use at least two sentences in each reply."),
        short="Length: two sentences or more.",
        checker=checkers.has_several_sentences,
        excludes=frozenset({"one_sentence", "at_most_words"}),
    ),
    Family(
        name="at_least_words",
        long=("Always answer in at least {} words.", "Never use fewer than {} words in a reply."),
        short="Length: at least {} words.",
        values=LIMITS,
        checker=checkers.has_at_least,
        excludes=frozenset({"at_most_words"}),
    ),
    Family(
        name="at_most_words",
        long=("Always answer in at most {} words.", "Never use more than {} words in a reply."),
        short="Length: at most {} words.",
        values=LIMITS,
        checker=checkers.has_at_most,
        excludes=frozenset({"at_least_words", "several_sentences"}),
    ),
    Family(
        name="without_letter",
        long=('Never use the letter "{}".', 'Do not write the letter "{}" in your answers.'),
        short='Without the letter "{}".',
        values=LETTERS,
        checker=checkers.is_without_letter,
    ),
    Family(
        name="no_questions",
        long=("Never ask me a question.", "Do not use question marks in your answers."),
        short="Without questions.",
        checker=checkers.asks_nothing,
        excludes=frozenset({"asks_back"}),
    ),
    Family(
        name="asks_back",
        long=("Always end with a question.", "Ask me a question at the end of every answer."),
        short="Last sentence: a question.",
        checker=checkers.asks_at_the_end,
        excludes=frozenset({"no_questions", "ends_with"}),
    ),
    Family(
        name="capitals",
        long=("Always answer in capital letters.", "Write every reply in capital letters only."),
        short="Letters: capitals.",
        checker=checkers.is_in_capitals,
        excludes=frozenset({"small_letters"}),
    ),
    Family(
        name="small_letters",
        long=("Always answer in small letters.", "Write every reply without capital letters."),
        short="Letters: small.",
        checker=checkers.is_in_small_letters,
        excludes=frozenset({"capitals"}),
    ),
    Family(
        name="quoted",
        long=("Put every answer in quotation marks.", "Always write your reply in double quotes."),
        short="In quotation marks.",
        checker=checkers.is_quoted,
    ),
)

_FIGURE = Family(
    name="figure",
    long=("Always act as {} from now on.", "Act as {}.", "You are {}. Stay in this role."),
    short="Figure: {}.",
    recall=Recall(
        (
            ("Who are you?", "I am {}."),
            ("What is your name?", "My name is {}."),
            ("Tell me, who am I talking to?", "You are talking to {}."),
        ),
        checkers.names,
    ),
    is_language_free=True,
)
_HOBBY = Family(
    name="hobby",
    long=("You enjoy {}.", "Your favorite hobby is {}.", "You love {} more than anything else."),
    short="Hobby: {}.",
    recall=Recall(
        (
            ("What is your favorite hobby?", "My favorite hobby is {}."),
            ("What do you enjoy most?", "I enjoy {}."),
            ("What do you like to do in your free time?", "I like {}."),
        ),
        checkers.names,
    ),
    is_language_free=True,
)
_LANGUAGE = Family(
    name="language",
    long=("Always speak in {}.", "Speak in {} from now on.", "Answer everything in {}."),
    short="Language: {}.",
    is_language_free=True,
)

_BY_NAME = {family.name: family for family in (_FIGURE, _HOBBY, _LANGUAGE, *_CHECKABLE)}
LISTED: Mapping[str, Family] = {"figures": _FIGURE, "hobbies": _HOBBY, "languages": _LANGUAGE}  # by name of their list
FAMILIES = tuple(_BY_NAME)
CHECKABLE = tuple(family.name for family in _CHECKABLE)


def families(names: Sequence[str] = FAMILIES, *, lists: Mapping[str, Sequence[str]] | None = None) -> dict[str, Family]:
    """The families of these names, those of the paper with the values of their lists.

    `lists` holds entries by `figures`, `hobbies` and `languages`: read from files, or written by a policy.
    """
    return {name: _family(name, lists or {}) for name in names}


def _family(name: str, lists: Mapping[str, Sequence[str]]) -> Family:
    for family in _CHECKABLE:
        if family.name == name:
            return family
    for list_name, family in LISTED.items():
        if family.name == name:
            if not lists.get(list_name):
                raise ConfigError(
                    f"The constraints '{name}' have no list of {list_name}, but each of them is drawn from one. Give a file "
                    f"with one entry a line, as data/gatt/{list_name}.txt is, or leave '{name}' out."
                )
            return replace(family, values=tuple(lists[list_name]))
    raise ConfigError(
        f"There are no constraints of the name '{name}'. The names are: {', '.join(FAMILIES)}. Write one of them."
    )


def are_compatible(one: Constraint, other: Constraint) -> bool:
    """Whether one answer can keep both: no two of a family, no contrary ones, no forbidden letter in an asked word."""
    return not (_forbids(one, other) or _forbids(other, one))


def _forbids(one: Constraint, other: Constraint) -> bool:
    mine, others = _BY_NAME[one.family], _BY_NAME[other.family]
    if one.family == other.family or other.family in mine.excludes:
        return True
    if one.family == "language":
        return not others.is_language_free
    if one.family == "without_letter":
        return bool(words(other.value)) and not checkers.is_without_letter(other.value, one.value)
    # Three words at least must be left for an answer.
    return one.family == "at_most_words" and len(words(other.value)) + 3 > int(one.value)
