"""Records from sources: reading, refusing, dropping, splitting, mixing."""

import json
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Dialog, Message
from llamachat.config.sections import DataSource, Split
from llamachat.data.loading import Preference, Prompt, load_mixture, mix, read_records, split_records
from llamachat.errors import DataError


def user(text: object, **more: object) -> dict[str, object]:
    return {"role": "user", "content": text, **more}


def answer(text: object, **more: object) -> dict[str, object]:
    return {"role": "assistant", "content": text, **more}


DIALOG = {"messages": [user("Hi"), answer("Hello!")]}
PAIR = {"prompt": [user("Hi")], "chosen": [answer("Hello!")], "rejected": [answer("No.")], "rating": "better"}
PROMPT = {"prompt": [user("Hi")], "is_safety": True, "id": "p-1"}


def unchecked(messages: Sequence[Message], *, field: str = "messages") -> None:
    """No rule on texts."""


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(path: str, **more: Any) -> DataSource:
    return DataSource(path=path, **more)


def test_each_kind_by_hand(tmp_path: Path):
    said = Message("user", "Hi")
    dialogs = read_records(source(write(tmp_path / "d.jsonl", [{**DIALOG, "is_safe": False}])), "dialog", unchecked)
    assert dialogs.records == [Dialog((said, Message("assistant", "Hello!")), is_safe=False)]
    labels = {"chosen_is_safe": True, "rejected_is_safe": None}
    pairs = read_records(source(write(tmp_path / "p.jsonl", [{**PAIR, **labels}])), "preference", unchecked)
    assert pairs.records == [
        Preference(
            prompt=(said,),
            chosen=Message("assistant", "Hello!"),
            rejected=Message("assistant", "No."),
            rating="better",
            chosen_is_safe=True,
        )
    ]
    prompts = read_records(source(write(tmp_path / "q.jsonl", [PROMPT, {"prompt": [user("Ho")]}])), "prompt", unchecked)
    assert prompts.records == [
        Prompt(messages=(said,), is_safety=True, id="p-1"),
        Prompt(messages=(Message("user", "Ho"),)),
    ]


def test_prompts_are_read_out_of_dialogs_and_preferences(tmp_path: Path):
    open_dialog = {"messages": [*DIALOG["messages"], user("And?")]}
    path = write(tmp_path / "a.jsonl", [DIALOG, open_dialog, PAIR, PROMPT])
    found = read_records(source(path), "prompt", unchecked).records
    assert [[message.content for message in prompt.messages] for prompt in found] == [
        ["Hi"],
        ["Hi", "Hello!", "And?"],
        ["Hi"],
        ["Hi"],
    ]


def test_all_bad_lines_are_told_in_one_error(tmp_path: Path, tiny_format: ChatFormat):
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
        read_records(source(path), "dialog", tiny_format.check_text)
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
    found = read_records(source(path, on_bad_record="drop"), "dialog", tiny_format.check_text)
    assert len(found.records) == 1
    assert sorted(found.dropped.values()) == [1, 3]
    assert sum("'[INST]' at character N" in reason for reason in found.dropped) == 1


def test_dropping_does_not_hide_a_broken_file_nor_an_empty_result(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist"):
        read_records(source(str(tmp_path / "no.jsonl"), on_bad_record="drop"), "dialog", unchecked)
    path = write(tmp_path / "a.jsonl", [{"messages": []}])
    with pytest.raises(DataError, match="no record is left") as error:
        read_records(source(path, on_bad_record="drop"), "dialog", unchecked)
    assert "1 x messages: is empty" in str(error.value)


def test_keys_that_nothing_reads_are_counted_and_slips_refused(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{**DIALOG, "origin": "x"}, {**DIALOG, "origin": "y"}, DIALOG])
    assert read_records(source(path), "dialog", unchecked).unused_keys == {"origin": 2}
    path = write(tmp_path / "b.jsonl", [{**PAIR, "ratting": "better"}])
    assert read_records(source(path), "preference", unchecked).unused_keys == {"ratting": 1}
    slip = {key: value for key, value in PAIR.items() if key != "rating"} | {"ratting": "better"}
    with pytest.raises(DataError, match=r":1: ratting: .*Rename it 'rating'"):
        read_records(source(write(tmp_path / "c.jsonl", [slip])), "preference", unchecked)


