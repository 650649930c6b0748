"""Whether an answer keeps a constraint: pure functions of the answer's text and of the constraint's value.

All are strict: an answer without a word keeps nothing, and neither does one that is nothing but the words asked for.
Quotes and case of the words asked for do not count, since a constraint on capitals may hold besides.
"""

import re
import unicodedata

from llamachat.constraints.texts import is_ended, plain, position, sentences, spoken, words

_QUESTION_MARKS = "?\uff1f\u061f"
# After these a name is not confirmed but denied.
_DENIALS = frozenset(
    {
        "not", "no", "never", "neither", "nor", "without", "cannot", "isn't", "don't", "doesn't", "didn't",
        "can't", "won't", "wasn't", "aren't",
    }
)  # fmt: skip


def is_one_sentence(answer: str, _value: str = "") -> bool:
    """Exactly one sentence, and it is closed by . ! or ?; a greeting with its own mark ("Hello!") is a sentence."""
    return len(sentences(answer)) == 1 and is_ended(answer)


def has_several_sentences(answer: str, _value: str = "") -> bool:
    """Two sentences or more, the last one closed."""
    return len(sentences(answer)) > 1 and is_ended(answer)


def ends_with(answer: str, value: str) -> bool:
    """The last words are the value's, after at least one other; only punctuation may follow."""
    said, sought = spoken(answer), spoken(value)
    return len(said) > len(sought) and said[-len(sought) :] == sought


def begins_with(answer: str, value: str) -> bool:
    """The first words are the value's, and at least one other follows."""
    said, sought = spoken(answer), spoken(value)
    return len(said) > len(sought) and said[: len(sought)] == sought


def says(answer: str, value: str) -> bool:
    """The value's words stand somewhere in the answer, unbroken and as words of their own, among others."""
    said, sought = spoken(answer), spoken(value)
    return len(said) > len(sought) and position(said, sought) is not None


def has_at_most(answer: str, value: str) -> bool:
    """Whether the answer has at least one word and at most `value` words."""
    return 1 <= len(words(answer)) <= int(value)


def has_at_least(answer: str, value: str) -> bool:
    """Whether the answer has at least `value` words."""
    return len(words(answer)) >= int(value)


def is_without_letter(answer: str, value: str) -> bool:
    """The letter is in no word, small or capital, with an accent or without."""
    letters = unicodedata.normalize("NFKD", answer).casefold()
    return bool(words(answer)) and value.casefold() not in letters


def asks_nothing(answer: str, _value: str = "") -> bool:
    """No question mark, of whatever script."""
    return bool(words(answer)) and not any(mark in answer for mark in _QUESTION_MARKS)


def asks_at_the_end(answer: str, _value: str = "") -> bool:
    """The answer closes with a question mark, closing quotes aside."""
    return bool(words(answer)) and plain(answer).rstrip("\"')]*").endswith(tuple(_QUESTION_MARKS))


def is_in_capitals(answer: str, _value: str = "") -> bool:
    """Every letter that has a capital form is one; at least one is there."""
    return bool(words(answer)) and answer.isupper()


def is_in_small_letters(answer: str, _value: str = "") -> bool:
    """No letter is a capital; at least one small one is there."""
    return bool(words(answer)) and answer.islower()


def is_quoted(answer: str, _value: str = "") -> bool:
    """One pair of double quotes around the whole answer, and none inside."""
    text = plain(answer)
    return len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1] and bool(words(text))


def names(answer: str, value: str) -> bool:
    """The answer names the value, and nothing before it in the same clause denies it ("I do not play golf").

    Clauses end at commas, semicolons and sentences: "No, I am Galileo" names. Of `playing the piano` the instrument is
    enough. What follows the name is not read: "golf bores me" names golf.
    """
    sought = spoken(value.removeprefix("playing the "))
    for clause in (clause for sentence in sentences(answer) for clause in re.split(r"[,;]\s", sentence)):
        said = spoken(clause)
        place = position(said, sought)
        if place is not None and not _DENIALS.intersection(said[:place]):
            return True
    return False
