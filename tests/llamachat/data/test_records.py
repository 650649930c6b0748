"""Records from sources: reading, refusing, dropping, splitting, mixing."""

import re
from collections import Counter
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Dialog, Message
from llamachat.config.sections import DataSource, Split
from llamachat.data import loading
from llamachat.data.check import check_path
from llamachat.data.files import read_rows
from llamachat.data.loading import Mixture, fraction, load_mixture, mix, parse_rows, read_records, split_of
from llamachat.data.records import Preference, Prompt, Record, first_user_turn
from llamachat.errors import DataError
from tests.llamachat.data.lines import answer, user, write

DIALOG = {"messages": [user("Hi"), answer("Hello!")]}
PAIR = {"prompt": [user("Hi")], "chosen": [answer("Hello!")], "rejected": [answer("No.")], "rating": "better"}
PROMPT = {"prompt": [user("Hi")], "is_safety": True, "id": "p-1"}


def source(path: str, **more: Any) -> DataSource:
    return DataSource(path=path, **more)


def all_of(source: DataSource, record: type[Any], **more: Any) -> Mixture[Any]:
    """The records of one source on one side, with what was dropped."""
    none_held_out = Split(test=0, validation=0, judge=0)
    return load_mixture([source], none_held_out, record, **({"forbidden": (), "seed": 0} | more))


def test_each_kind_by_hand(tmp_path: Path):
    said = Message("user", "Hi")
    dialogs = read_records(source(write(tmp_path / "d.jsonl", [{**DIALOG, "is_safe": False}])), Dialog)
    assert dialogs == [Dialog((said, Message("assistant", "Hello!")), is_safe=False)]
    labels = {"chosen_is_safe": True, "rejected_is_safe": None}
    pairs = read_records(source(write(tmp_path / "p.jsonl", [{**PAIR, **labels}])), Preference)
    assert pairs == [
        Preference(
            prompt=(said,),
            chosen=Message("assistant", "Hello!"),
            rejected=Message("assistant", "No."),
            rating="better",
            chosen_is_safe=True,
        )
    ]
    prompts = read_records(source(write(tmp_path / "q.jsonl", [PROMPT, {"prompt": [user("Ho")]}])), Prompt)
    assert prompts == [
        Prompt(messages=(said,), is_safety=True, id="p-1"),
        Prompt(messages=(Message("user", "Ho"),)),
    ]


def test_prompts_are_read_out_of_dialogs_and_preferences(tmp_path: Path):
    open_dialog = {"messages": [*DIALOG["messages"], user("And?")]}
    path = write(tmp_path / "a.jsonl", [DIALOG, open_dialog, PAIR, PROMPT])
    prompts = read_records(source(path), Prompt)
    assert [[message.content for message in prompt.messages] for prompt in prompts] == [
        ["Hi"],
        ["Hi", "Hello!", "And?"],
        ["Hi"],
        ["Hi"],
    ]