def test_columns_system_and_limit(tmp_path: Path):
    rows = [
        {"talk": DIALOG["messages"], "messages": "other"},
        {"talk": [{"role": "system", "content": "S"}, *DIALOG["messages"]]},
    ]
    path = write(tmp_path / "a.jsonl", [*rows, "broken"])
    found = read_records(source(path, columns={"messages": "talk"}, system="Be brief.", limit=2), "dialog", unchecked)
    assert [dialog.messages[0] for dialog in found.records] == [Message("system", "Be brief."), Message("system", "S")]
    pairs = write(tmp_path / "p.jsonl", [PAIR])
    (pair,) = read_records(source(pairs, system="S"), "preference", unchecked).records
    assert pair.prompt[0] == Message("system", "S")
    assert pair.rating == "better"
    (prompt,) = read_records(source(write(tmp_path / "q.jsonl", [PROMPT]), system="S"), "prompt", unchecked).records
    assert prompt == Prompt(messages=(Message("system", "S"), Message("user", "Hi")), is_safety=True, id="p-1")


def test_a_column_that_no_row_has_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [PAIR])
    with pytest.raises(DataError, match="has no column 'grade' in any row"):
        read_records(source(path, columns={"rating": "grade"}), "preference", unchecked)


def test_system_text_of_the_source_is_checked(tmp_path: Path, tiny_format: ChatFormat):
    path = write(tmp_path / "a.jsonl", [DIALOG])
    with pytest.raises(DataError, match=r"'system' holds '\[INST\]'"):
        read_records(source(path, system="[INST]"), "dialog", tiny_format.check_text)


def test_known_sets_are_recognised(tmp_path: Path):
    alpaca = write(tmp_path / "a.jsonl", [{"instruction": "Add.", "input": "1 2", "output": "3"}] * 2)
    (dialog, _) = read_records(source(alpaca), "dialog", unchecked).records
    assert dialog.messages == (Message("user", "Add.\n\n1 2"), Message("assistant", "3"))
    transcript = "\n\nHuman: Hi\n\nAssistant: "
    hh = write(tmp_path / "h.jsonl", [{"chosen": transcript + "Hello!", "rejected": transcript + "No."}])
    (pair,) = read_records(source(hh, format="hh-rlhf"), "preference", unchecked).records
    assert (pair.prompt[0].content, pair.chosen.content, pair.rejected.content) == ("Hi", "Hello!", "No.")
    assert read_records(source(hh), "preference", unchecked).records == [pair]
    assert read_records(source(hh), "prompt", unchecked).records == [Prompt(messages=(Message("user", "Hi"),))]


def test_a_bad_row_of_a_known_set_has_line_field_and_mend(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [{"instruction": "Add.", "output": "3"}, {"instruction": "Add."}, [1]])
    with pytest.raises(DataError) as error:
        read_records(source(path), "dialog", unchecked)
    assert f"{path}:2: output: is missing. A row of alpaca has it as text. Add the field" in str(error.value)
    assert f"{path}:3: line: is a list" in str(error.value)


def test_rows_of_a_known_set_without_a_record_are_counted(tmp_path: Path):
    def tree(*answers: dict[str, Any]) -> dict[str, Any]:
        return {"message_tree_id": "t", "prompt": {"role": "prompter", "text": "Hi", "replies": list(answers)}}

    ranked = [{"role": "assistant", "text": f"a{rank}", "rank": rank, "replies": []} for rank in range(2)]
    path = write(tmp_path / "a.jsonl", [tree(*ranked), tree()])
    found = read_records(source(path), "preference", unchecked)
    assert [pair.rating for pair in found.records] == ["slightly_better"]
    assert found.dropped == {"row without a preference": 1}


