"""Check whether an answer follows an instruction of IFEval (Zhou et al. 2023, arXiv:2311.07911), with a rule per kind.

The rules agree with the authors' code (google-research, instruction_following_eval), also used by
lm-evaluation-harness, including odd cases. Four differ, since nltk and langdetect are not used:
- language:response_language has no rule, so prompts with it are left out;
- English in upper or lower case is only checked for case, not for being English;
- sentences are split by `llamachat.constraints.texts`, ignoring line breaks, which do not end sentences in nltk either;
- capitalised words are split at white space and punctuation, contractions in two, as by nltk's word_tokenize.
A "letter" that is not a letter ("#", "!") is counted as it is; the authors' code replaces it with a random letter.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from llamachat.constraints.texts import sentences

Arguments = Mapping[str, Any]
Rule = Callable[[str, Arguments], bool]

_CONSTRAINED_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_CONTRACTION = re.compile(r"(?i)(?<=\w)(?=(?:n't|'(?:s|m|d|ll|re|ve))(?!\w))|(?<=\bcan)(?=not\b)")
_BETWEEN_WORDS = re.compile(r"[\s()\[\]{}<>,;:@#$%&?!*\"`]+|--+|\.\.+")
_FIRST_WORD = re.compile(r"'*\"*(?P<word>[^.,?!'\"\s]*)")
_CODE_FENCE = re.compile(r"^(?:```(?:json|Json|JSON)?)?(?P<body>.*?)(?:```)?$", re.DOTALL)
_POSTSCRIPTS: Mapping[str, str] = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}


def follows(kind: str, arguments: Arguments, answer: str) -> bool:
    """Whether the unmodified answer follows the instruction; an empty answer never does."""
    return bool(answer.strip()) and RULES[kind](answer, arguments)


def follows_loosely(kind: str, arguments: Arguments, answer: str) -> bool:
    """Whether the answer follows it as is or without its first line, its last line, both, or asterisks."""
    lines = answer.split("\n")
    parts = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return any(follows(kind, arguments, text) for part in parts for text in (part, part.replace("*", "")))


def _relates(count: int, relation: str, threshold: int) -> bool:
    """Compare with one of IFEval's two relations."""
    return count < threshold if relation == "less than" else count >= threshold


def _has_keywords(answer: str, arguments: Arguments) -> bool:
    return all(re.search(re.escape(word), answer, re.IGNORECASE) for word in arguments["keywords"])


def _has_keyword_often(answer: str, arguments: Arguments) -> bool:
    count = len(re.findall(re.escape(arguments["keyword"].strip()), answer, re.IGNORECASE))
    return _relates(count, arguments["relation"], arguments["frequency"])


def _has_no_forbidden_word(answer: str, arguments: Arguments) -> bool:
    words = arguments["forbidden_words"]
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in words)


def _has_letter_often(answer: str, arguments: Arguments) -> bool:
    count = answer.lower().count(arguments["letter"].lower())
    return _relates(count, arguments["let_relation"], arguments["let_frequency"])


def _has_sentences(answer: str, arguments: Arguments) -> bool:
    count = len(sentences(" ".join(answer.split())))
    return _relates(count, arguments["relation"], arguments["num_sentences"])


def _has_words(answer: str, arguments: Arguments) -> bool:
    return _relates(len(re.findall(r"\w+", answer)), arguments["relation"], arguments["num_words"])


def _has_paragraphs(answer: str, arguments: Arguments) -> bool:
    """Paragraphs are separated by ***; only the first and last may be empty."""
    parts = re.split(r"\s?\*\*\*\s?", answer)
    if not all(part.strip() for part in parts[1:-1]):
        return False
    return sum(bool(part.strip()) for part in parts) == arguments["num_paragraphs"]


def _begins_nth_paragraph(answer: str, arguments: Arguments) -> bool:
    """Paragraphs are separated by two line breaks; checks the first word of one, without punctuation."""
    parts, number = answer.split("\n\n"), arguments["nth_paragraph"]
    count = sum(bool(part.strip()) for part in parts)
    if count != arguments["num_paragraphs"] or number > count or not parts[number - 1].strip():
        return False
    first = _FIRST_WORD.match(parts[number - 1].split()[0])
    return first is not None and first["word"].lower() == arguments["first_word"].lower()


