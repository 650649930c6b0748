"""Splits an answer into words and sentences for the checkers.

A word is a run of letters and digits. Apostrophes, hyphens and marks inside numbers (3.5, 4:45, 1,000) do not split it.
A sentence ends at a line break, or at . ! ? (repeated marks or an ellipsis count once) and any closing quotes and
brackets, if followed by white space or the end. No sentence ends at:
- the full stop of a title or a common abbreviation (Dr., e.g., No. 5) or a single letter (J. Smith; "I" is a word),
- the full stop of etc., a.m., Inc. and the like, or an ellipsis, before a lower-case letter,
- a mark before a closing quote or bracket ("Stop!" he said) that is followed by a lower-case letter,
- a number with a full stop at the start of a line (1. Apples).
After any other full stop a lower-case letter starts a sentence, so that casual text is counted as intended.
"""

import re
import unicodedata
from collections.abc import Sequence

_WORD = re.compile(r"\d+(?:[.,:]\d+)+|[^\W_]+(?:['-][^\W_]+)*")
_END = re.compile(r"(?P<marks>[.!?\u2026]+)(?P<closers>[\"')\]*]*)(?=\s|$)")
_LIST_MARK = re.compile(r"\s*(?:[-*\u2022]|\(?\d{1,3}[.)])\s+")
_OPENERS = " \t\"'(["

# Never the last word of a sentence unless the text ends there; titles count only if capitalized.
_TITLES = frozenset(
    {"Dr", "Mr", "Mrs", "Ms", "Prof", "St", "Gen", "Col", "Capt", "Lt", "Sgt", "Rev", "Gov", "Sen", "Mt"}
)
_ABBREVIATIONS = frozenset({"vs", "e.g", "i.e", "eg", "ie", "cf", "approx", "fig", "vol"})
# Last words of a sentence if a capital, a digit or a quotation follows.
_OFTEN_LAST = frozenset(
    {"etc", "a.m", "p.m", "inc", "ltd", "corp", "jr", "sr", "u.s", "u.k", "u.s.a", "b.c", "a.d", "ph.d"}
)

_PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2010": "-", "\u2011": "-"})


def plain(text: str) -> str:
    """The text stripped, composed (NFC), and with straight quotes and plain hyphens."""
    return unicodedata.normalize("NFC", text).translate(_PLAIN).strip()


def words(text: str) -> list[str]:
    """The words in order, as written."""
    return _WORD.findall(plain(text))


def sentences(text: str) -> list[str]:
    """The sentences in order, including text after the last end mark; parts without words are skipped."""
    parts = [part for line in plain(text).splitlines() for part in _sentences_of(line)]
    return [part for part in parts if words(part)]


def is_ended(text: str) -> bool:
    """Whether the text ends with . ! ? or an ellipsis, ignoring closing quotes and brackets."""
    return bool(re.search(r"[.!?\u2026][\"')\]*]*$", plain(text)))


def position(tokens: Sequence[str], phrase: Sequence[str]) -> int | None:
    """The first index at which `phrase` occurs contiguously in `tokens`, or None."""
    assert phrase, "the phrase has a word"
    for start in range(len(tokens) - len(phrase) + 1):
        if list(tokens[start : start + len(phrase)]) == list(phrase):
            return start
    return None


def spoken(text: str) -> list[str]:
    """The words normalized for comparison: lower case, without a possessive 's."""
    return [word.casefold().removesuffix("'s") for word in words(text)]


def _sentences_of(line: str) -> list[str]:
    mark = _LIST_MARK.match(line)
    line = line[mark.end() :] if mark else line
    parts, start = [], 0
    for end in _END.finditer(line):
        if _closes(line, start, end):
            parts.append(line[start : end.end()].strip())
            start = end.end()
    return [*parts, line[start:].strip()]


def _closes(line: str, start: int, end: re.Match[str]) -> bool:
    rest = line[end.end() :].lstrip(_OPENERS)
    if not rest:
        return True
    goes_on = rest[0].islower()
    if goes_on and (end["closers"] or "..." in end["marks"] or "\u2026" in end["marks"]):
        return False
    if end["marks"] != ".":
        return True
    before = line[start : end.start()].split()
    last = before[-1].strip(_OPENERS) if before else ""
    is_initial = len(last) == 1 and last.isalpha() and last != "I"
    is_number = last.casefold() == "no" and rest[0].isdigit()
    if last in _TITLES or last.casefold() in _ABBREVIATIONS or is_initial or is_number:
        return False
    return not (goes_on and last.casefold() in _OFTEN_LAST)