def test_one_error_reports_all_bad_lines(tmp_path: Path, tiny_format: ChatFormat):
    rows = [
        DIALOG,
        {"messages": [user("[INST] x"), answer("y")]},
        {"messages": [user("</s> is text"), answer("y")]},
        {"messages": [{"role": "human", "content": "x"}, {"role": "gpt", "content": 3}]},
        PAIR,
        {"messages": [answer("x")], "is_safe": "no"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError) as error:
        read_records(source(path), Dialog, forbidden=tiny_format.forbidden)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{path}: 4 records break the rules, 2 keep them.")
    assert "on_bad_record: drop" in lines[0]
    assert [line.split(": ")[:2] for line in lines[1:-1]] == [
        [f"{path}:2", "messages[0].content"],
        [f"{path}:4", "messages[0].role"],
        [f"{path}:4", "messages[1].role"],
        [f"{path}:5", "messages"],
        [f"{path}:6", "messages[0].role"],
        [f"{path}:6", "is_safe"],
    ]
    assert "'[INST]'" in lines[1]
    assert "looks like a preference" in lines[4]
    assert lines[-1].endswith(f"llamachat data convert {path} {tmp_path / 'a.converted.jsonl'}")
    assert error.value.exit_status == 2


def test_drop_counts_by_reason_and_keeps_the_rest(tmp_path: Path, tiny_format: ChatFormat):
    tagged = [{"messages": [user("x" * n + "[INST]"), answer("y")]} for n in range(3)]
    path = write(tmp_path / "a.jsonl", [DIALOG, *tagged, {"messages": []}])
    mixture = all_of(source(path, on_bad_record="drop"), Dialog, forbidden=tiny_format.forbidden)
    assert len(mixture.train) == 1
    assert sorted(mixture.dropped.values()) == [1, 3]
    assert sum("'[INST]' at character N" in reason for reason in mixture.dropped) == 1


def test_dropping_does_not_hide_a_broken_file_nor_an_empty_result(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        read_records(source(str(tmp_path / "no.jsonl"), on_bad_record="drop"), Dialog)
    path = write(tmp_path / "a.jsonl", [{"messages": []}])
    with pytest.raises(DataError, match="no record is left") as error:
        read_records(source(path, on_bad_record="drop"), Dialog)
    assert "1 x messages: is empty" in str(error.value)


def test_keys_that_nothing_reads_are_left_out_and_slips_refused(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{**DIALOG, "origin": "x"}, {**DIALOG, "origin": "y"}, DIALOG])
    assert [row.unused for row in parse_rows(read_rows(path), path=path)] == [("origin",), ("origin",), ()]
    assert len(read_records(source(path), Dialog)) == 3
    slip = {key: value for key, value in PAIR.items() if key != "rating"} | {"ratting": "better"}
    with pytest.raises(DataError, match=r":1: ratting: .*Rename it 'rating'"):
        read_records(source(write(tmp_path / "c.jsonl", [slip])), Preference)


def test_columns_system_and_limit(tmp_path: Path):
    rows = [
        {"talk": DIALOG["messages"], "messages": "other"},
        {"talk": [{"role": "system", "content": "S"}, *DIALOG["messages"]]},
    ]
    path = write(tmp_path / "a.jsonl", [*rows, "broken"])
    dialogs = read_records(source(path, columns={"messages": "talk"}, system="Be brief.", limit=2), Dialog)
    assert [dialog.messages[0] for dialog in dialogs] == [Message("system", "Be brief."), Message("system", "S")]
    pairs = write(tmp_path / "p.jsonl", [PAIR])
    (pair,) = read_records(source(pairs, system="S"), Preference)
    assert pair.prompt[0] == Message("system", "S")
    assert pair.rating == "better"
    (prompt,) = read_records(source(write(tmp_path / "q.jsonl", [PROMPT]), system="S"), Prompt)
    assert prompt == Prompt(messages=(Message("system", "S"), Message("user", "Hi")), is_safety=True, id="p-1")


@pytest.mark.parametrize(
    ("record", "more", "reason"),
    [
        (Dialog, {"columns": {"is_safe": "grade"}}, "has no column 'grade' in any row"),
        (Dialog, {"system": "[INST]"}, r"'system' holds '\[INST\]'"),
        (Dialog, {"format": "alpacca"}, r"unknown format 'alpacca'.*Did you mean 'alpaca'"),
        (Preference, {"format": "alpaca"}, r"gives dialogs, but preferences are read here.*hh_rlhf"),
    ],
)
def test_what_a_source_says_of_its_file_is_checked(
    record: Any, more: dict[str, Any], reason: str, tmp_path: Path, tiny_format: ChatFormat
):
    path = write(tmp_path / "a.jsonl", [DIALOG])
    with pytest.raises(DataError, match=reason):
        read_records(source(path, **more), record, forbidden=tiny_format.forbidden)
    assert read_records(source(path, format="native"), Dialog)


def test_a_bad_row_of_a_known_set_has_line_field_and_fix(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "Add.", "output": "3"}, {"instruction": "Add."}, [1]])
    with pytest.raises(DataError) as error:
        read_records(source(path), Dialog)
    assert re.search(rf"{path}:2: output: is missing.*read as alpaca", str(error.value))
    assert f"{path}:3: line: is a list" in str(error.value)


def split_by_hand(text: str) -> str:
    """An independent hash of "split\n<text>": the first 48 bits as a fraction of 1."""
    position = int(sha256(b"split\n" + text.encode()).hexdigest()[:12], 16) / 16**12
    return "test" if position < 0.1 else "validation" if position < 0.3 else "judge" if position < 0.6 else "train"


SPLIT = Split(test=0.1, validation=0.2, judge=0.3)
TEXTS = [f"question {index}" for index in range(400)]


def test_a_conversation_is_on_one_side_whatever_holds_it():
    assert {split_by_hand(text) for text in TEXTS} == {"train", "validation", "test", "judge"}
    for text in TEXTS:
        first, other = Message("user", text), Message("assistant", "a")
        records: list[Record] = [
            Dialog((Message("system", "S"), first, other)),
            Dialog((first, other, Message("user", "more"), other)),
            Preference(prompt=(first,), chosen=other, rejected=Message("assistant", "b")),
            Prompt(messages=(Message("user", f"  {text}\n"),)),
        ]
        assert {split_of(fraction(first_user_turn(record)), SPLIT) for record in records} == {split_by_hand(text)}


def conversation(*texts: str) -> dict[str, Any]:
    return {"messages": [turn for text in texts for turn in (user(text), answer("a"))]}


def sides_by_last_question(mixture: Mixture[Dialog]) -> dict[str, set[str]]:
    """The sides on which each last question of a dialog occurs."""
    sides: dict[str, set[str]] = {}
    for side in ("train", "validation", "test", "judge"):
        for dialog in getattr(mixture, side):
            last = [message.content for message in dialog.messages if message.role == "user"][-1]
            sides.setdefault(last.casefold(), set()).add(side)
    return sides


