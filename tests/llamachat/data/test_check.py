"""`data check`: every kind of broken line is named with line, field, reason and fix, and none is skipped."""

from pathlib import Path

import pytest

from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.chat_format.dialog import Message, as_dicts
from llamachat.data.check import CheckReport, TokenLimit, check_path
from tests.llamachat.data.lines import GOOD, answer, dialog, pair, prompt, system, user, write

# What stands on the line, the field that is named, a part of the reason, a part of the fix.
BROKEN_DIALOGS: dict[str, tuple[str, str, str, str]] = {
    "no json": ("Hello there", "column 1", "is not JSON", "Correct the line"),
    "single quotes": ("{'messages': []}", "column 2", "is not JSON", "Correct the line"),
    "cut off": (GOOD[:30], "column 31", "cut off", "whole record on one line"),
    "blank": ("", "line", "is blank", "Remove the line"),
    "two on a line": (GOOD + GOOD, f"column {len(GOOD) + 1}", "follows a whole", "line of its own"),
    "trailing comma": (GOOD + ",", f"column {len(GOOD) + 1}", "follows a whole", "take it out"),
    "not a number": (GOOD[:-1] + ', "x": NaN}', f"column {len(GOOD) + 7}", "holds NaN", "null"),
    "infinite": (GOOD[:-1] + ', "x": -Infinity}', f"column {len(GOOD) + 7}", "holds -Infinity", "null"),
    "key twice": ('{"messages": [], ' + GOOD[1:], "'messages'", "named twice", "Remove or rename"),
    "list": ("[1, 2]", "line", "is a list", "messages"),
    "null": ("null", "line", "is null", "messages"),
    "empty object": ("{}", "messages", "is missing; the record holds nothing", "Write"),
    "missing messages": ('{"conversation": []}', "messages", "is missing; the record holds 'conversation'", "columns"),
    "misspelt messages": ('{"mesages": []}', "mesages", "no key of a dialog", "Rename it 'messages'"),
    "null messages": ('{"messages": null}', "messages", "is null", "Write"),
    "text as messages": ('{"messages": "Hi"}', "messages", "is a string", "Write"),
    "object as messages": ('{"messages": {"role": "user"}}', "messages", "is an object", "Write"),
    "no message": (dialog(), "messages", "is empty", "Drop the record"),
    "text as message": (dialog("Hi"), "messages[0]", "is a string", "Write"),
    "missing role": (dialog({"content": "Hi"}, answer("a")), "messages[0].role", "is missing", "role"),
    "missing content": (dialog(user("a"), {"role": "assistant"}), "messages[1].content", "is missing", "content"),
    "foreign role": (dialog({"role": "human", "content": "Hi"}), "messages[0].role", "is 'human'", "Write 'user'"),
    "unknown role": (dialog(user("a"), {"role": "tool", "content": "x"}), "messages[1].role", "is 'tool'", "Rename"),
    "role of no text": (dialog({"role": 1, "content": "Hi"}), "messages[0].role", "is 1", "Rename"),
    "null content": (dialog(user("a"), answer(None)), "messages[1].content", "is null", "one string"),
    "number as content": (dialog(user(5), answer("a")), "messages[0].content", "is a number", "one string"),
    "parts as content": (dialog(user([{"text": "Hi"}]), answer("a")), "messages[0].content", "is a list", "joined"),
    "empty question": (dialog(user(""), answer("a")), "messages[0].content", "is empty", "Write the text"),
    "white answer": (dialog(user("a"), answer(" \n\t")), "messages[1].content", "is empty", "Write the text"),
    "two questions": (dialog(user("a"), user("b"), answer("c")), "messages[1].role", "twice in a row", "Merge"),
    "two answers": (dialog(user("a"), answer("b"), answer("c")), "messages[2].role", "twice in a row", "Merge"),
    "leading answer": (dialog(answer("b"), user("a"), answer("c")), "messages[0].role", "user speaks first", "Drop"),
    "open question": (dialog(user("a"), answer("b"), user("c")), "messages[2].role", "at the end", "Add the answer"),
    "late system": (dialog(user("a"), system("s"), answer("b")), "messages[1].role", "only as the first", "Move"),
    "two systems": (dialog(system("s"), system("s"), user("a")), "messages[1].role", "only as the first", "Move"),
    "system alone": (dialog(system("s")), "messages", "only a system text", "Add the user turn"),
    "tag in question": (dialog(user("a [INST] b"), answer("c")), "messages[0].content", "'[INST]'", "Take the tag out"),
    "tag in answer": (dialog(user("a"), answer("[/INST]")), "messages[1].content", "'[/INST]'", "Take the tag out"),
    "tag in system": (dialog(system("<<SYS>>"), user("a"), answer("b")), "messages[0].content", "<<SYS>>", "Take"),
    "half a character": (dialog(user("\ud83d"), answer("b")), "messages[0].content", "half of a char", "whole char"),
    "train is no boolean": (
        dialog(user("a"), answer("b", train="no")),
        "messages[1].train",
        "is 'no'",
        "true or false",
    ),
    "train on a question": (dialog(user("a", train=True), answer("b")), "messages[0].train", "only answers", "out of"),
    "misspelt train": (dialog(user("a"), answer("b", trian=False)), "messages[1].trian", "no key", "Rename it 'train'"),
    "nothing to learn": (dialog(user("a"), answer("b", train=False)), "messages", "nothing to learn", "Remove it"),
    "label of no boolean": (dialog(user("a"), answer("b"), is_safe="yes"), "is_safe", "is 'yes'", "without quotes"),
    "records inside": (
        '{"data": [{"x": 1}]}',
        "messages",
        "is missing; the record holds 'data'",
        "jq -c '.\"data\"[]'",
    ),
    "another kind": (pair(), "record", "is a preference by its keys", "file of preferences"),
}
BROKEN_PREFERENCES: dict[str, tuple[str, str, str, str]] = {
    "missing prompt": (pair(prompt=...), "prompt", "is missing", "Write"),
    "missing rejected": (pair(rejected=...), "rejected", "is missing", "Write"),
    "null chosen": (pair(chosen=None), "chosen", "is null", "Write"),
    "text as prompt": (pair(prompt="Hi"), "prompt", "is a string", "Write"),
    "answered prompt": (pair(prompt=[user("a"), answer("b")]), "prompt[1].role", "at the end", "Drop the last answer"),
    "tag in prompt": (pair(prompt=[user("<</SYS>>")]), "prompt[0].content", "<</SYS>>", "Take the tag out"),
    "text as answer": (pair(chosen="Hello!"), "chosen", "is a string", '"role": "assistant"'),
    "no answer": (pair(rejected=[]), "rejected", "is a list of 0 messages", '"role": "assistant"'),
    "whole dialog": (pair(chosen=[user("Hi"), answer("b")]), "chosen", "the prompt among them", "last message alone"),
    "other prompt": (pair(rejected=[user("Ho"), answer("b")]), "rejected", "do not start with 'prompt'", "alone"),
    "answer by user": (pair(chosen=[user("b")]), "chosen[0].role", "is 'user'", "Write 'assistant'"),
    "foreign role": (pair(chosen=[{"role": "gpt", "content": "b"}]), "chosen[0].role", "is 'gpt'", "Write 'assistant'"),
    "empty answer": (pair(rejected=[answer(" ")]), "rejected[0].content", "is empty", "Write the text"),
    "tag in answer": (pair(rejected=[answer("[INST]")]), "rejected[0].content", "'[INST]'", "Take the tag out"),
    "equal answers": (pair(rejected=[answer("Hello! ")]), "rejected", "same answer as 'chosen'", "Drop"),
    "wrong rating": (pair(rating="slightly better"), "rating", "is 'slightly better'", "Write 'slightly_better'"),
    "paper's rating": (pair(rating="Unsure"), "rating", "is 'Unsure'", "Write 'negligibly_better'"),
    "unlike rating": (pair(rating="xyz"), "rating", "is 'xyz'", "Write one of them"),
    "number as rating": (pair(rating=3), "rating", "is a number", "Write one of significantly_better"),
    "label of no boolean": (pair(chosen_is_safe=1), "chosen_is_safe", "is 1", "true or false"),
    "misspelt rating": (pair(ratting="better"), "ratting", "no key of a preference", "Rename it 'rating'"),
}
BROKEN_PROMPTS: dict[str, tuple[str, str, str, str]] = {
    "no message": (prompt([]), "prompt", "is empty", "Drop the record"),
    "ends with answer": (prompt([user("a"), answer("b")]), "prompt[1].role", "at the end", "Drop the last answer"),
    "mark of no boolean": (prompt([user("a")], is_safety="true"), "is_safety", "is 'true'", "without quotes"),
    "number as id": (prompt([user("a")], id=7), "id", "is a number", 'Write "7"'),
    "id that cannot be written": (prompt([user("a")], id="\ud800"), "id", "cannot be written out", "printable"),
}
CASES = [
    (good, broken)
    for good, cases in (
        (GOOD, BROKEN_DIALOGS),
        (pair(rating="better"), BROKEN_PREFERENCES),
        (prompt([user("Hi")]), BROKEN_PROMPTS),
    )
    for broken in cases.values()
]


