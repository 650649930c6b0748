"""Files as a whole: what is read, and what is refused with the way out."""

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest

from llamachat.config.paths import HubSet, hub_set
from llamachat.data.files import read_rows
from llamachat.data.problems import Problem
from llamachat.data.records import Row

ROWS = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def parquet(rows: list[dict[str, object]], path: Path) -> bytes:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path.read_bytes()


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


def whole_problem(path: str) -> Problem:
    (found,) = read_rows(path)
    (fault,) = found.problems
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
    ("name", "content", "reason", "mend"),
    [
        ("a.jsonl", b"", "is empty", "Write or fetch it again"),
        ("a.jsonl", b"\n \n", "blank lines only", "Write or fetch it again"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "is empty inside", "Write or fetch it again"),
        ("a.jsonl", gzip.compress(LINES, mtime=0), "is gzip", "Rename it to a.jsonl.gz"),
        ("a.jsonl.gz", LINES, "is text, but its name says gzip", "Rename it to a.jsonl"),
        ("a.parquet", LINES, "is text, but its name says parquet", "Rename it to a.jsonl"),
        ("a.jsonl", LINES.decode().encode("utf-16"), "UTF-16", "UTF-8"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdabc", "is zstd", "Unpack it"),
        ("a.csv", b"prompt,answer\nhi,hello\n", "is a table (CSV)", "read_csv"),
        ("a.jsonl", b"prompt,answer\nhi,hello\n", "is a table (CSV)", "read_csv"),
        ("a.json", b'[{"a": 1}, {"a": 2}]', "is one JSON array", "a.json"),
        ("a.json", b'[\n {"a": 1},\n {"a": 2}\n]\n', "is one JSON array", "llamachat data convert"),
        ("a.jsonl", b'[{"a": 1},\n{"a": 2}]', "is one JSON array", "a.converted.jsonl"),
        ("a.jsonl", b'{\n "a": 1\n}\n{\n "a": 2\n}\n', "spread over several lines", "jq -c ."),
        (
            "b.json.gz",
            gzip.compress(b"[\n" + b'{"a": 1},\n' * 9999 + b"{}]\n", mtime=0),
            "is one JSON array",
            "b.converted.jsonl",
        ),
    ],
)
def test_a_file_that_is_something_else(name: str, content: bytes, reason: str, mend: str, tmp_path: Path):
    found = whole_problem(write(tmp_path / name, content))
    assert reason in found.reason
    assert mend in found.fix


def test_parquet_under_the_name_of_lines(tmp_path: Path):
    content = parquet([{"a": 1}], tmp_path / "a.parquet")
    found = whole_problem(write(tmp_path / "b.jsonl", content))
    assert "is parquet" in found.reason
    assert "Rename it to b.parquet" in found.fix


@pytest.mark.parametrize("first", [b"[1, 2]", b'["a', b"a, b, c", b"{", b"[]"])
@pytest.mark.parametrize("copies", [1, 5000])
def test_one_odd_line_does_not_hide_the_others(first: bytes, copies: int, tmp_path: Path):
    found = list(read_rows(write(tmp_path / "a.jsonl", first + b"\n" + LINES * copies + b"[3]\n")))
    assert [row.line for row in found] == list(range(1, 2 * copies + 3))
    assert [found[1], found[2], found[-1]] == [Row(2, ROWS[0]), Row(3, ROWS[1]), Row(2 * copies + 2, [3])]


def test_a_folder_and_a_missing_file(tmp_path: Path):
    write(tmp_path / "chats.jsonl", LINES)
    assert "is a folder" in whole_problem(str(tmp_path)).reason
    assert "chats.jsonl" in whole_problem(str(tmp_path)).fix
    (tmp_path / "empty").mkdir()
    assert "it holds no .jsonl" in whole_problem(str(tmp_path / "empty")).fix
    assert "Did you mean" in whole_problem(str(tmp_path / "chatz.jsonl")).fix
    assert "does not exist" in whole_problem(str(tmp_path / "no" / "where.jsonl")).reason


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
        ("owner/name.jsonl", None),
        ("a/b/c.jsonl", None),
        ("a/b/c/d", None),
        ("./owner/name", None),
        ("name", None),
    ],
)
def test_hub_names(path: str, expected: HubSet | None):
    assert hub_set(path) == expected


def test_the_hub_is_asked_for_the_named_part(monkeypatch: pytest.MonkeyPatch):
    asked = []
    fake = ModuleType("datasets")

    def load_dataset(*args: object, **options: object) -> list[dict[str, object]]:
        asked.append((args, options))
        return [{"a": 1, "b": None}]

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]  # a stand-in for the library
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert list(read_rows("owner/name/config:test")) == [Row(1, {"a": 1})]
    assert asked == [(("owner/name", "config"), {"split": "test"})]


def test_without_the_hub_the_error_says_so(monkeypatch: pytest.MonkeyPatch):
    fake = ModuleType("datasets")

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nmore")

    fake.load_dataset = load_dataset  # type: ignore[attr-defined]  # a stand-in for the library
    monkeypatch.setitem(sys.modules, "datasets", fake)
    found = whole_problem("owner/name")
    assert "ConnectionError: Couldn't reach 'owner/name' on the Hub)" in found.reason
    assert "Write the path of a file" in found.fix
