"""Checks whether an answer satisfies a constraint: pure functions of the answer's text and the constraint's value.

All are strict: an answer without words satisfies nothing, nor does one that consists only of the required words.
Quotes and case of the required words are ignored, since another constraint may require capitals.
"""

import re
import unicodedata

from llamachat.constraints.texts import is_ended, plain, position, sentences, spoken, words

_QUESTION_MARKS = "?\uff1f\u061f"
# After these words a name is denied, not confirmed.
_DENIALS = frozenset(
    {
        "not", "no", "never", "neither", "nor", "without", "cannot", "isn't", "don't", "doesn't", "didn't",
        "can't", "won't", "wasn't", "aren't",
    }
)  # fmt: skip


def is_one_sentence(answer: str, _value: str = "") -> bool:
    """Exactly one sentence, closed by . ! or ?; a greeting with its own mark ("Hello!") counts as a sentence."""
    return len(sentences(answer)) == 1 and is_ended(answer)


def has_several_sentences(answer: str, _value: str = "") -> bool:
    """At least two sentences, the last one closed."""
    return len(sentences(answer)) > 1 and is_ended(answer)


def ends_with(answer: str, value: str) -> bool:
    """The answer ends with the value's words, after at least one other word; only punctuation may follow."""
    answer_words, value_words = spoken(answer), spoken(value)
    return len(answer_words) > len(value_words) and answer_words[-len(value_words) :] == value_words


def begins_with(answer: str, value: str) -> bool:
    """The answer begins with the value's words, followed by at least one other word."""
    answer_words, value_words = spoken(answer), spoken(value)
    return len(answer_words) > len(value_words) and answer_words[: len(value_words)] == value_words


def says(answer: str, value: str) -> bool:
    """The answer contains the value's words as a contiguous sequence of whole words, among others."""
    answer_words, value_words = spoken(answer), spoken(value)
    return len(answer_words) > len(value_words) and position(answer_words, value_words) is not None


def has_at_most(answer: str, value: str) -> bool:
    """Whether the answer has at least one word and at most `value` words."""
    return 1 <= len(words(answer)) <= int(value)


def has_at_least(answer: str, value: str) -> bool:
    """Whether the answer has at least `value` words."""
    return len(words(answer)) >= int(value)


def is_without_letter(answer: str, value: str) -> bool:
    """No word contains the letter, whatever its case or accent."""
    letters = unicodedata.normalize("NFKD", answer).casefold()
    return bool(words(answer)) and value.casefold() not in letters


def asks_nothing(answer: str, _value: str = "") -> bool:
    """No question mark of any script."""
    return bool(words(answer)) and not any(mark in answer for mark in _QUESTION_MARKS)


def asks_at_the_end(answer: str, _value: str = "") -> bool:
    """The answer ends with a question mark, ignoring closing quotes."""
    return bool(words(answer)) and plain(answer).rstrip("\"')]*").endswith(tuple(_QUESTION_MARKS))


def is_in_capitals(answer: str, _value: str = "") -> bool:
    """Every letter that has an upper case is upper case, and there is at least one."""
    return bool(words(answer)) and answer.isupper()


def is_in_small_letters(answer: str, _value: str = "") -> bool:
    """No letter is upper case, and at least one is lower case."""
    return bool(words(answer)) and answer.islower()


def is_quoted(answer: str, _value: str = "") -> bool:
    """One pair of double quotes encloses the whole answer, with none inside."""
    text = plain(answer)
    return len(text) > 2 and text[0] == text[-1] == '"' and '"' not in text[1:-1] and bool(words(text))


def names(answer: str, value: str) -> bool:
    """The answer names the value, and nothing before it in the same clause denies it ("I do not play golf").

    Clauses end at commas, semicolons and sentence ends: "No, I am Galileo" counts. For `playing the piano`, the
    instrument suffices. What follows the name is ignored: "golf bores me" counts.
    """
    value_words = spoken(value.removeprefix("playing the "))
    for clause in (clause for sentence in sentences(answer) for clause in re.split(r"[,;]\s", sentence)):
        clause_words = spoken(clause)
        place = position(clause_words, value_words)
        if place is not None and not _DENIALS.intersection(clause_words[:place]):
            return True
    return False