def check(path: Path, lines: list[str], chat_format: ChatFormat) -> CheckReport:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="surrogatepass")
    return check_path(str(path), None, "auto", chat_format.forbidden)


@pytest.mark.parametrize(("good", "broken"), CASES)
def test_each_broken_line_is_named(
    good: str, broken: tuple[str, str, str, str], tmp_path: Path, tiny_format: ChatFormat
):
    line, field, reason, fix = broken
    report = check(tmp_path / "a.jsonl", [good, line, good], tiny_format)
    assert report.exit_status == 2
    assert {fault.line for fault in report.problems} == {2}
    (named,) = [fault for fault in report.problems if fault.field == field and reason in fault.reason]
    assert fix in named.fix
    assert f"a.jsonl:2: {field}: {named.reason} {named.fix}\n" in report.text()
    assert report.num_records == (3 if field == "record" else 2)


def test_several_faults_of_one_record_are_all_named(tmp_path: Path, tiny_format: ChatFormat):
    line = pair(prompt=[{"role": "human", "content": 3}, user(None)], chosen="x", rating="good", chosen_is_safe="y")
    report = check(tmp_path / "a.jsonl", [line], tiny_format)
    fields = ["prompt[0].role", "prompt[1].content", "chosen", "rating", "chosen_is_safe"]
    assert [fault.field for fault in report.problems] == fields


