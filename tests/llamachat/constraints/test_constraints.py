"""Constraints: tables of answers judged by hand, properties that any text must hold, draws that repeat themselves."""

import gzip
import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamachat.constraints.families import CHECKABLE, FAMILIES, Constraint, are_compatible, families
from llamachat.constraints.instruction import (
    Instruction,
    constrain,
    draw_instruction,
    is_kept,
    passes,
    plain_recall,
    recall_questions,
    recalled,
    repaired,
    values_of,
)
from llamachat.constraints.texts import sentences, words
from llamachat.constraints.values import parse_list, read_list, side_of
from llamachat.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parents[3]
ALL = families(lists={name: read_list(ROOT / f"data/gatt/{name}.txt") for name in ("figures", "hobbies", "languages")})
texts = st.text(alphabet=st.sampled_from("abcIXe .,!?'\"-\n0123\u2019\u201c\u00e9"), max_size=60)


def constraint_of(family: str, value: str = "") -> Constraint:
    return constrain(ALL[family], value)


def alone(family: str, value: str = "") -> Instruction:
    constraint = constraint_of(family, value)
    return Instruction((constraint,), constraint.long, is_shortened=False)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Dr. Smith met J. R. R. Tolkien at No. 5, St. James Street.", 1), ("I like tea, e.g. Earl Grey.", 1),
        ("No. I do not.", 2), ("No.", 1), ("It is I. You know me.", 2), ("We met at 5 p.m. yesterday.", 1),
        ("We met at 5 p.m. Then we ate.", 2), ("It costs 3.5 dollars at 4:45, I think.", 1), ('"Stop!" he said.', 1),
        ('He said "Stop!" Then he left.', 2), ("Well... maybe.", 1), ("Well... I think so.", 2),
        ("What?! Really?", 2), ("i like it. it is good", 2), ("Two lines\nwithout a stop", 2),
        ("1. Apples\n2. Pears", 2), ("- Apples.\n- ", 1), ("Hello! How are you?", 2),
        ("See www.example.com for more.", 1), ("... !!", 0), ("", 0),
    ],
)  # fmt: skip
def test_sentences_are_counted_as_a_reader_would(text: str, wanted: int) -> None:
    assert len(sentences(text)) == wanted, sentences(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Don't go", 2), ("don\u2019t", 1), ("a well-known man", 3), ("4:45 pm, 1,000 or 3.5", 5), ("rock 'n' roll", 3),
        ("-- ... !", 0), ("caf\u00e9 (really)", 2), ("one,two", 2),
    ],
)  # fmt: skip
def test_words_are_counted_as_a_reader_would(text: str, wanted: int) -> None:
    assert len(words(text)) == wanted, words(text)


# (family, value): answers that keep it, answers that break it.
CASES: dict[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...]]] = {
    ("one_sentence", ""): (
        ("I like cats, but I own a dog.", "Mr. Brown came at 5 p.m.", "Do you?"),
        ("I like cats", "Hello! I like cats.", "Cats:\n1. Tom.\n2. Bill."),
    ),
    ("several_sentences", ""): (("Hello! I like cats.",), ("I like cats.", "I like cats. And")),
    ("ends_with", "friend"): (
        ("Of course, my friend!", 'He said: "my FRIEND."'),
        ("A friend of mine.", "Friend.", "All my friends.", "Look at that boyfriend."),
    ),
    ("ends_with", "over and out"): (("That is all. Over and out.",), ("Over that, and out.",)),
    ("begins_with", "Sure"): (
        ("Sure, why not?", '"sure - come in"'),
        ("Surely you jest.", "I am sure it is.", "Sure!"),
    ),
    ("calls_user", "John"): (("I agree, John.", "JOHN, GO!", "That is John's hat."), ("Johnson is here.", "John")),
    ("at_most_words", "3"): (("I don't know.",), ("I really don't know.", "...")),
    ("at_least_words", "3"): (("I don't know.",), ("I know.",)),
    ("without_letter", "e"): (("I do not know what you want.",), ("Every", "A caf\u00e9")),
    ("no_questions", ""): (("I like cats.",), ("I like cats. You?", "!")),
    ("asks_back", ""): (("I like cats. And you?", 'He asked: "Why?"'), ("You? I like cats.", "?")),
    ("capitals", ""): (("NO, I AM 30!",), ("No.", "30")),
    ("small_letters", ""): (("no, i am 30!",), ("No.",)),
    ("quoted", ""): (('"I like cats."', "\u201cI like cats.\u201d"), ('"Tom" and "Bill"', '"I like cats.', '""', '"')),
}  # fmt: skip
JUDGED = [
    (*key, answer, wanted)
    for key, sides in CASES.items()
    for side, wanted in zip(sides, (True, False), strict=True)
    for answer in side
]