def test_formats_that_do_not_exist_or_give_another_kind(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", [DIALOG])
    with pytest.raises(DataError, match=r"unknown format 'alpacca'.*Did you mean 'alpaca'"):
        read_records(source(path, format="alpacca"), "dialog", unchecked)
    with pytest.raises(DataError, match=r"gives dialogs, but preferences are read here.*hh_rlhf"):
        read_records(source(path, format="alpaca"), "preference", unchecked)
    assert read_records(source(path, format="native"), "dialog", unchecked).records


def test_parquet_and_gzip_give_the_same_records(tmp_path: Path):
    rows = [{**PAIR, "chosen_is_safe": None}, {**PAIR, "chosen_is_safe": True}]
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    lines = write(tmp_path / "a.jsonl", rows)
    assert read_records(source(str(path)), "preference", unchecked) == read_records(
        source(lines), "preference", unchecked
    )


def dialogs_of(texts: Sequence[str]) -> list[Dialog]:
    return [Dialog((Message("user", text), Message("assistant", "a"))) for text in texts]


def test_split_by_hand():
    # An independent hash of "split\n<text>": the first 48 bits as a fraction of 1.
    def expected(text: str) -> str:
        position = int(sha256(b"split\n" + text.encode()).hexdigest()[:12], 16) / 16**12
        return "test" if position < 0.1 else "validation" if position < 0.3 else "judge" if position < 0.6 else "train"

    texts = [f"question {index}" for index in range(400)]
    sides = split_records(dialogs_of(texts), Split(test=0.1, validation=0.2, judge=0.3))
    for name in ("train", "validation", "test", "judge"):
        assert [dialog.messages[0].content for dialog in getattr(sides, name)] == [
            text for text in texts if expected(text) == name
        ]
        assert getattr(sides, name)


def test_a_conversation_is_on_one_side_whatever_holds_it():
    split = Split(test=0.25, validation=0.25, judge=0.25)
    for index in range(40):
        first, other = Message("user", f"q{index}"), Message("assistant", "a")
        records = [
            Dialog((Message("system", "S"), first, other)),
            Dialog((first, other, Message("user", "more"), other)),
            Preference(prompt=(first,), chosen=other, rejected=Message("assistant", "b")),
            Prompt(messages=(Message("user", f"  q{index}\n"),)),
        ]
        sides = split_records(records, split)
        assert sorted(map(len, (sides.train, sides.validation, sides.test, sides.judge))) == [0, 0, 0, 4]


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
    texts = [f"question {index}" for index in range(200)]
    path = write(tmp_path / "a.jsonl", [{"messages": [user(text), answer("a")]} for text in texts])
    other = write(tmp_path / "b.jsonl", [DIALOG, {"messages": []}])
    split = Split(test=0.2, validation=0.2, judge=0.2)
    once = split_records(dialogs_of(texts), split)
    mixture = load_mixture(
        [source(path, weight=2.0), source(other, on_bad_record="drop")], split, kind="dialog", check=unchecked, seed=0
    )
    own = [[dialog for dialog in side if dialog.messages[0].content != "Hi"] for side in (mixture.train, mixture.judge)]
    assert [Counter(dialog.messages[0].content for dialog in side) for side in own] == [
        Counter({dialog.messages[0].content: 2 for dialog in side}) for side in (once.train, once.judge)
    ]
    assert [dialog for dialog in mixture.test if dialog.messages[0].content != "Hi"] == once.test
    assert [dialog for dialog in mixture.validation if dialog.messages[0].content != "Hi"] == once.validation
    assert list(mixture.dropped) == [f"{other}: messages: is empty, but a conversation needs at least one user turn."]


def test_bad_lines_of_all_sources_are_told_together(tmp_path: Path):
    one, two = (write(tmp_path / name, [DIALOG, {"messages": []}]) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(DataError) as error:
        load_mixture([source(one), source(two)], Split(), kind="dialog", check=unchecked, seed=0)
    assert f"{one}:2: messages" in str(error.value)
    assert f"{two}:2: messages" in str(error.value)