def test_a_sound_file_and_what_it_holds(tmp_path: Path, tiny_format: ChatFormat):
    lines = [
        dialog(system(""), user("12345"), answer("a </s> <s>"), is_safe=True),
        dialog(user("123"), answer("b"), user("1"), answer("c", train=False)),
        "",
    ]
    report = check(tmp_path / "a.jsonl", [line + "\r" if line else line for line in lines], tiny_format)
    assert (report.exit_status, report.kind, report.num_records, report.problems) == (0, "dialog", 2, [])
    assert report.turns == {2: 1, 4: 1}
    assert sorted(report.characters["user turn"]) == [1, 3, 5]
    assert "user turn, characters: median 3, 95% up to 3, from 1 to 5 (3 texts)" in report.text()
    assert report.labels == {"is_safe true": 1, "answers with train false": 1}
    assert "2 good dialogs, 0 bad lines, 0 repeated" in report.text()
    assert "turns: 2 in 1, 4 in 1" in report.text()


def test_what_other_kinds_hold(tmp_path: Path, tiny_format: ChatFormat):
    report = check(tmp_path / "a.jsonl", [pair(rating="better", rejected_is_safe=False)], tiny_format)
    assert (report.kind, report.turns) == ("preference", {1: 1})
    assert report.labels == {"rating better": 1, "rejected_is_safe false": 1}
    assert list(report.characters["chosen answer"]) == [len("Hello!")]
    report = check(tmp_path / "b.jsonl", [prompt([user("Hi")], is_safety=True, id="a")], tiny_format)
    assert (report.kind, report.labels) == ("prompt", {"is_safety true": 1, "with an id": 1})


def test_warnings_name_lines_and_leave_the_status(tmp_path: Path, tiny_format: ChatFormat):
    odd = dialog(user("a"), answer("b", name="x"), ratting="better")
    report = check(tmp_path / "a.jsonl", ["\ufeff" + GOOD, odd, GOOD, GOOD], tiny_format)
    assert report.exit_status == 0
    assert report.num_duplicates == 2
    assert [(warned.field, warned.lines) for warned in report.warnings] == [
        ("byte 1", [1]),
        ("ratting", [2]),
        ("messages[].name", [2]),
        ("record", [3, 4]),
    ]
    text = report.text()
    assert "a.jsonl:1: warning: byte 1: is a byte order mark" in text
    assert "nearest known key is 'rating' of a preference" in text
    assert "a.jsonl:3: warning: record: is the same as an earlier one" in text
    assert "(2 lines: 3, 4)" in text
    assert "2 repeated" in text


def test_a_warning_of_many_lines_is_short(tmp_path: Path, tiny_format: ChatFormat):
    lines = [dialog(user(f"q{index}"), answer("a"), colour="x") for index in range(50)]
    (warned,) = check(tmp_path / "a.jsonl", lines, tiny_format).warnings
    assert len(warned.lines) == 50
    assert "20 and 30 more)" in warned.at("a.jsonl")
    assert "'columns'" in warned.fix


def test_equal_problems_are_one_line_and_name_the_conversion_that_repairs_them(tmp_path: Path, tiny_format: ChatFormat):
    rows = [{"prompt": f"Question {index}?", "chosen": "Yes.", "rejected": "No."} for index in range(2000)]
    path = write(tmp_path / "a.jsonl", [*rows, {"prompt": "Open?", "chosen": "Yes."}])
    report = check_path(path, None, "auto", tiny_format.forbidden)
    assert (report.num_bad_lines, report.exit_status) == (2001, 2)
    lines = report.text().splitlines()
    folded = [line for line in lines if line.startswith(f"{path}:1: ")]
    assert [line.split(": ")[1] for line in folded] == ["prompt", "chosen", "rejected"]
    assert all("1, 2, 3" in line and "`llamachat data convert` does it" in line for line in folded)
    assert "2001 lines" in folded[0] and "2000 lines" in folded[2]
    # What no conversion can repair does not name it.
    (lacking,) = [line for line in lines if line.startswith(f"{path}:2001: ")]
    assert "rejected: is missing" in lacking and "convert" not in lacking
    assert len(lines) < 10
    command = next(line for line in lines if "llamachat data convert " in line and line.endswith(".jsonl"))
    assert command.endswith(f"{path} {tmp_path}/a.converted.jsonl")