@pytest.mark.parametrize(
    "opening", [["hi"], ["hi", "Hello there.", "HI"], ["/start", "en"], ["a fixed first turn " * 20]]
)
def test_conversations_that_open_alike_are_on_all_sides(
    opening: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    texts = TEXTS[:320]
    openings = [opening] if opening[-1] == "en" else [[text] for text in opening]
    rows = [conversation(*openings[index % len(openings)], text) for index, text in enumerate(texts)]
    path = write(tmp_path / "a.jsonl", [*rows, *(conversation(text) for text in TEXTS)])
    mixture = load_mixture([source(path)], SPLIT, Dialog, seed=0, forbidden=())
    # The question decides, with the greeting before it as without: a near-duplicate of neither is on another side.
    assert sides_by_last_question(mixture) == {text: {split_by_hand(text)} for text in TEXTS}
    assert not caplog.records
    prompts = load_mixture([source(path)], SPLIT, Prompt, seed=0, forbidden=())
    assert [len(prompts.test), len(prompts.judge)] == [len(mixture.test), len(mixture.judge)], "the same in each step"


def test_conversations_that_share_a_rare_beginning_stay_together(tmp_path: Path):
    rows = [conversation(text, *more) for text in TEXTS for more in ((), ("more",), ("more", f"still more of {text}"))]
    mixture = load_mixture([source(write(tmp_path / "a.jsonl", rows))], SPLIT, Dialog, seed=0, forbidden=())
    for side in ("train", "validation", "test", "judge"):
        first = [dialog.messages[0].content for dialog in getattr(mixture, side)]
        assert Counter(first) == {text: 3 for text in TEXTS if split_by_hand(text) == side}


def test_sides_far_from_their_shares_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [{"messages": [user("Tell me a joke."), answer(text)]} for text in TEXTS]
    path = write(tmp_path / "a.jsonl", rows)
    load_mixture([source(path)], SPLIT, Dialog, seed=0, forbidden=())
    assert re.search(r"400 records hold 1 different", caplog.text) and "(40% configured)" in caplog.text
    text = check_path(path, None, "auto", ()).text()
    assert "warning: data.split" in text and "sides by the default data.split: 400 " in text


def test_mix_by_weight():
    records = list(range(100))
    assert mix([(records, 1.0), (["x"], 2.0)], 0) == [*records, "x", "x"]
    half = mix([(records, 0.5)], 0)
    assert len(set(half)) == 50
    assert half == sorted(half)
    assert half != mix([(records, 0.5)], 1)
    more = Counter(mix([(records, 1.5)], 0))
    assert Counter(more.values()) == {1: 50, 2: 50}
    assert {record for record, count in more.items() if count == 2} == set(half)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.0, 0.1, 0.5, 1.0, 1.25, 2.0, 3.5]), min_size=4, max_size=4),
    seed=st.integers(0, 9),
)
def test_mix_is_the_same_whatever_stands_beside(sizes: list[int], weights: list[float], seed: int):
    parts = [([(part, index) for index in range(size)], weights[part]) for part, size in enumerate(sizes)]
    mixed = mix(parts, seed)
    assert Counter(mixed) == Counter(mix(parts[::-1], seed))
    for part, (records, weight) in enumerate(parts):
        own = [record for record in mixed if record[0] == part]
        assert own == mix([(records, weight)], seed)
        assert abs(len(own) - weight * len(records)) <= 0.5


def test_mixture_weighs_what_is_trained_on_and_not_what_is_measured(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"messages": [user(text), answer("a")]} for text in TEXTS])
    other = write(tmp_path / "b.jsonl", [DIALOG, {"messages": []}])
    sources = [source(path, weight=2.0), source(other, on_bad_record="drop")]
    mixture = load_mixture(sources, SPLIT, Dialog, seed=0, forbidden=())
    for side, weight in (("train", 2), ("judge", 2), ("validation", 1), ("test", 1)):
        said = [dialog.messages[0].content for dialog in getattr(mixture, side)]
        own = [text for text in TEXTS if split_by_hand(text) == side]
        assert [text for text in said if text != "Hi"] == own * weight
    assert list(mixture.dropped) == [f"{other}: messages: is empty, but a conversation needs at least one user turn."]


def test_a_source_is_read_once_and_again_where_anything_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    reads: list[str] = []
    rows_of = loading.read_rows
    monkeypatch.setattr(loading, "read_rows", lambda path: reads.append(path) or rows_of(path))
    path = write(tmp_path / "a.jsonl", [PAIR])
    first = all_of(source(path), Preference)
    first.train.clear()
    assert len(all_of(source(path, weight=0.5), Preference, seed=1).train) == 1, "no list is shared"
    assert len(reads) == 1
    all_of(source(path), Prompt)
    all_of(source(path, system="S"), Preference)
    with pytest.raises(DataError):
        all_of(source(path), Preference, forbidden=("Hello",))
    assert len(reads) == 4
    write(tmp_path / "a.jsonl", [PAIR, PAIR])
    assert len(all_of(source(path), Preference).train) == 2


def test_bad_lines_of_all_sources_are_reported_together(tmp_path: Path):
    one, two = (write(tmp_path / name, [DIALOG, {"messages": []}]) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(DataError) as error:
        load_mixture([source(one), source(two)], Split(), Dialog, seed=0, forbidden=())
    assert f"{one}:2: messages" in str(error.value)
    assert f"{two}:2: messages" in str(error.value)
