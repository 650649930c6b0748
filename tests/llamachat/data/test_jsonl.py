"""Lines of JSON: what is a row, and the place, reason and mend of everything that is none."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamachat.data.files import decode_line, decode_lines, has_byte_order_mark, read_rows
from llamachat.data.problems import SHOWN, Problem, problem, reason_key, report
from llamachat.data.records import Row


def fault(raw: bytes) -> Problem:
    (found,) = decode_line(raw, 7).problems
    assert found.line == 7
    return found


@pytest.mark.parametrize(
    ("raw", "field", "reason"),
    [
        (b"hello", "column 1", "is not JSON (Expecting value)"),
        (b'{"a" 1}', "column 6", "is not JSON (Expecting ':' delimiter)"),
        (b'{"a": "b\x00c"}', "column 9", "is not JSON (Invalid control character)"),
        (b'{"a": "b', "column 9", "in the middle of a record"),
        (b'{"a": [1, 2', "column 12", "in the middle of a record"),
        (b'{"a": 1} {"a": 2}', "column 10", "follows a whole JSON value"),
        (b'\xef\xbb\xbf{"a": 1}', "column 1", "byte order mark inside the file"),
        (b'{"a": "caf\xe9"}', "byte 11", "is 0xe9, which is not UTF-8"),
        (b'{"NaN": "NaN", "a": NaN}', "column 21", "holds NaN"),
        (b'{"a": -Infinity}', "column 7", "holds -Infinity"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a'", "named twice"),
        (b'{"x": {"b": 1, "b": 1}}', "'b'", "named twice"),
        (b"[" * 100_000, "line", "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line", "thousands of digits"),
    ],
)
def test_a_bad_line_is_told_with_its_place(raw: bytes, field: str, reason: str):
    found = fault(raw)
    assert found.field == field
    assert reason in found.reason
    assert found.fix


def test_line_ends_and_the_mark_at_the_start_are_no_fault(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n{"a": 3}\n\n  \n')
    assert list(read_rows(str(path))) == [Row(1, {"a": 1}), Row(2, {"a": 2}), Row(3, {"a": 3})]
    assert has_byte_order_mark(path)


def test_blank_lines_between_records_are_named():
    found = list(decode_lines([b"\n", b"1\n", b" \r\n", b"\n", b"2\n", b"\n"]))
    assert [(row.line, row.value) for row in found] == [(1, None), (2, 1), (3, None), (4, None), (5, 2)]
    assert ["is blank" in fault.reason for row in found for fault in row.problems] == [True] * 3


def test_gzip_is_read_and_where_it_breaks_off_is_told(tmp_path: Path):
    lines = b"".join(b'{"a": "%032x"}\n' % (i * 2654435761 % 2**32) for i in range(5000))
    whole = gzip.compress(lines)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(whole)
    assert len(list(read_rows(str(path)))) == 5000
    path.write_bytes(whole[: len(whole) // 2])
    *rows, last = read_rows(str(path))
    assert not any(row.problems for row in rows)
    assert (last.problems[0].field, last.line) == ("file", len(rows) + 1)
    assert "ends in the middle" in last.problems[0].reason
    path.write_bytes(whole[:-8] + b"\0" * 8)
    *_, last = read_rows(str(path))
    assert "is damaged" in last.problems[0].reason


@given(st.lists(st.one_of(st.binary(max_size=20), st.text(max_size=20).map(str.encode)), max_size=8))
def test_every_line_is_a_row_or_a_problem_with_its_number(lines: list[bytes]):
    found = list(decode_lines(lines))
    numbers = [row.line for row in found]
    last_full = max((number for number, raw in enumerate(lines, 1) if raw.strip()), default=0)
    if lines[:1] == [b"\xef\xbb\xbf"]:
        return
    assert numbers == list(range(1, last_full + 1))
    assert all(fault.at("f").isprintable() for row in found for fault in row.problems)


def test_report_prints_fifty_and_counts_the_rest():
    faults = [problem(line, "messages", "is empty.", "Drop it.") for line in range(1, SHOWN + 4)]
    lines = report(faults, "a.jsonl").splitlines()
    assert lines[0] == "a.jsonl:1: messages: is empty. Drop it."
    assert len(lines) == SHOWN + 1
    assert lines[-1].startswith("and 3 more")


def test_report_gives_the_command_that_converts():
    fault = problem(3, "messages[0].role", "is 'gpt'.", "Write 'assistant' (`llamachat data convert` does it).")
    assert (
        report([fault], "d/a.jsonl.gz")
        .splitlines()[-1]
        .endswith("llamachat data convert d/a.jsonl.gz d/a.converted.jsonl")
    )


def test_equal_faults_of_other_places_are_one_reason():
    one = problem(3, "messages[2].content", "holds '[INST]' at character 17.", "Take it out.")
    other = problem(9, "messages[0].content", "holds '[INST]' at character 4.", "Take it out.")
    assert reason_key(one) == reason_key(other) == "messages[].content: holds '[INST]' at character N."
    assert reason_key(problem(1, "column 8", "is not JSON.", "")) == "JSON: is not JSON."


def test_what_a_file_holds_cannot_steer_the_terminal_nor_flood_it():
    found = problem(1, "k\x1b[2J\ud800", "is " + "x" * 9999, "Drop it.")
    assert found.field == "k\\x1b[2J\\ud800"
    assert len(found.reason) < 500