def test_columns_with_other_names_are_read(tmp_path: Path, tiny_format: ChatFormat):
    path = write(tmp_path / "a.jsonl", [{"talk": [user("a"), answer("b")]}])
    forbidden = tiny_format.forbidden
    assert check_path(path, None, "auto", forbidden).exit_status == 2
    report = check_path(path, None, "auto", forbidden, columns={"messages": "talk"})
    assert (report.kind, report.num_records, report.exit_status) == ("dialog", 1, 0)
    report = check_path(path, None, "auto", forbidden, columns={"messages": "talks"})
    assert [fault.field for fault in report.problems if not fault.line] == ["file"]


def test_tokens_are_compared_with_the_limit(tmp_path: Path, tiny_format: ChatFormat):
    dialogs = [
        [Message("user", "a"), Message("assistant", "b")],
        [Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")],
        [Message("user", "word " * 40), Message("assistant", "b")],
    ]
    lengths = [len(tiny_format.encode_dialog(one, train_on=TrainOn.EVERY_ANSWER).input_ids) for one in dialogs]
    assert lengths[0] < lengths[1] < lengths[2]
    path = write(tmp_path / "a.jsonl", [{"messages": as_dicts(one)} for one in dialogs])
    limit = TokenLimit(tiny_format, lengths[1] - 1, 0, None)
    report = check_path(path, None, "auto", tiny_format.forbidden, limit=limit)
    assert (report.num_shortened, report.num_too_long, report.exit_status) == (1, 1, 0)
    assert f"tokens: median {lengths[1]}" in report.text()
    assert [warned.field for warned in report.warnings] == ["tokens"]
    exact = TokenLimit(tiny_format, lengths[2], 0, None)
    report = check_path(path, None, "auto", tiny_format.forbidden, limit=exact)
    assert (report.num_shortened, report.num_too_long, report.warnings) == (0, 0, [])


def test_the_kind_can_be_set(tmp_path: Path, tiny_format: ChatFormat):
    path = tmp_path / "a.jsonl"
    path.write_text(GOOD + "\n")
    report = check_path(str(path), "preference", "auto", tiny_format.forbidden)
    assert [fault.field for fault in report.problems] == ["prompt", "chosen", "rejected"]
    assert "It looks like a dialog" in report.problems[0].fix
    assert check_path(str(path), "prompt", "auto", tiny_format.forbidden).exit_status == 0


def test_a_file_that_is_no_data_file(tmp_path: Path, tiny_format: ChatFormat):
    report = check(tmp_path / "a.json", [f"[{GOOD},", f"{GOOD}]"], tiny_format)
    (fault,) = report.problems
    assert (fault.line, fault.field, report.exit_status) == (0, "file", 2)
    assert "is one JSON array" in report.text()


def test_keys_of_other_meanings_are_no_slips(tmp_path: Path, tiny_format: ChatFormat):
    lines = [dialog(user("a"), answer("b"), is_safety=True, messages_id="x"), dialog(user("c"), answer("d"))]
    report = check(tmp_path / "a.jsonl", lines, tiny_format)
    assert (report.num_records, report.problems) == (2, [])
    (marked, named) = report.warnings
    assert (marked.field, named.field) == ("is_safety", "messages_id")
    assert "It is a key of a prompt" in marked.fix and "rename" not in marked.fix + named.fix
    # A prompt's name does not stand for the prompt that is missing.
    report = check(tmp_path / "b.jsonl", [pair(prompt=..., prompt_id="x")], tiny_format)
    assert [(fault.field, "Rename" in fault.fix) for fault in report.problems] == [("prompt", False)]


def test_rows_of_a_known_set_without_a_record_are_counted(tmp_path: Path, tiny_format: ChatFormat):
    row = {"prompt": "q", "response_1": "a", "response_2": "b"}
    path = write(tmp_path / "a.jsonl", [{**row, "preference_strength": strength} for strength in (0, 2, 0)])
    report = check_path(path, None, "auto", tiny_format.forbidden)
    assert (report.num_records, report.num_bad_lines, report.num_empty, report.exit_status) == (1, 0, 2, 0)
    assert "without a record: 2" in report.text()