@pytest.mark.parametrize(("family", "value", "answer", "wanted"), JUDGED)
def test_checkers_agree_with_a_reader(family: str, value: str, answer: str, wanted: bool) -> None:
    assert is_kept(constraint_of(family, value), answer) is wanted
    assert passes(alone(family, value), answer) is wanted


def test_each_checker_is_judged_both_ways() -> None:
    assert {(family, wanted) for family, _, _, wanted in JUDGED} == {(f, w) for f in CHECKABLE for w in (True, False)}


RECALLED = {
    ("figure", "Galileo Galilei"): (
        ("I am Galileo Galilei.", "No, I am galileo  galilei!", "Not at all. Galileo Galilei, at your service."),
        ("I am Galileo.", "I am not Galileo Galilei."),
    ),
    ("hobby", "golf"): (("I love golf's quiet.",), ("I love golfing.", "I don't play golf.", "")),
    ("hobby", "playing the piano"): (("The piano, of course.",), ("Pianos are big.",)),
}


@pytest.mark.parametrize(("family", "value"), RECALLED)
def test_a_recall_names_the_value(family: str, value: str) -> None:
    names_it, does_not = RECALLED[family, value]
    assert all(recalled(constraint_of(family, value), answer) for answer in names_it)
    assert not any(recalled(constraint_of(family, value), answer) for answer in does_not)


def test_figures_and_hobbies_have_recall_questions_and_no_checker() -> None:
    for family in ("figure", "hobby"):
        questions = recall_questions(constraint_of(family, ALL[family].values[0]))
        assert len(questions) >= 2 and all(question.endswith("?") for question in questions)
        for constraint in (constraint_of(family, value) for value in ALL[family].values):
            assert not constraint.checker
            assert all(recalled(constraint, plain_recall(constraint, question)) for question in questions)
    assert (
        recall_questions(constraint_of("one_sentence")) == () == recall_questions(constraint_of("language", "French"))
    )


@given(texts)
@settings(max_examples=300, deadline=None)
def test_contrary_constraints_are_never_both_kept(answer: str) -> None:
    for one, other in (
        ("one_sentence", "several_sentences"),
        ("no_questions", "asks_back"),
        ("capitals", "small_letters"),
    ):
        assert not (is_kept(constraint_of(one), answer) and is_kept(constraint_of(other), answer))
    assert is_kept(constraint_of("at_most_words", "4"), answer) + is_kept(
        constraint_of("at_least_words", "5"), answer
    ) == bool(words(answer))


@given(texts)
@settings(max_examples=300, deadline=None)
def test_an_answer_without_a_word_passes_nothing_and_white_space_around_it_does_not_count(answer: str) -> None:
    for family in CHECKABLE:
        instruction = alone(family, ALL[family].values[0])
        assert not passes(instruction, re.sub(r"\w", "", answer))
        assert passes(instruction, f"\n {answer} ") == passes(instruction, answer)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_the_sentences_hold_every_word_in_order(answer: str) -> None:
    joined = [word for sentence in sentences(answer) for word in words(sentence)]
    assert joined == words(answer) or re.search(r"(?m)^\s*\(?\d{1,3}[.)]\s", answer)  # numbers of a list are no words


@given(texts.filter(lambda answer: bool(words(answer))), st.sampled_from(sorted(CHECKABLE)), st.integers(0, 40))
@settings(max_examples=300, deadline=None)
def test_a_repaired_answer_passes(answer: str, family: str, place: int) -> None:
    values = ALL[family].values
    instruction = alone(family, values[place % len(values)])
    changed = repaired(instruction, answer)
    assert changed is None or passes(instruction, changed)
    if family in ("ends_with", "begins_with", "calls_user"):
        assert changed is not None


