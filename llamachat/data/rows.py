"""The raw rows of a data file or a hub data set, whatever holds them: JSON Lines (plain, gzip), parquet, the hub.

What a file is, is read off its first bytes as well as its name, and a file whose name says otherwise is refused: read
as lines, a parquet file or an array would give one odd problem a line and hide the one that matters.
"""

import gzip
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llamachat.config.paths import HubSet, hub_set, near_path
from llamachat.data.jsonl import BYTE_ORDER_MARK, Row, decode_line, read_jsonl
from llamachat.data.problems import Problem, converted_path, problem

_FORMS = "a data file is JSON Lines (.jsonl, .jsonl.gz) or parquet (.parquet)"
_MAGIC = (
    (b"PAR1", "parquet"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "a zip archive (or a spreadsheet)"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
)
_TABLES = (".csv", ".tsv")
_HEAD = 1 << 16


def read_rows(path: str) -> Iterator[Row | Problem]:
    """Every row in order, as itself or as the reason why it is none. Line 0 is the file as a whole."""
    named = hub_set(path)
    if named is not None:
        yield from _read_hub(named)
        return
    file = Path(path).expanduser()
    found = _file_problem(file)
    if found is not None:
        yield found
    elif file.suffix == ".parquet":
        yield from _read_parquet(file)
    else:
        yield from read_jsonl(file)


def _file_problem(path: Path) -> Problem | None:
    """Why the file as a whole cannot be read, or None."""
    if path.is_dir():
        return _whole("is a folder, but records are read from one file.", f"Name the file{_files_in(path)}.")
    if not path.exists():
        near = near_path(str(path))
        return _whole("does not exist.", f"Did you mean '{near}'?" if near else "Give the path of one that exists.")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        return _whole(f"cannot be read ({error.strerror}).", "Make it readable for this user.")
    if not head:
        return _whole("is empty, but it should hold records.", "Write or fetch it again, or take it out of the recipe.")
    found = next((name for magic, name in _MAGIC if head.startswith(magic)), "text")
    if path.suffix == ".parquet":
        return None if found == "parquet" else _whole(f"is {found}, but its name says parquet.", _rename(path, found))
    if path.suffix == ".gz":
        return _packed_problem(path, found)
    if found != "text":
        return _whole(f"is {found}, but {_FORMS} by its name and its content.", _rename(path, found))
    return _text_problem(path, head)


def _packed_problem(path: Path, found: str) -> Problem | None:
    if found != "gzip":
        return _whole(f"is {found} and not gzip, but its name ends with .gz.", _rename(path, found))
    try:
        with gzip.open(path) as file:
            head = file.read(_HEAD)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return None  # the reader of lines tells how far it can be read
    if not head:
        return _whole("is empty inside, but it should hold records.", "Write or fetch it again.")
    return _text_problem(path, head)


def _text_problem(path: Path, head: bytes) -> Problem | None:
    """Text that is no JSON Lines from its first line to its last: a table, an array, records over several lines."""
    text = head.removeprefix(BYTE_ORDER_MARK)
    if not text.strip():
        return _whole("holds blank lines only, but it should hold records.", "Write or fetch it again.")
    lines = [line for line in text.split(b"\n") if line.strip()]
    if path.suffix in _TABLES or (b"{" not in text and b"[" not in text and _is_table(lines)):
        return _whole(
            f"is a table (CSV), but {_FORMS}.",
            "Write it as JSON Lines first: `python -c \"import pandas; pandas.read_csv('IN.csv').to_json('OUT.jsonl', "
            "orient='records', lines=True)\"`; data.*.columns then names its columns.",
        )
    is_whole = len(head) < _HEAD
    if text.lstrip().startswith(b"[") and _is_array(path, text, is_whole=is_whole):
        return _whole(
            "is one JSON array, but each record stands on a line of its own.",
            f"Convert it: `llamachat data convert {path} {converted_path(path)}` (or `jq -c '.[]'`).",
        )
    if lines[0].strip() == b"{" and len(lines) > 1 and not lines[1].lstrip().startswith(b"{"):
        return _whole(
            "holds JSON spread over several lines, but each record stands on one line.",
            f"Write one record a line: `jq -c . {path} > {converted_path(path)}`.",
        )
    return None


def _is_table(lines: Sequence[bytes]) -> bool:
    separator = b"\t" if b"\t" in lines[0] else b","
    return separator in lines[0] and len(lines) > 1


def _is_array(path: Path, text: bytes, *, is_whole: bool) -> bool:
    """A first line that is a list by itself is one bad record; an array runs on to the end of the file."""
    if is_whole:
        row = decode_line(text, 1)
        return isinstance(row, Row) and isinstance(row.value, list) and bool(row.value)
    first, last = text.lstrip().split(b"\n")[0], _last_line(path)
    ends = isinstance(decode_line(first, 1), Problem) and isinstance(decode_line(last, 1), Problem)
    return ends and last.endswith(b"]")


def _last_line(path: Path) -> bytes:
    """The end of the last line that is not blank."""
    last = b""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        while part := file.readline(_HEAD):
            last = part.strip() or last
    return last


def _read_parquet(path: Path) -> Iterator[Row | Problem]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        # Batches, not the table: a file of gigabytes is read without being held.
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=512):
            for value in batch.to_pylist():
                number += 1
                yield Row(number, _without_nulls(value))
    except (pyarrow.ArrowException, OSError) as error:
        yield problem(
            number + 1,
            "file",
            f"is damaged parquet from this row on ({str(error).splitlines()[0]}).",
            "Fetch or write the file again.",
        )
        return
    if not number:
        yield _whole("holds no row, but it should hold records.", "Write or fetch it again.")


def _read_hub(named: HubSet) -> Iterator[Row | Problem]:
    try:
        import datasets

        rows = datasets.load_dataset(named.name, named.configuration, split=named.split)
    except Exception as error:  # the library raises what its many parts raise; each means that there are no rows
        yield _whole(
            f"is no file here, and the hub did not give it as a data set ({_first_line(error)}).",
            "Write the path of a file, or where there is a network: check the name, the split (OWNER/NAME:SPLIT) and the "
            "access (`hf auth login`).",
        )
        return
    for number, value in enumerate(rows, start=1):
        yield Row(number, _without_nulls(value))


def _without_nulls(value: Any) -> Any:
    """Columns give every row every key; one without a value is an absent key, as in JSON Lines."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"


def _whole(reason: str, mend: str) -> Problem:
    return problem(0, "file", reason, mend)


def _rename(path: Path, found: str) -> str:
    plain = path.name.split(".")[0]
    known = {"parquet": f"{plain}.parquet", "gzip": f"{plain}.jsonl.gz", "text": f"{plain}.jsonl"}
    if found in known:
        return f"Rename it to {known[found]} if it holds records, or name the right file."
    return "Unpack it or write it as JSON Lines in UTF-8 first."


def _files_in(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")))
    return f" in it: {', '.join(names[:5])}" if names else "; it holds no .jsonl, .jsonl.gz or .parquet"