def _has_placeholders(answer: str, arguments: Arguments) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= arguments["num_placeholders"]


def _has_postscript(answer: str, arguments: Arguments) -> bool:
    marker: str = arguments["postscript_marker"].strip()
    return bool(re.search(_POSTSCRIPTS.get(marker, re.escape(marker.lower())), answer.lower()))


def _has_bullets(answer: str, arguments: Arguments) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", answer, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", answer, re.MULTILINE)
    return len(stars) + len(dashes) == arguments["num_bullets"]


def _is_constrained(answer: str, _: Arguments) -> bool:
    return any(allowed in answer for allowed in _CONSTRAINED_ANSWERS)


def _has_highlights(answer: str, arguments: Arguments) -> bool:
    """Count *text* and **text**; as in the authors' code, text in double asterisks may count as both."""
    single = [part.strip("*") for part in re.findall(r"\*[^\n\*]*\*", answer)]
    double = [part[2:-2] for part in re.findall(r"\*\*[^\n\*]*\*\*", answer)]
    return sum(bool(part.strip()) for part in single + double) >= arguments["num_highlights"]


def _has_sections(answer: str, arguments: Arguments) -> bool:
    headings = re.findall(rf"{re.escape(arguments['section_spliter'].strip())}\s?\d+", answer)
    return len(headings) >= arguments["num_sections"]


def _is_json(answer: str, _: Arguments) -> bool:
    body = _CODE_FENCE.match(answer.strip())
    try:
        json.loads(body["body"] if body else answer)
    except (ValueError, RecursionError):
        return False
    return True


def _has_title(answer: str, _: Arguments) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", answer))


def _has_two_answers(answer: str, _: Arguments) -> bool:
    """Two different answers, separated by ******; only the first and last part may be empty."""
    parts = [part.strip() for part in answer.split("******")]
    answers = [part for part in parts if part]
    return all(parts[1:-1]) and len(answers) == 2 and answers[0] != answers[1]


def _repeats_prompt(answer: str, arguments: Arguments) -> bool:
    return answer.strip().lower().startswith(arguments["prompt_to_repeat"].strip().lower())


def _ends_with(answer: str, arguments: Arguments) -> bool:
    return answer.strip().strip('"').lower().endswith(arguments["end_phrase"].strip().lower())


def _is_in_capitals(answer: str, _: Arguments) -> bool:
    return answer.isupper()


def _is_in_small_letters(answer: str, _: Arguments) -> bool:
    return answer.islower()


def _has_capital_words(answer: str, arguments: Arguments) -> bool:
    words = _BETWEEN_WORDS.split(_CONTRACTION.sub(" ", answer))
    count = sum(word.isupper() for word in words)
    return _relates(count, arguments["capital_relation"], arguments["capital_frequency"])


def _has_no_comma(answer: str, _: Arguments) -> bool:
    return "," not in answer


def _is_quoted(answer: str, _: Arguments) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


RULES: Mapping[str, Rule] = {
    "change_case:capital_word_frequency": _has_capital_words,
    "change_case:english_capital": _is_in_capitals,
    "change_case:english_lowercase": _is_in_small_letters,
    "combination:repeat_prompt": _repeats_prompt,
    "combination:two_responses": _has_two_answers,
    "detectable_content:number_placeholders": _has_placeholders,
    "detectable_content:postscript": _has_postscript,
    "detectable_format:constrained_response": _is_constrained,
    "detectable_format:json_format": _is_json,
    "detectable_format:multiple_sections": _has_sections,
    "detectable_format:number_bullet_lists": _has_bullets,
    "detectable_format:number_highlighted_sections": _has_highlights,
    "detectable_format:title": _has_title,
    "keywords:existence": _has_keywords,
    "keywords:forbidden_words": _has_no_forbidden_word,
    "keywords:frequency": _has_keyword_often,
    "keywords:letter_frequency": _has_letter_often,
    "length_constraints:nth_paragraph_first_word": _begins_nth_paragraph,
    "length_constraints:number_paragraphs": _has_paragraphs,
    "length_constraints:number_sentences": _has_sentences,
    "length_constraints:number_words": _has_words,
    "punctuation:no_comma": _has_no_comma,
    "startend:end_checker": _ends_with,
    "startend:quotation": _is_quoted,
}