@pytest.mark.parametrize(
    ("constraints", "wanted"),
    [
        ([("calls_user", "John")], "John, yes, it is. Really?"),
        ([("begins_with", "Sure"), ("calls_user", "John")], "Sure, John, yes, it is. Really?"),
        ([("ends_with", "friend")], "Yes, it is. Really, friend?"),
        ([("one_sentence", ""), ("ends_with", "friend"), ("quoted", "")], '"Yes, it is, friend."'),
        ([("small_letters", ""), ("begins_with", "Sure")], "sure, yes, it is. really?"),
        ([("no_questions", "")], None),
    ],
)
def test_repairs(constraints: list[tuple[str, str]], wanted: str | None) -> None:
    instruction = Instruction(tuple(constraint_of(*constraint) for constraint in constraints), "", is_shortened=False)
    assert repaired(instruction, "Yes, it is. Really?") == wanted


def contradict(one: Constraint, other: Constraint) -> bool:
    """Our own words for it, pair by pair."""
    contrary = [
        {"one_sentence", "several_sentences"},
        {"at_most_words", "several_sentences"},
        {"at_most_words", "at_least_words"},
        {"no_questions", "asks_back"},
        {"ends_with", "asks_back"},
        {"capitals", "small_letters"},
    ]
    pair = {one.family, other.family}
    of_any_language = {"figure", "hobby", "ends_with", "begins_with", "calls_user"}
    for first, second in ((one, other), (other, one)):
        if first.family == "language" and second.family not in of_any_language:
            return True
        if first.family == "without_letter" and first.value in second.value.lower():
            return True
        if first.family == "at_most_words" and len(second.value.split()) + 3 > int(first.value):
            return True
    return len(pair) == 1 or pair in contrary


def test_no_instruction_contradicts_itself_and_every_family_and_number_comes() -> None:
    drawn = [draw_instruction(seed=3, index=index, side="train", families=ALL) for index in range(1500)]
    for instruction in drawn:
        for one, other in combinations(instruction.constraints, 2):
            assert not contradict(one, other), instruction.text
    counts = Counter(constraint.family for instruction in drawn for constraint in instruction.constraints)
    assert set(counts) == set(FAMILIES)
    numbers = Counter(len(instruction.constraints) for instruction in drawn)
    assert all(420 < numbers[number] < 580 for number in (1, 2, 3)), numbers
    assert 690 < sum(instruction.is_shortened for instruction in drawn) < 810


def test_weights_are_shares_of_the_first_draw() -> None:
    three = {name: ALL[name] for name in ("figure", "quoted", "calls_user")}
    weights = {"calls_user": 3.0, "figure": 2.0}
    counts = Counter(
        draw_instruction(seed=1, index=i, side="train", families=three, most=1, weights=weights).constraints[0].family
        for i in range(1200)
    )
    # Six parts of 200 each; four standard deviations of a binomial share of a half are 69.
    assert (
        abs(counts["calls_user"] - 600) < 70 and abs(counts["figure"] - 400) < 70 and abs(counts["quoted"] - 200) < 55
    )


def test_compatible_is_what_does_not_contradict() -> None:
    some = [constraint_of(name, value) for name, family in ALL.items() for value in family.values[:3]]
    for one, other in combinations(some, 2):
        assert are_compatible(one, other) is are_compatible(other, one) is not contradict(one, other), (one, other)


def test_a_draw_depends_on_seed_index_side_and_families_alone() -> None:
    def draw(seed: int, index: int) -> Instruction:
        return draw_instruction(seed=seed, index=index, side="train", families=ALL)

    first = [draw(0, index) for index in range(50)]
    assert [draw(0, index) for index in reversed(range(50))] == first[::-1]
    turned = dict(reversed(ALL.items()))
    assert [draw_instruction(seed=0, index=i, side="train", families=turned) for i in range(50)] == first
    assert [draw(1, index) for index in range(50)] != first
    # Pinned: what was drawn for a run is drawn for its repetition on another machine.
    assert [instruction.text for instruction in first[:3]] == [
        "Act as Miley Cyrus. Do not use question marks in your answers.",
        "Write every reply without capital letters. Never ask me a question.",
        "Figure: Harrison Ford. Last sentence: a question.",
    ]


