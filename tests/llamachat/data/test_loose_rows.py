"""Files to convert: forms that are unrolled and cleaned while they are read, faults that stop it, places of the output."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

import llamachat.data.convert.rows
from llamachat.chat_format import ChatFormat
from llamachat.data.convert.command import convert_path
from llamachat.data.convert.turns import Repair
from llamachat.errors import DataError, UsageError
from tests.llamachat.data.converting import Bench
from tests.llamachat.data.lines import GOOD, dialog, shared, turns

AB = {"messages": turns("a", "b")}


@pytest.fixture
def bench(tmp_path: Path, tiny_format: ChatFormat) -> Bench:
    return Bench(tmp_path, tiny_format)


def test_forms_of_files_give_the_same_records(bench: Bench):
    rows = [{"messages": turns(f"q{index}", "caf\u00e9 " * index)} for index in range(1, 40)]
    lines = [json.dumps(row) for row in rows]
    forms = {
        "a.jsonl": "\ufeff" + "\r\n\r\n".join(lines) + "\n\n",
        "b.jsonl.gz": gzip.compress("\n".join(lines).encode()),
        "c.json": json.dumps(rows),
        "d.json": json.dumps(rows, indent=2),
        "e.json.gz": gzip.compress("\ufeff".encode() + json.dumps(rows, indent=1, ensure_ascii=False).encode()),
        "f.jsonl": " ".join(lines[:20]) + "\n" + ", ".join(lines[20:]) + ",\n",
        "g.jsonl": json.dumps(rows[:20]) + "\n" + json.dumps(rows[20:]) + "\n",
        "h.jsonl": "\n".join(f"{line}," for line in lines),
    }
    for name, content in forms.items():
        report, written = bench.convert(content, name=name)
        assert written == rows, name
        assert report.untouched == 39
    assert bench.convert(forms["a.jsonl"])[0].times == {Repair.BYTE_ORDER_MARK: 1, Repair.BLANK_LINE: 39}
    assert bench.convert(forms["d.json"], name="d.json")[0].times == {Repair.ARRAY: 1}
    assert bench.convert(forms["f.jsonl"])[0].times == {Repair.SEVERAL: 2}
    assert bench.convert(forms["h.jsonl"])[0].times == {Repair.COMMA: 39}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), bench.folder / "i.parquet")
    report = convert_path(str(bench.folder / "i.parquet"), bench.folder / "i.jsonl", forbidden=bench.forbidden)
    assert bench.checked(bench.folder / "i.jsonl", report) == rows


@pytest.mark.parametrize("part", [1, 2, 7, 64])
def test_an_array_is_read_in_parts_as_it_is_in_one(part: int, bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llamachat.data.convert.rows, "_PART", part)
    values = [1, {"messages": turns('a ] [ , \\ "', "b")}, [], "x,]", -1.5e3, {"messages": turns("c", "d" * 99)}, None]
    for indent in (None, 3):
        report, written = bench.convert(json.dumps(values, indent=indent), name="in.json")
        assert written == [values[1], values[5]]
        assert [found.line for found in report.problems] == [1, 3, 4, 5, 7]


def test_an_array_of_turns_is_one_dialog(bench: Bench):
    _, written = bench.convert(json.dumps(turns("a", "b"), indent=1), name="in.json")
    assert written == [AB]


def test_repeats_are_dropped(bench: Bench):
    lines = [GOOD, shared(("human", "Hi"), ("gpt", "Hello!")), GOOD, dialog(*turns("a", "b"))]
    report, written = bench.convert("\n".join(lines))
    assert written == [json.loads(GOOD), AB]
    assert (report.written, report.untouched, report.repeated) == (2, 2, 2)
    assert "  repeats a record before it        2" in report.text()


def test_equal_files_give_equal_bytes(bench: Bench):
    for name in ("x.jsonl", "x.jsonl.gz"):
        bench.convert(GOOD, out=name)
        first = (bench.folder / name).read_bytes()
        bench.convert(GOOD, out=name)
        assert (bench.folder / name).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"a,b\n1,2\n", "is a table"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99, mtime=0)[:-20], "cannot be read from here on"),
        ("a.parquet", b"PAR1 and no more", "damaged parquet"),
        ("a.json", b'[{"a": 1},\n' + b'{"messages": []},\n' * 9000 + b"{]", "after record 9001 of the array"),
        ("a.json", b'[{"a": 1},\n' + b'{"messages": []},\n' * 9000 + b"{}] []", "stands after the array"),
        ("a.json", b'[{"a": 1},\n' + b'{"b": "\n' * 9000 + b"]", "after record 1 of the array"),
    ],
)
def test_a_fault_of_the_whole_file_stops_it(name: str, content: bytes, reason: str, bench: Bench):
    with pytest.raises(DataError, match=reason):
        bench.convert(content, name=name)
    assert [path.name for path in bench.folder.iterdir()] == [name]


def test_where_nothing_is_written_to(bench: Bench):
    source = bench.folder / "in.jsonl"
    source.write_text(GOOD + "\n")
    (bench.folder / "other.jsonl").symlink_to(source)
    (bench.folder / "old.jsonl").write_text("old")
    (bench.folder / "folder.jsonl").mkdir()
    for name, reason, overwrite in (
        ("in.jsonl", "is the input itself", True),
        ("other.jsonl", "is the input itself", True),
        ("old.jsonl", "exists already. .*--overwrite", False),
        ("folder.jsonl", "is a folder", True),
        ("out.parquet", "End it with .jsonl or .jsonl.gz", False),
        ("none/out.jsonl", "cannot be written .*No such file", False),
    ):
        with pytest.raises(UsageError, match=reason):
            convert_path(str(source), bench.folder / name, forbidden=bench.forbidden, overwrite=overwrite)
    assert source.read_text() == GOOD + "\n" and (bench.folder / "old.jsonl").read_text() == "old"
    convert_path(str(source), bench.folder / "old.jsonl", forbidden=bench.forbidden, overwrite=True)
    assert json.loads((bench.folder / "old.jsonl").read_text()) == json.loads(GOOD)
