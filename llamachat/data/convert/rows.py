"""The rows of a file whose form is mended while it is read: arrays, several records on a line, blank lines, marks.

Reads what `llamachat.data.rows` reads, and a JSON array. A row of an array has its place in it for a line number.
A fault of the file as a whole raises `DataError`: of what cannot be read to its end nothing is mended.
"""

import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, cast

from llamachat.config.paths import hub_set
from llamachat.data.convert.turns import Mend
from llamachat.data.jsonl import BYTE_ORDER_MARK, Row, decode_line
from llamachat.data.problems import Problem, convert_command
from llamachat.data.rows import read_rows
from llamachat.errors import DataError

_PART = 1 << 20  # characters of an array that are read at a time
_ROLE_KEYS = ("role", "from")
_OPENING = re.compile(r"\s*\[")
_FOLLOWS = re.compile(r"\s*[,\]]")
_GAP = re.compile(r"\s*,?\s*")


def loose_rows(path: str, mends: Counter[Mend]) -> Iterator[Row | Problem]:
    """Every row in order, as itself or as the reason why it is none; what was mended is counted."""
    plain = read_rows(path)
    first = next(plain, None)
    file = Path(path).expanduser()
    is_lines = hub_set(path) is None and file.suffix != ".parquet"
    if isinstance(first, Problem) and not first.line:
        # Of all the faults of a file as a whole, the array's is the one whose mend names this command.
        if not convert_command([first], path):
            raise DataError(first.at(path))
        yield from _array(file, mends)
    elif is_lines:
        for line, raw in _lines(file):
            yield from _on_line(raw, line, mends)
    else:
        for row in chain([first] if first else [], plain):
            if isinstance(row, Problem):
                raise DataError(row.at(path))
            yield row


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    line = 0
    try:
        with _open(path) as stream:
            for line, raw in enumerate(stream, start=1):
                yield line, raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}:{line + 1}: file: cannot be read from here on ({error}), but a file is converted as a whole. "
            "Fetch or write it again."
        ) from error


def _on_line(raw: bytes, line: int, mends: Counter[Mend]) -> Iterator[Row | Problem]:
    while raw.startswith(BYTE_ORDER_MARK):
        raw = raw.removeprefix(BYTE_ORDER_MARK)
        mends[Mend.BYTE_ORDER_MARK] += 1
    if not raw.strip():
        mends[Mend.BLANK_LINE] += 1
        return
    found = decode_line(raw, line)
    if isinstance(found, Row):
        yield from _unrolled(found, mends)
        return
    parts = _parts(raw)
    if not parts:
        yield found
        return
    mends[Mend.SEVERAL if len(parts) > 1 else Mend.COMMA] += 1
    for part in parts:
        row = decode_line(part.encode(), line)
        yield from _unrolled(row, mends) if isinstance(row, Row) else [row]


def _unrolled(row: Row, mends: Counter[Mend]) -> Iterator[Row | Problem]:
    """The records of a list; a list of turns is one of them."""
    if not isinstance(row.value, list) or not row.value or is_turns(row.value):
        yield row
    elif all(isinstance(item, Mapping | list) for item in row.value):
        mends[Mend.ARRAY] += 1
        for item in row.value:
            yield Row(row.line, item)
    else:
        yield row


def is_turns(value: object) -> bool:
    """Whether a value without keys of its own is a conversation: a list of turns and nothing else."""
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def _is_turn(value: object) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in _ROLE_KEYS) and "messages" not in value


def _parts(raw: bytes) -> list[str]:
    """The objects of a line that holds several, or one and a comma; none where anything else stands there."""
    decoder, position = json.JSONDecoder(), 0
    parts: list[str] = []
    try:
        text = raw.decode().strip()
        while position < len(text):
            value, end = decoder.raw_decode(text, position)
            if not isinstance(value, Mapping | list):
                return []
            parts.append(text[position:end])
            position = _end(_GAP, text, end)
    except (ValueError, RecursionError):  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        return []
    return parts


def _array(path: Path, mends: Counter[Mend]) -> Iterator[Row | Problem]:
    """The items of the array that a file is; an array of turns is one dialog."""
    items = _items(path)
    first = next(items, None)
    if first is not None and isinstance(first, Row) and _is_turn(first.value):
        turns = [first, *items]
        bad = next((turn for turn in turns if isinstance(turn, Problem)), None)
        yield bad or Row(1, [cast(Row, turn).value for turn in turns])
        return
    mends[Mend.ARRAY] += 1
    yield from [] if first is None else chain([first], items)


def _items(path: Path) -> Iterator[Row | Problem]:
    number = 0
    try:
        with _open(path) as stream:
            for number, text in enumerate(_item_texts(io.TextIOWrapper(stream, encoding="utf-8-sig")), start=1):
                yield decode_line(text.encode(), number)
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: file: cannot be read after record {number} of the array ({error}), and no place after it is sure "
            "to begin a record. Mend the array there, or write one record a line."
        ) from error


def _item_texts(stream: IO[str]) -> Iterator[str]:
    """The JSON text of each item; no more of the file is held than the item at hand needs."""
    decoder = json.JSONDecoder()
    text, size, is_whole = stream.read(_PART), _PART, False
    position = _end(_OPENING, text, 0)
    while True:
        position = _end(_GAP, text, position)
        if text.startswith("]", position):
            if (text[position + 1 :] + stream.read()).strip():
                raise ValueError("something stands after the array")
            return
        fault = ValueError("no comma and no end of the array follows")
        try:
            _, end = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            end, fault = len(text), error
        # A number may go on after what was read of it, so what follows an item tells that it is whole.
        if _FOLLOWS.match(text, end):
            yield text[position:end]
            position, size = end, _PART
            continue
        if is_whole:
            raise fault
        part = stream.read(size)
        is_whole = len(part) < size
        text, position, size = text[position:] + part, 0, 2 * size


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return found.end() if found else position
