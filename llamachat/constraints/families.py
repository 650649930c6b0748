"""The families of constraints: wordings, values, checkers and recall questions.

Figures, hobbies and languages are the paper's (Llama 2, arXiv:2307.09288, section 3.3), with values from lists. The
checkable families are ours: only these can be evaluated without human annotators.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from llamachat.constraints import checkers
from llamachat.constraints.texts import words
from llamachat.constraints.values import BEGINNINGS, ENDINGS, LETTERS, LIMITS, NAMES
from llamachat.errors import ConfigError

Checker = Callable[[str, str], bool]  # (answer, value)
Recall = tuple[
    tuple[str, str], ...
]  # questions whose answer names the value, each with a plain answer (`{}` is the value)


@dataclass(frozen=True, slots=True)
class Family:
    """One kind of constraint. `{}` in a wording is the value; a family without values has the single value ""."""

    name: str
    long: tuple[str, ...]
    short: str
    checker: Checker | None = None
    values: tuple[str, ...] = ("",)
    recall: Recall = ()
    list_name: str = ""  # of the list with its values, if they are not defined here
    is_language_free: bool = False  # applies and can be checked in any language

    @property
    def has_values(self) -> bool:
        """Whether the family has values that can be held out of training."""
        return self.values != ("",)


@dataclass(frozen=True, slots=True)
class Constraint:
    """The content of an instruction: a family's value, with its two wordings."""

    family: str
    value: str
    long: str
    short: str
    checker: Checker | None
    recall: Recall


_OF_FIGURES = (
    ("Who are you?", "I am {}."),
    ("What is your name?", "My name is {}."),
    ("Tell me, who am I talking to?", "You are talking to {}."),
)
_OF_HOBBIES = (
    ("What is your favorite hobby?", "My favorite hobby is {}."),
    ("What do you enjoy most?", "I enjoy {}."),
    ("What do you like to do in your free time?", "I like {}."),
)
# Name, full wordings, short wording, checker and values.
_TABLE = (
    Family("figure", ("Always act as {} from now on.", "Act as {}.", "You are {}. Stay in this role."),
           "Figure: {}.", recall=_OF_FIGURES, list_name="figures", is_language_free=True),
    Family("hobby", ("You enjoy {}.", "Your favorite hobby is {}.", "You love {} more than anything else."),
           "Hobby: {}.", recall=_OF_HOBBIES, list_name="hobbies", is_language_free=True),
    Family("language", ("Always speak in {}.", "Speak in {} from now on.", "Answer everything in {}."),
           "Language: {}.", list_name="languages", is_language_free=True),
    Family("ends_with", ("Always end with {}.", "End every answer with {}.", "The last word of each reply must be {}."),
           "Last word: {}.", checkers.ends_with, ENDINGS, is_language_free=True),
    Family("begins_with",
           ("Always start with {}.", "Begin every answer with {}.", "The first word of each reply must be {}."),
           "First word: {}.", checkers.begins_with, BEGINNINGS, is_language_free=True),
    Family("calls_user",
           ("Always call me {}.", "In every answer address me as {}.", "My name in each reply must be {}."),
           "User: {}.", checkers.says, NAMES, is_language_free=True),
    Family("one_sentence", ("Always answer in one sentence.", "Use only one sentence in each reply."),
           "Length: one sentence.", checkers.is_one_sentence),
    Family("several_sentences",
           ("Always answer in two or more sentences.", "Use at least two sentences in each reply."),
           "Length: two sentences or more.", checkers.has_several_sentences),
    Family("at_least_words", ("Always answer in at least {} words.", "Never use fewer than {} words in a reply."),
           "Length: at least {} words.", checkers.has_at_least, LIMITS),
    Family("at_most_words", ("Always answer in at most {} words.", "Never use more than {} words in a reply."),
           "Length: at most {} words.", checkers.has_at_most, LIMITS),
    Family("without_letter", ('Never use the letter "{}".', 'Do not write the letter "{}" in your answers.'),
           'Without the letter "{}".', checkers.is_without_letter, LETTERS),
    Family("no_questions", ("Never ask me a question.", "Do not use question marks in your answers."),
           "Without questions.", checkers.asks_nothing),
    Family("asks_back", ("Always end with a question.", "Ask me a question at the end of every answer."),
           "Last sentence: a question.", checkers.asks_at_the_end),
    Family("capitals", ("Always answer in capital letters.", "Write every reply in capital letters only."),
           "Letters: capitals.", checkers.is_in_capitals),
    Family("small_letters", ("Always answer in small letters.", "Write every reply without capital letters."),
           "Letters: small.", checkers.is_in_small_letters),
    Family("quoted", ("Put every answer in quotation marks.", "Always write your reply in double quotes."),
           "In quotation marks.", checkers.is_quoted),
)  # fmt: skip
_CONTRARY = (
    {"ends_with", "asks_back"},
    {"one_sentence", "several_sentences"},
    {"several_sentences", "at_most_words"},
    {"at_least_words", "at_most_words"},
    {"no_questions", "asks_back"},
    {"capitals", "small_letters"},
)

_BY_NAME = {family.name: family for family in _TABLE}
LISTS: Mapping[str, str] = {family.name: family.list_name for family in _TABLE if family.list_name}
FAMILIES = tuple(_BY_NAME)
CHECKABLE = tuple(family.name for family in _TABLE if family.checker)


def families(names: Sequence[str] = FAMILIES, *, lists: Mapping[str, Sequence[str]] | None = None) -> dict[str, Family]:
    """The families with these names; those of the paper get the values of their lists.

    `lists` has the keys `figures`, `hobbies` and `languages`, read from files or generated by a policy.
    """
    return {name: _family(name, lists or {}) for name in names}


def _family(name: str, lists: Mapping[str, Sequence[str]]) -> Family:
    family = _BY_NAME.get(name)
    if family is None:
        raise ConfigError(
            f"There are no constraints of the name '{name}'. The names are: {', '.join(FAMILIES)}. Write one of them."
        )
    list_name = family.list_name
    if not list_name:
        return family
    if not lists.get(list_name):
        raise ConfigError(
            f"The constraints '{name}' have no list of {list_name}, but each of them is drawn from one. Give a file "
            f"with one entry a line, as data/gatt/{list_name}.txt is, or leave '{name}' out."
        )
    return replace(family, values=tuple(lists[list_name]))


def are_compatible(one: Constraint, other: Constraint) -> bool:
    """Whether one answer can satisfy both: other families, no contradiction, no forbidden letter in a required word."""
    return not (_forbids(one, other) or _forbids(other, one))


def _forbids(one: Constraint, other: Constraint) -> bool:
    if one.family == other.family or {one.family, other.family} in _CONTRARY:
        return True
    if one.family == "language":
        return not _BY_NAME[other.family].is_language_free
    if one.family == "without_letter":
        return bool(words(other.value)) and not checkers.is_without_letter(other.value, one.value)
    # The answer needs at least three more words.
    return one.family == "at_most_words" and len(words(other.value)) + 3 > int(one.value)
