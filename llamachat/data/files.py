"""The raw rows of a data file or a Hub data set: JSON Lines (plain or gzip), parquet or the Hub.

The file type is detected from the first bytes and must match the name. Reading a parquet file or a JSON array as lines
would report one odd problem per line and hide the actual one.
JSON Lines are read more strictly than with `json.loads`: NaN, Infinity, duplicate keys, invalid UTF-8 and blank lines
between records are problems, because other readers interpret or skip them differently. Lines end with LF or CRLF. Blank
lines at the end of the file are allowed, since some writers add one.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from math import isfinite
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import IO, Any, NoReturn, cast

from llamachat.config.section import from_home
from llamachat.config.sections import HubSet, hub_set, near_path
from llamachat.data.problems import converted_path
from llamachat.data.records import Row, bad_row, kind_of
from llamachat.errors import DataError, first_line
from llamachat.pipes import regular_file
from llamachat.runs.hub_commits import note_commit

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?Infinity|NaN)')
_FORMS = "a data file is JSON Lines (.jsonl, .jsonl.gz) or parquet (.parquet)"
_MAGIC = (
    (b"PAR1", "parquet"),
    (b"\x1f\x8b", "gzip"),
    (b"PK\x03\x04", "a zip archive (or a spreadsheet)"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xfe\0\0", "text in UTF-32"),
    (b"\0\0\xfe\xff", "text in UTF-32"),
    (b"\xff\xfe", "text in UTF-16"),
    (b"\xfe\xff", "text in UTF-16"),
)
_COMMIT = re.compile(r"@([0-9a-f]{40})/")
_LFS = b"version https://git-lfs.github.com/spec/"
_TABLES = (".csv", ".tsv")
_GAP, _COLON, _OBJECTS = re.compile(r"[\s,]*"), re.compile(r"\s*:\s*"), re.compile(r"\[\s*\{")
_HEAD = 1 << 16
_BEGIN = 32
LONGEST_LINE = 1 << 28  # bytes; gzip compresses a thousandfold, so a small file could fill any memory with one line
_DEEPEST = 250  # nesting levels of a value; a tree of 100 messages has about 200


def read_rows(path: str) -> Iterator[Row]:
    """Yield every row in order, with its value or its problem. Line 0 stands for the whole file."""
    hub_name = hub_set(path)
    if hub_name is not None:
        yield from _read_hub(hub_name, path)
        return
    name = Path(from_home(path))
    refusal = file_problem(name)
    if refusal is not None:
        yield refusal
        return
    file = regular_file(name)
    if file.suffix == ".parquet":
        yield from _read_parquet(file)
    else:
        with open_file(file) as stream:
            yield from decode_lines(bounded_lines(stream))


def source_names(sources: Iterable[str]) -> dict[str, str]:
    """Metric names for the sources: the file's stem, prefixed with its folder if two files share a stem."""
    distinct = list(dict.fromkeys(sources))
    stems = {source: _metric_name(PurePosixPath(source).name.partition(".")[0]) for source in distinct}
    counts = Counter(stems.values())
    names: dict[str, str] = {}
    for source, stem in stems.items():
        name = stem if counts[stem] == 1 else f"{_metric_name(PurePosixPath(source).parent.name)}-{stem}"
        num_same = sum(name == other.partition("~")[0] for other in names.values())
        names[source] = f"{name}~{num_same + 1}" if num_same else name
    return names


def _metric_name(text: str) -> str:
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "_-") else "-" for letter in text)
    return kept.strip("-_") or "source"


# -- whole files


