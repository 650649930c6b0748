"""Files as a whole, their lines, and the place, reason and fix of everything that is no row."""

import gzip
import io
import json
import struct
import sys
import tarfile
import tracemalloc
from decimal import Decimal
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamachat.chat_format import ChatFormat
from llamachat.config.sections import HubSet, hub_set
from llamachat.data import files
from llamachat.data.check import check_path
from llamachat.data.convert import command
from llamachat.data.convert.command import convert_path
from llamachat.data.files import decode_line, decode_lines, has_byte_order_mark, read_rows
from llamachat.data.problems import SHOWN, Problem, problem, reason_key, report
from llamachat.data.records import Row
from llamachat.data.tokens import write_tokens
from llamachat.errors import DataError
from llamachat.runs.hub_commits import commits_in

BASE = Path(__file__).parents[3] / "assets" / "base"
ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("a.jsonl")
        entry.size = len(LINES)
        archive.addfile(entry, io.BytesIO(LINES))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"


def parquet(rows: list[dict[str, object]], path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def whole_problem(path: str) -> Problem:
    (row,) = read_rows(path)
    (fault,) = row.problems
    assert (fault.line, fault.field) == (0, "file")
    return fault


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.ndjson", "a", "a.jsonl.gz"])
def test_json_lines_under_any_such_name(name: str, tmp_path: Path):
    content = gzip.compress(LINES, mtime=0) if name.endswith(".gz") else LINES
    assert list(read_rows(write(tmp_path / name, content))) == [Row(1, ROWS[0]), Row(2, ROWS[1])]


def test_parquet_counts_rows_and_leaves_nulls_out(tmp_path: Path):
    path = tmp_path / "a.parquet"
    parquet([{"m": [{"c": "x", "t": None}], "r": None}, {"m": [{"c": "y", "t": True}], "r": "z"}], path)
    assert list(read_rows(str(path))) == [
        Row(1, {"m": [{"c": "x"}]}),
        Row(2, {"m": [{"c": "y", "t": True}], "r": "z"}),
    ]


def test_damaged_and_empty_parquet(tmp_path: Path):
    path = tmp_path / "a.parquet"
    whole = parquet([{"a": index} for index in range(5000)], path)
    (cut,) = read_rows(write(path, whole[: len(whole) // 2]))
    assert cut.problems[0].field == "file"
    assert "damaged parquet" in cut.problems[0].reason
    pyarrow.parquet.write_table(pyarrow.table({"a": pyarrow.array([], pyarrow.int64())}), path)
    assert "holds no row" in whole_problem(str(path)).reason


@pytest.mark.parametrize(
    ("name", "content", "reason", "fix"),
    [
        ("a.jsonl", b"", "is empty", "Write or fetch it again"),
        ("a.jsonl", b"\n \n", "blank lines only", "Write or fetch it again"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty inside", "Write or fetch it again"),
        ("a.jsonl", gzip.compress(LINES, mtime=0), "is gzip", "Rename it to a.jsonl.gz"),
        ("a.jsonl.gz", LINES, "is text, but its name says gzip", "Rename it to a.jsonl"),
        ("a.parquet", LINES, "is text, but its name says parquet", "Rename it to a.jsonl"),
        ("a.jsonl", b"PAR1 and more", "is parquet", "Rename it to a.parquet"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "is text in UTF-16", "UTF-8"),
        ("a.jsonl", LINES.decode().encode("utf-16-be"), "binary, or text in UTF-16", "UTF-8"),
        ("a.jsonl", LINES.decode().encode("utf-32"), "is text in UTF-32", "UTF-8"),
        ("a.jsonl", b"\0" * 4096, "is binary", "JSON Lines"),
        ("a.jsonl", b"\x7fELF\0\0,\n,", "is binary", "JSON Lines"),
        ("a.jsonl.gz", tarred(), "is a tar archive inside", "Unpack it"),
        ("a.jsonl.gz", gzip.compress(b"PAR1 and more", mtime=0), "is parquet inside", ".parquet"),
        ("a.tar", gzip.decompress(tarred()), "is a tar archive", "Unpack it"),
        ("a.jsonl", LFS, "pointer of Git LFS", "git lfs pull"),
        ("a.parquet", LFS, "pointer of Git LFS", "git lfs pull"),
        ("a.json", json.dumps({"n": 2, "data": ROWS}, indent=1).encode(), "over several lines", "'.\"data\"[]'"),
        ("a.json", json.dumps({"messages": []}, indent=1).encode(), "over several lines", "jq -c '.' "),
        ("a.json", json.dumps({"n": [2], "data": ROWS * 9999}, indent=1).encode(), "over several", "'.\"data\"[]'"),
        ("a.json", json.dumps({"turns": [{"from": "a"}] * 9999}, indent=1).encode(), "over several", "jq -c '.' "),
        ("a.json", json.dumps({"tools": ROWS, "messages": []}, indent=1).encode(), "over several", "jq -c '.' "),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdabc", "is zstd", "Unpack it"),
        ("a.csv", b"prompt,answer\nhi,hello\n", "is a table (CSV)", "read_csv"),
        ("a.jsonl", b"prompt,answer\nhi,hello\n", "is a table (CSV)", "read_csv"),
        ("a.json", b'[{"a": 1}, {"a": 2}]', "is one JSON array", "a.json"),
        ("a.json", b'[\n {"a": 1},\n {"a": 2}\n]\n', "is one JSON array", "llamachat data convert"),
        ("a.jsonl", b'[{"a": 1},\n{"a": 2}]', "is one JSON array", "a.converted.jsonl"),
        ("a.jsonl", b'{\n "a": 1\n}\n{\n "a": 2\n}\n', "spread over several lines", "jq -c '.' "),
        (
            "b.json.gz",
            gzip.compress(b"[\n" + b'{"a": 1},\n' * 9999 + b"{}]\n", mtime=0),
            "is one JSON array",
            "b.converted.jsonl",
        ),
    ],
)
def test_a_file_that_is_something_else(name: str, content: bytes, reason: str, fix: str, tmp_path: Path):
    fault = whole_problem(write(tmp_path / name, content))
    assert reason in fault.reason
    assert fix in fault.fix


@pytest.mark.parametrize("first", [b"[1, 2]", b'["a', b"a, b, c", b"{", b"[]"])
@pytest.mark.parametrize("copies", [1, 5000])
def test_one_odd_line_does_not_hide_the_others(first: bytes, copies: int, tmp_path: Path):
    rows = list(read_rows(write(tmp_path / "a.jsonl", first + b"\n" + LINES * copies + b"[3]\n")))
    assert [row.line for row in rows] == list(range(1, 2 * copies + 3))
    assert [rows[1], rows[2], rows[-1]] == [Row(2, ROWS[0]), Row(3, ROWS[1]), Row(2 * copies + 2, [3])]


def test_a_folder_and_a_missing_file(tmp_path: Path):
    write(tmp_path / "chats.jsonl", LINES)
    assert "is a folder" in whole_problem(str(tmp_path)).reason
    assert "chats.jsonl" in whole_problem(str(tmp_path)).fix
    (tmp_path / "empty").mkdir()
    assert "it holds no .jsonl" in whole_problem(str(tmp_path / "empty")).fix
    assert "Did you mean" in whole_problem(str(tmp_path / "chatz.jsonl")).fix
    assert "does not exist" in whole_problem(str(tmp_path / "no" / "where.jsonl")).reason


def test_a_link_that_leads_nowhere(tmp_path: Path):
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "disk" / "a.jsonl")
    assert f"is a link to '{tmp_path}/disk/a.jsonl'" in whole_problem(str(tmp_path / "a.jsonl")).reason


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "a.jsonl", LINES)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    assert "cannot be read (Permission denied)" in whole_problem(path).reason


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("owner/name", HubSet("owner/name", None, "train")),
        ("owner/name:test", HubSet("owner/name", None, "test")),
        ("owner/name/config:train[:10]", HubSet("owner/name", "config", "train[:10]")),
        ("owner/name:train_sft", HubSet("owner/name", None, "train_sft")),
        ("owner/name/part", HubSet("owner/name", "part", "train")),
        ("owner/name@v1", HubSet("owner/name", None, "train", "v1")),
        ("owner/name/config:test@refs/pr/1", HubSet("owner/name", "config", "test", "refs/pr/1")),
        ("owner/name@", None),
        ("owner/name.jsonl", None),
        ("a/b/c.jsonl", None),
        ("a/b/c/d", None),
        ("./owner/name", None),
        ("name", None),
        ("pairs/x", None),  # a slip after the name of a file
    ],
)
def test_hub_names(path: str, expected: HubSet | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "pairs").touch()
    monkeypatch.chdir(tmp_path)
    assert hub_set(path) == expected


def hub_that(monkeypatch: pytest.MonkeyPatch, load_dataset: Any) -> None:
    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]  # a stand-in for the library
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_the_named_part_is_read_from_the_hub(monkeypatch: pytest.MonkeyPatch):
    calls: list[object] = []
    hub_that(monkeypatch, lambda *names, **options: calls.append((names, options)) or [{"a": 1, "b": None}])
    assert list(read_rows("owner/name/config:test")) == [Row(1, {"a": 1})]
    assert calls == [(("owner/name", "config"), {"split": "test", "revision": None})]


