"""IFEval's rules: hand-made answers for every kind of instruction, and lm-evaluation-harness where it is installed."""

from typing import Any

import pytest

from evaluation.benchmark.ifeval import RULES, follows, follows_loosely
from evaluation.benchmark.sets import SETS

AT_LEAST, LESS = "at least", "less than"
# Kind, its arguments, an answer that follows it, and one that does not.
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("change_case:capital_word_frequency", {"capital_relation": AT_LEAST, "capital_frequency": 3}, "I SAY no; I go.", "I SAY no."),
    ("change_case:capital_word_frequency", {"capital_relation": LESS, "capital_frequency": 2}, "WELL-KNOWN words", "I'm HERE"),
    ("change_case:english_capital", {}, "HELLO, YOU 2!", "HELLO, you"),
    ("change_case:english_lowercase", {}, "hello, you 2!", "Hello, you"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi. "}, " say hi. Hi!", "Hi! Say hi."),
    ("combination:two_responses", {}, "one\n******\ntwo", "one ****** one"),
    ("combination:two_responses", {}, "******one******two", "one ****** ****** two"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] at [place]", "[name at] place]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. Write!", "Bye. PS Write!"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye. P. P.S more", "P.S. more"),
    ("detectable_format:constrained_response", {}, "So: My answer is maybe.", "My answer is no"),
    ("detectable_format:json_format", {}, '```json\n{"a": [1, 2]}\n```', '{"a": 1'),
    ("detectable_format:multiple_sections", {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\na\nSECTION 2", "SECTION 1 Section 2"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "So:\n* a\n - b", "* a\n* b\n* c"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "* a\n** b", "** a"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b c*", "*a* b and ** **"),
    ("detectable_format:title", {}, "<<Ode>>\nO!", "<< >>\nO!"),
    ("keywords:existence", {"keywords": ["mom", "son"]}, "A Mom and her person", "A mom"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "rocks and rocky", "It is Rock."),
    ("keywords:frequency", {"keyword": "war", "relation": AT_LEAST, "frequency": 2}, "War and warfare", "one war"),
    ("keywords:frequency", {"keyword": "war", "relation": LESS, "frequency": 2}, "one war", "War and warfare"),
    ("keywords:letter_frequency", {"letter": "t", "let_relation": LESS, "let_frequency": 2}, "The end", "That"),
    ("keywords:letter_frequency", {"letter": "#", "let_relation": AT_LEAST, "let_frequency": 2}, "# a #", "# a"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "weekend"},
        "One.\n\n\"Weekend's\" fun.",
        "One.\n\nThe weekend.",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "Hi"},
        "hi, you",
        "hi, you\n\nhi",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\none\n***\ntwo", "one *** *** two"),
    ("length_constraints:number_sentences", {"relation": LESS, "num_sentences": 3}, "Dr. May came. She\nleft!", "One. Two? Three."),
    ("length_constraints:number_sentences", {"relation": AT_LEAST, "num_sentences": 2}, "One. Two", "One\nTwo\n3.5"),
    ("length_constraints:number_words", {"relation": AT_LEAST, "num_words": 4}, "It's well-known", "three words here"),
    ("length_constraints:number_words", {"relation": LESS, "num_words": 4}, "three words here", "It's well-known"),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
    ("startend:end_checker", {"end_phrase": "Any other questions?"}, '"Yes. any other QUESTIONS?"', "Any other questions? No."),
    ("startend:quotation", {}, ' "all of it" ', '"some" of it'),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "arguments", "good", "bad"), CASES, ids=[case[0] for case in CASES])
def test_an_answer_follows_its_instruction_or_not(kind: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    assert follows(kind, arguments, good)
    assert not follows(kind, arguments, bad)
    assert not follows(kind, arguments, " \n")


def test_every_kind_of_the_set_has_a_rule_and_a_case_but_the_one_on_languages() -> None:
    questions, num_left_out = SETS["ifeval"].questions(None)
    kinds = {part["kind"] for question in questions for part in question.measured["instructions"]}
    assert kinds == RULES.keys() == {case[0] for case in CASES}
    assert len(kinds) == 24
    assert (len(questions), num_left_out) == (509, 31)


@pytest.mark.parametrize("answer", ["Sure!\n{}", "[1]\nBye.", "Sure!\n{}\nBye.", "*[1]*", "Sure!\n**{}**\nBye.", "{}"])
def test_loosely_the_first_line_the_last_and_asterisks_do_not_count(answer: str) -> None:
    assert follows_loosely("detectable_format:json_format", {}, answer)
    assert follows("detectable_format:json_format", {}, answer) == (answer == "{}")


def test_loosely_no_other_line_is_forgiven() -> None:
    assert not follows_loosely("detectable_format:json_format", {}, "Well.\nSure!\n{}")


CANNED = [
    "Here is the summary. It has three sentences, and a comma. Is that fine?",
    "THIS IS ALL IN CAPITALS. NOBODY IS HERE",
    "everything is small here and there is no other mark",
    '"My answer is yes. I would say: **this** is *it*, with [name] and [place]."',
    "<<A Title>>\n\n* one\n* two\n* three\n\nP.S. Write soon!\nP.P.S Do.",
    "SECTION 1\nA story of war and peace.\n***\nSECTION 2\nThe end. Is there anything else I can help with?",
    '```json\n{"keyword": ["mom", "mother"]}\n```',
    "One answer.\n******\nAnother answer, which I'M sure is BETTER.",
    "First paragraph.\n\nSecond paragraph.\n\nThird!\n\nFourth?",
]


def test_the_verdicts_are_those_of_lm_evaluation_harness() -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    try:
        from lm_eval.tasks.ifeval import utils  # pyright: ignore[reportMissingImports]
    except Exception as error:  # its word lists are downloaded
        pytest.skip(f"lm-evaluation-harness's IFEval needs nltk's data and langdetect: {error}")
    rules = (
        (utils.test_instruction_following_strict, follows),
        (utils.test_instruction_following_loose, follows_loosely),
    )
    for question in SETS["ifeval"].questions(None)[0]:
        parts = [
            part
            for part in question.measured["instructions"]
            if not part["kind"].startswith("change_case:english")  # those detect the language, too
            and part["arguments"].get("letter", "a").isalpha()
        ]
        example = utils.InputExample(
            0, [part["kind"] for part in parts], question.text, [part["arguments"] for part in parts]
        )
        for answer in [*CANNED, f"{question.text}\n{CANNED[0]}"]:
            for theirs, ours in rules:
                due = [ours(part["kind"], part["arguments"], answer) for part in parts]
                assert theirs(example, answer).follow_instruction_list == due, (question.id, answer)