def open_file(path: Path) -> IO[bytes]:
    """Open a file for reading bytes; decompress it if its name says gzip."""
    file = regular_file(path)
    return cast(IO[bytes], gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield every line of a file with its number, from 1; raise `DataError` if the file cannot be read to its end."""
    line = 0
    try:
        with open_file(path) as stream:
            for line, raw in enumerate(bounded_lines(stream), start=1):
                yield line, raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}:{line + 1}: file: cannot be read from here on ({getattr(error, 'strerror', None) or error}), but it "
            "is read as a whole. Check the path, or fetch or write the file again."
        ) from error


def bounded_lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream; of a longer one, `LONGEST_LINE` + 1 bytes, which makes it a bad row."""
    while raw := stream.readline(LONGEST_LINE + 1):
        yield raw
        while is_cut(raw) and not raw.endswith(b"\n"):
            raw = stream.readline(LONGEST_LINE + 1) or b"\n"


def is_cut(line: bytes) -> bool:
    """Whether the line exceeds `LONGEST_LINE` and was truncated."""
    return len(line) > LONGEST_LINE


def is_blank(line: bytes) -> bool:
    return not is_cut(line) and not line.strip()


def has_byte_order_mark(path: Path) -> bool:
    """Whether the text begins with a byte order mark, which some editors write and the reader skips."""
    with open_file(path) as file:
        return file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK


def file_problem(path: Path) -> Row | None:
    """The problem that makes the whole file unreadable, or None."""
    try:
        if path.is_dir():
            return _whole("is a folder, but records are read from one file.", f"Name the file{_files_in(path)}.")
        if not path.exists():
            return _absent(path)
        file = regular_file(path)
        with file.open("rb") as stream:
            head = stream.read(_HEAD)
    except OSError as error:
        return _whole(f"cannot be read ({error.strerror}).", "Make it readable for this user.")
    if not head:
        return _whole("is empty, but it should hold records.", "Write or fetch it again, or take it out of the recipe.")
    if head.startswith(_LFS):
        return _whole("is a pointer of Git LFS, not the file itself.", "Fetch the content: `git lfs pull`.")
    content = _content(head)
    expected = {".parquet": "parquet", ".gz": "gzip"}.get(file.suffix, "text")
    if content != expected:
        return _whole(f"is {content}, but its name says {expected}: {_FORMS}.", _rename(path, content))
    if expected == "gzip":
        try:
            with open_file(path) as stream:
                head = stream.read(_HEAD)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return None  # the line reader reports where the file becomes unreadable
        if not head:
            return _whole("is empty inside, but it should hold records.", "Write or fetch it again.")
        if (content := _content(head)) != "text":
            return _whole(f"is {content} inside, but {_FORMS}.", _rename(path, content))
    return None if expected == "parquet" else _text_problem(path, head)


def _absent(path: Path) -> Row:
    if path.is_symlink():
        return _whole(f"is a link to '{path.readlink()}', which does not exist.", "Mount or fetch what it points to.")
    near = near_path(str(path))
    return _whole("does not exist.", f"Did you mean '{near}'?" if near else "Give the path of one that exists.")


def _content(head: bytes) -> str:
    """The file type according to the first bytes."""
    if head[257:262] == b"ustar":
        return "a tar archive"
    name = next((name for magic, name in _MAGIC if head.startswith(magic)), "text")
    # JSON text contains no zero byte; UTF-16 and UTF-32 have some among their first characters.
    return "binary, or text in UTF-16 or UTF-32" if name == "text" and b"\0" in head[:_BEGIN] else name


def _text_problem(path: Path, head: bytes) -> Row | None:
    """The problem of a text file that is not JSON Lines: a table, an array, or records that span several lines."""
    text = head.removeprefix(BYTE_ORDER_MARK)
    if not text.strip():
        return _whole("holds blank lines only, but it should hold records.", "Write or fetch it again.")
    lines = [line for line in text.split(b"\n") if line.strip()]
    has_columns = len(lines) > 1 and (b"\t" in lines[0] or b"," in lines[0])
    if path.suffix in _TABLES or (b"{" not in text and b"[" not in text and has_columns):
        return _whole(
            f"is a table (CSV), but {_FORMS}.",
            "Write it as JSON Lines first: `python -c \"import pandas; pandas.read_csv('IN.csv').to_json('OUT.jsonl', "
            "orient='records', lines=True)\"`; data.*.columns then names its columns.",
        )
    is_whole = len(head) < _HEAD
    if text.lstrip().startswith(b"[") and _is_array(path, text, is_whole=is_whole):
        return _whole(
            "is one JSON array, but each record must be on a line of its own.",
            f"Convert it: `llamachat data convert {quote(str(path))} {quote(str(converted_path(path)))}` (or `jq -c '.[]'`).",
        )
    if lines[0].strip() == b"{" and len(lines) > 1 and not lines[1].lstrip().startswith(b"{"):
        return _whole(
            "holds JSON spread over several lines, but each record must be on one line.",
            f"Write one record a line: `jq -c '{_records_in(text)}' {quote(str(path))}"
            f" > {quote(str(converted_path(path)))}`.",
        )
    return None


def _records_in(head: bytes) -> str:
    """The jq path of the records in an object that begins like this: the object itself or a list under a key."""
    decoder, text = json.JSONDecoder(), head.decode(errors="ignore")
    position, jq_path = text.index("{") + 1, "."
    try:
        while True:
            name, position = decoder.raw_decode(text, _end_of(_GAP, text, position))
            position = _end_of(_COLON, text, position)
            item = _OBJECTS.match(text, position)
            if item is not None and {"role", "from"} & decoder.raw_decode(text, item.end() - 1)[0].keys():
                return "."  # a list of turns: the object is one record
            if kind_of({name: None}) is not None:
                return "."
            jq_path = f".{json.dumps(name)}[]" if item and jq_path == "." else jq_path
            _, position = decoder.raw_decode(text, position)
    except (ValueError, RecursionError):  # the end of the object, or of the bytes read
        return jq_path


def _end_of(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _is_array(path: Path, text: bytes, *, is_whole: bool) -> bool:
    """Whether the whole file is an array; a list on the first line alone is one bad record."""
    if is_whole:
        value = decode_line(text, 1).value
        return isinstance(value, list) and bool(value)
    first, last = text.lstrip().split(b"\n")[0], b""
    with open_file(path) as file:
        while part := file.readline(_HEAD):
            last = part.strip() or last  # the last line that is not blank
    return all(decode_line(line, 1).problems for line in (first, last)) and last.endswith(b"]")


def _whole(reason: str, fix: str) -> Row:
    return bad_row(0, "file", reason, fix)


def _rename(path: Path, content: str) -> str:
    plain = path.name.split(".")[0]
    known = {"parquet": f"{plain}.parquet", "gzip": f"{plain}.jsonl.gz", "text": f"{plain}.jsonl"}
    if content in known:
        return f"Rename it to {known[content]} if it holds records, or name the right file."
    return "Unpack it or write it as JSON Lines in UTF-8 first."


def _files_in(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet")))
    return f" in it: {', '.join(names[:5])}" if names else "; it holds no .jsonl, .jsonl.gz or .parquet"


# -- parquet and the Hub


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        names = pyarrow.parquet.ParquetFile(path).schema_arrow.names
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            yield _whole(f"has several columns named {repeated[0]!r}.", "Rename or drop all but one of them.")
            return
        # Read batches instead of the table, so that a file of several gigabytes is never in memory as a whole.
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=512):
            for values in zip(*batch.columns, strict=True):
                number += 1
                row = dict(zip(batch.schema.names, map(_value_of, values), strict=True))
                yield Row(number, _as_json(row))
    # Python, not Arrow, detects column names that are not UTF-8 and sizes that exceed any memory.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        reason = f"is damaged parquet from this row on ({first_line(error)})."
        yield bad_row(number + 1, "file", reason, "Fetch or write the file again.")
        return
    if not number:
        yield _whole("holds no row, but it should hold records.", "Write or fetch it again.")


def _read_hub(name: HubSet, path: str) -> Iterator[Row]:
    try:
        import datasets

        rows = datasets.load_dataset(name.name, name.configuration, split=name.split, revision=name.revision)
    except Exception as error:  # the library raises many types; each means that the rows cannot be read
        yield _whole(
            f"is no file here, and the hub did not give it as a data set ({type(error).__name__}: {first_line(error)}).",
            "Write the path of a file, or where there is a network: check the name, the split (OWNER/NAME:SPLIT) and the "
            "access (`hf auth login`).",
        )
        return
    if commit := _commit_of(rows):
        note_commit(path, commit)
    for number, value in enumerate(rows, start=1):
        yield Row(number, _as_json(value))


def _commit_of(rows: Any) -> str | None:
    """The Hub commit that a data set was read at, parsed from its file URLs (`hf://datasets/o/n@commit/f`)."""
    addresses = getattr(getattr(rows, "info", None), "download_checksums", None) or {}
    return next((match[1] for address in addresses if (match := _COMMIT.search(str(address)))), None)


def _value_of(scalar: Any) -> Any:
    """The value of an Arrow scalar, or the raw value if Python cannot represent it (year 10000, invalid UTF-8)."""
    import pyarrow

    try:
        return scalar.as_py()
    except (ValueError, OverflowError, KeyError):
        if isinstance(scalar, pyarrow.StructScalar):
            return {name: _value_of(item) for name, item in scalar.items()}
        if isinstance(scalar, pyarrow.ListScalar):
            return [_value_of(item) for item in scalar.values]
        if isinstance(scalar, pyarrow.StringScalar):
            return scalar.as_buffer().to_pybytes()
        value = getattr(scalar, "value", None)  # the number inside a date
        return _value_of(value) if isinstance(value, pyarrow.Scalar) else value


def _as_json(value: Any) -> Any:
    """The value as it would appear in JSON Lines: dates and other foreign types as text, keys with null removed.

    In a table every row has every key, so null means that the key is absent. Bytes that are not text stay bytes.
    """
    if isinstance(value, dict):
        plain = {key: _as_json(item) for key, item in value.items()}
        return {key: item for key, item in plain.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


# -- lines of JSON


def decode_lines(lines: Iterable[bytes]) -> Iterator[Row]:
    """Yield a row for each line. If a gzip stream breaks off, the last row has the problem of the unreadable line."""
    blank: list[int] = []
    line = 0
    try:
        for line, raw in enumerate(lines, start=1):
            text = raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw
            if is_blank(text):
                blank.append(line)
                continue
            for missing in blank:
                yield bad_row(
                    missing,
                    "line",
                    "is blank, but every line holds one record: a blank one may be where a record was lost.",
                    "Remove the line (`llamachat data convert` does it).",
                )
            blank.clear()
            yield decode_line(text, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = "ends in the middle" if isinstance(error, EOFError) else f"is damaged ({error})"
        reason = f"{what} of the gzip data: this line and what follows cannot be read."
        yield bad_row(line + 1, "file", reason, "Fetch or compress the file again.")


def decode_line(raw: bytes, line: int) -> Row:
    """Parse the JSON value of one line."""
    if is_cut(raw):
        reason = f"is longer than {LONGEST_LINE >> 20} MiB, but it holds one record."
        return bad_row(line, "line", reason, "Write each record on a line of its own, or drop the line.")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return bad_row(
            line,
            f"byte {error.start + 1}",
            f"is 0x{raw[error.start]:02x}, which is not UTF-8 here, but text must be UTF-8 to become the right tokens.",
            "Save the file as UTF-8 (for example `iconv -f WINDOWS-1252 -t UTF-8 IN > OUT`), or correct the line.",
        )
    try:
        value = _DECODER.decode(text)
        # Counting brackets is faster than traversing every level.
        may_be_deep = text.count("[") + text.count("{") > _DEEPEST
        return _too_deep(line) if may_be_deep and _is_deep(value) else Row(line, value)
    except json.JSONDecodeError as error:
        return _syntax_problem(text, line, error)
    except _RepeatedKeyError as error:
        reason = "is named twice in one object, and only one of the two values can be kept."
        return bad_row(line, str(error), reason, "Remove or rename one of them.")
    except _ConstantError as error:
        column = next(match.start(1) for match in _CONSTANT.finditer(text) if match.group(1)) + 1
        reason = f"holds {error}, which JSON does not have."
        return bad_row(line, f"column {column}", reason, "Write a number or null, or drop it.")
    except RecursionError:
        return _too_deep(line)
    except ValueError:  # an integer with more digits than Python converts
        return bad_row(line, "line", "holds a number of thousands of digits.", "Write it as a string, or drop it.")


def _too_deep(line: int) -> Row:
    return bad_row(line, "line", "is nested too deep to be a record.", "Drop the line.")


def _is_deep(value: object) -> bool:
    """Whether a value is nested deeper than `_DEEPEST`; reading or writing it could exceed the recursion limit."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _syntax_problem(text: str, line: int, error: json.JSONDecodeError) -> Row:
    column = f"column {error.pos + 1}"
    if text.startswith("\ufeff"):
        return bad_row(
            line,
            "column 1",
            "is a byte order mark inside the file, left where two files were joined; JSON may not hold it.",
            "Take the mark out (the three bytes EF BB BF).",
        )
    if error.msg == "Extra data":
        return bad_row(
            line,
            column,
            "follows a whole JSON value, but each line holds exactly one record.",
            "Put what follows on a line of its own, or take it out.",
        )
    if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()):
        return bad_row(
            line,
            f"column {len(text.rstrip()) + 1}",
            "is the end of the line in the middle of a record: the record is cut off, or spread over several lines.",
            "Write the whole record on one line, or drop it.",
        )
    reason = f"is not JSON ({error.msg.removesuffix(' at')}), but every line holds one JSON object."
    return bad_row(line, column, reason, "Correct the line, or drop it.")


class _RepeatedKeyError(Exception):
    """An object has a duplicate key."""


class _ConstantError(Exception):
    """A number is not valid JSON (NaN, Infinity)."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise _RepeatedKeyError(repr(next(name for name in counts if counts[name] > 1)))
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise _ConstantError(name)


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