def test_training_and_measuring_share_no_value() -> None:
    for name, family in ALL.items():
        if family.has_values:
            train, held_out = values_of(family, "train"), values_of(family, "held_out")
            assert train and held_out and sorted((*train, *held_out)) == sorted(family.values)
        for side in ("train", "held_out"):
            for index in range(30):
                drawn = draw_instruction(seed=index, index=index, side=side, families={name: family}, most=1)
                (constraint,) = drawn.constraints
                assert not family.has_values or side_of(name, constraint.value) == side
    assert side_of("figure", "JOHN LOCKE") == side_of("figure", "John Locke")


def test_no_word_of_an_instruction_is_in_an_instruction_of_the_sft_data() -> None:
    """Else a held-out value would have been trained on before."""
    with gzip.open(ROOT / "data/sft/system.jsonl.gz") as file:
        systems = {json.loads(line)["messages"][0]["content"] for line in file}
    wanted = re.compile(
        r"(?:end|finish|begin|start|last words|first words|address|called|call the user)\b.*", re.IGNORECASE
    )
    named = " | ".join(text for text in systems if '"' in text or wanted.match(text))
    quoted = {phrase.strip(".!?:").casefold() for phrase in re.findall(r'"([^"]*)"', named)}
    users = {name.casefold() for name in re.findall(r"(?:user as|is called|Call the user) ([A-Z][a-z]+)", named)}
    assert len(quoted) > 15 and len(users) > 5, "the constraints of the data were found"
    for family in ("ends_with", "begins_with", "calls_user"):
        assert not {value.casefold() for value in ALL[family].values} & (quoted | users), family


def test_wordings_name_the_value_and_shortened_ones_are_shorter() -> None:
    for family in ALL.values():
        assert len(family.values) == len({value.casefold() for value in family.values})
        for wording in (*family.long, family.short):
            assert ("{}" in wording) is family.has_values
            assert wording[-1] == "."


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("Here are some hobbies:\n1. Tennis\n2. **Golf** - a sport\n3) playing the piano.", ["Tennis", "Golf", "playing the piano"]),
        ("Sure! I can help you with a list of many hobbies.\n\n- Tennis\n* tennis\n\u2022 Chess (a game)", ["Tennis", "Chess"]),
        ("Tennis, golf and chess.", ["Tennis", "golf", "chess"]),
        ('Hobbies: "Golf", tennis', ["Golf", "tennis"]),
        ("Jean-Luc Picard: a captain\nAnna", ["Jean-Luc Picard", "Anna"]),
        ("1\n2\n...", []),
        ("", []),
    ],
)  # fmt: skip
def test_a_list_that_a_model_wrote_becomes_its_entries(written: str, wanted: list[str]) -> None:
    assert parse_list(written) == wanted


def test_lists_come_from_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("Ada  Lovelace\n\nada lovelace\nAlan Turing\r\n", encoding="utf-8")
    assert read_list(file) == ("Ada Lovelace", "Alan Turing")
    assert families(["figure"], lists={"figures": read_list(file)})["figure"].values == ("Ada Lovelace", "Alan Turing")


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: the list cannot be read.*one entry a line"):
        read_list(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"empty\.txt: the list has no entry.*Write one entry a line"):
        read_list(tmp_path / "empty.txt")
    with pytest.raises(ConfigError, match=r"'hobby' have no list of hobbies.*leave 'hobby' out"):
        families(["hobby"])
    with pytest.raises(ConfigError, match=r"no constraints of the name 'haiku'.*one_sentence"):
        families(["haiku"])
    lone = families(["hobby"], lists={"hobbies": ["golf"]})
    missing = "held_out" if side_of("hobby", "golf") == "train" else "train"
    with pytest.raises(ConfigError, match=r"'hobby' have 1 values, none of them to .*longer list"):
        draw_instruction(seed=0, index=0, side=missing, families=lone)