def test_the_commit_that_was_read_is_noted(monkeypatch: pytest.MonkeyPatch):
    commit = "0123456789abcdef0123456789abcdef01234567"

    class Rows(list[Any]):
        info = SimpleNamespace(download_checksums={f"hf://datasets/owner/name@{commit}/a.parquet": {}})

    calls: list[Any] = []
    hub_that(monkeypatch, lambda *names, **options: calls.append(options) or Rows([{"a": 1}]))
    list(read_rows("owner/name:test@v1"))
    assert calls == [{"split": "test", "revision": "v1"}]
    assert commits_in({"data": [{"path": "owner/name:test@v1"}]}) == {"owner/name:test@v1": commit}


def test_without_the_hub_the_error_says_so(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore")

    hub_that(monkeypatch, refuse)
    assert "ConnectionError: Couldn't reach 'owner/name' on the Hub)" in whole_problem("owner/name").reason


# -- lines


@pytest.mark.parametrize(
    ("raw", "field", "reason"),
    [
        (b'{"a" 1}', "column 6", "is not JSON (Expecting ':' delimiter)"),
        (b'{"a": "b\x00c"}', "column 9", "is not JSON (Invalid control character)"),
        (b'{"a": [1, 2', "column 12", "in the middle of a record"),
        (b'\xef\xbb\xbf{"a": 1}', "column 1", "byte order mark inside the file"),
        (b'{"a": "caf\xe9"}', "byte 11", "is 0xe9, which is not UTF-8"),
        (b'{"NaN": "NaN", "a": NaN}', "column 21", "holds NaN"),
        (b'{"x": {"b": 1, "b": 1}}', "'b'", "named twice"),
        (b"[" * 100_000, "line", "nested too deep"),
        (b'{"role": ' + b"[" * 400 + b"]" * 400 + b"}", "line", "nested too deep"),
        (b'{"a": ' + b"9" * 5000 + b"}", "line", "thousands of digits"),
    ],
)
def test_a_bad_line_is_reported_with_its_place(raw: bytes, field: str, reason: str):
    (fault,) = decode_line(raw, 7).problems
    assert (fault.line, fault.field, reason in fault.reason, bool(fault.fix)) == (7, field, True, True)


def test_line_ends_and_the_mark_at_the_start_are_no_fault(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n{"a": 3}\n\n  \n')
    assert list(read_rows(str(path))) == [Row(1, {"a": 1}), Row(2, {"a": 2}), Row(3, {"a": 3})]
    assert has_byte_order_mark(path)


def test_blank_lines_between_records_are_named():
    rows = list(decode_lines([b"\n", b"1\n", b" \r\n", b"\n", b"2\n", b"\n"]))
    assert [(row.line, row.value) for row in rows] == [(1, None), (2, 1), (3, None), (4, None), (5, 2)]
    assert ["is blank" in fault.reason for row in rows for fault in row.problems] == [True] * 3


def test_gzip_is_read_and_a_truncated_file_is_reported(tmp_path: Path):
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
    rows = list(decode_lines(lines))
    numbers = [row.line for row in rows]
    last_full = max((number for number, raw in enumerate(lines, 1) if raw.strip()), default=0)
    if lines[:1] == [b"\xef\xbb\xbf"]:
        return
    assert numbers == list(range(1, last_full + 1))
    assert all(fault.at("f").isprintable() for row in rows for fault in row.problems)


# -- problems


@pytest.mark.parametrize("filler", [b" ", b"\0", b"x", b'{"a": "', b"[1]" + 2000 * b" "])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_line_without_end_takes_bounded_memory(
    name: str, filler: bytes, tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MiB in a line, which gzip makes 64 KiB of; read under a limit of 100 kB."""
    monkeypatch.setattr(files, "LONGEST_LINE", 100_000)
    row = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}).encode()
    content = b"\n".join([row, filler + (1 << 26) * filler[-1:], row.replace(b"q", b"r"), b""])
    path, out = tmp_path / name, tmp_path / "out.jsonl"
    path.write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    del content
    tracemalloc.start()
    try:
        rows = list(read_rows(str(path)))
        report = convert_path(str(path), out, kind="dialog", format="auto", forbidden=(), overwrite=False)
        with pytest.raises(DataError, match=r":2: .*is longer than"):
            write_tokens(BASE, path, tmp_path / "ids.jsonl")
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
    assert [len(one.problems) for one in rows] == [0, 1, 0] and rows[1].problems[0].line == 2
    assert "is longer than" in rows[1].problems[0].reason
    assert out.read_text().count("\n") == 2 and ":2: line: is longer than" in report.dropped() + report.text()


def test_an_array_of_any_size_takes_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "LARGEST_ARRAY", 1000)
    for count, is_read in ((10, True), (1000, False)):
        path = tmp_path / f"{count}.json.gz"
        path.write_bytes(gzip.compress(json.dumps([{"prompt": f"q {n}"} for n in range(count)]).encode()))
        options: dict[str, Any] = {"kind": "prompt", "format": "auto", "forbidden": (), "overwrite": False}
        if is_read:
            convert_path(str(path), tmp_path / f"{count}.jsonl", **options)
            continue
        with pytest.raises(DataError, match=r"is an array of more than .*jq -c"):
            convert_path(str(path), tmp_path / f"{count}.jsonl", **options)


def test_report_folds_equal_problems_and_prints_fifty_kinds():
    faults = [problem(line, f"key{line}", "is empty.", "Drop it.") for line in range(1, SHOWN + 4)]
    lines = report(faults, "a.jsonl").splitlines()
    assert lines[0] == "a.jsonl:1: key1: is empty. Drop it."
    assert len(lines) == SHOWN + 1
    assert lines[-1].startswith("and 3 more")
    equal = [problem(line, f"messages[{line}]", "is empty.", "Drop it.") for line in (3, 4, 4, 9)]
    assert report(equal, "a.jsonl") == "a.jsonl:3: messages[3]: is empty. Drop it. (3 lines: 3, 4, 9)"


def test_report_gives_the_command_that_converts():
    fault = problem(3, "messages[0].role", "is 'gpt'.", "Write 'assistant' (`llamachat data convert` does it).")
    assert report([fault], "d/a.jsonl.gz").endswith("llamachat data convert d/a.jsonl.gz d/a.converted.jsonl")


def test_equal_faults_of_other_places_are_one_reason():
    one = problem(3, "messages[2].content", "holds '[INST]' at character 17.", "Take it out.")
    other = problem(9, "messages[0].content", "holds '[INST]' at character 4.", "Take it out.")
    assert reason_key(one) == reason_key(other) == "messages[].content: holds '[INST]' at character N."
    assert reason_key(problem(1, "column 8", "is not JSON.", "")) == "JSON: is not JSON."


def test_what_a_file_holds_cannot_steer_the_terminal_nor_flood_it():
    fault = problem(1, "k\x1b[2J\ud800", "is " + "x" * 9999, "Drop it.")
    assert fault.field == "k\\x1b[2J\\ud800"
    assert len(fault.reason) < 500


# -- what parquet holds that JSON Lines cannot


def test_values_that_python_has_no_type_for_do_not_end_the_reading(tmp_path: Path):
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(struct.pack("<3i", 0, 4, 9)), pyarrow.py_buffer(b"goodhe\xfflo")]
    )
    columns = {
        "text": text,
        "turns": pyarrow.StructArray.from_arrays([text, text], names=["role", "content"]),
        "late": pyarrow.array([2**62, 0], pyarrow.timestamp("us")),
        "lasts": pyarrow.array([10**18, 0], pyarrow.duration("s")),
        "zone": pyarrow.array([10**6, 0], pyarrow.timestamp("ms", tz="Mars/Phobos")),
        "day": pyarrow.array([0, None], pyarrow.date32()),
        "price": pyarrow.array([Decimal("1.5"), None]),
        "bytes": pyarrow.array([b"text", b"\xff\x00"]),
        "grade": pyarrow.array([float("nan"), 0.5]),
        "future": pyarrow.array([2**31 - 1, 0], pyarrow.date32()),
        "large": text.cast(pyarrow.large_string(), safe=False),
        "fixed": pyarrow.FixedSizeListArray.from_arrays(text, 1),
        "pairs": pyarrow.MapArray.from_arrays([0, 1, 2], ["k", "l"], text),
    }
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    first, second = (row.value for row in read_rows(str(path)))
    assert first["text"] == "good" and second["text"] == second["turns"]["content"] == b"he\xfflo"
    assert (first["late"], first["lasts"], first["zone"]) == (2**62, 10**18, 10**6), "the raw numbers inside"
    assert first["future"] == 2**31 - 1 and second["future"] == "1970-01-01" and second["large"] == b"he\xfflo"
    assert second["fixed"] == [b"he\xfflo"] and second["pairs"] == [{"key": "l", "value": b"he\xfflo"}]
    assert (first["day"], first["price"], first["bytes"]) == ("1970-01-01", "1.5", "text")
    assert "grade" not in first and second["grade"] == 0.5 and second["bytes"] == b"\xff\x00"


def test_text_that_is_not_utf8_is_a_fault_of_its_row_and_column(tmp_path: Path, tiny_format: ChatFormat):
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(struct.pack("<3i", 0, 4, 9)), pyarrow.py_buffer(b"goodhe\xfflo")]
    )
    path, out = tmp_path / "a.parquet", tmp_path / "out.jsonl"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": text, "completion": ["a", "b"]}), path)
    report = convert_path(str(path), out, forbidden=tiny_format.forbidden)
    assert report.written == 1
    (fault,) = report.problems
    assert (fault.line, fault.field) == (2, "prompt") and "bytes that are not UTF-8 text" in fault.reason
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "completion": ["a", "b"], "source": text}), path)
    assert convert_path(str(path), out, forbidden=tiny_format.forbidden, overwrite=True).written == 2, "nobody reads it"


def test_the_name_of_a_column_that_is_not_utf8_is_a_fault_of_the_file(tmp_path: Path):
    raw = parquet([{"columnname": "a"}], tmp_path / "a.parquet")
    # Of equal length, so that nothing but the names changes.
    path = write(tmp_path / "a.parquet", raw.replace(b"columnname", b"column\xffame"))
    rows = list(read_rows(path))
    assert [fault.field for row in rows for fault in row.problems][:1] in (["file"], [])


def test_two_columns_of_one_name(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([["a"], ["b"]], names=["x", "x"]), path)
    assert "several columns named 'x'" in whole_problem(str(path)).reason


def test_the_name_of_a_key_cannot_flood_the_terminal(tmp_path: Path, tiny_format: ChatFormat):
    path, out = tmp_path / "a.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"messages": [], "k" * 100_000: 1}) + "\n" + json.dumps({"m" * 100_000: 1}) + "\n")
    assert len(check_path(str(path), None, "auto", tiny_format.forbidden).text()) < 2000
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in ({**good, "k" * 100_000: 1}, {"m" * 100_000: 1})))
    report = convert_path(str(path), out, forbidden=tiny_format.forbidden)
    assert len(report.dropped() + report.text()) < 2000
