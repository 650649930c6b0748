"""The rows of a file whose form is repaired while it is read: arrays, several records on a line, blank lines, marks.

Reads what `llamachat.data.files` reads, and a JSON array. A row of an array has its place in it for a line number.
A fault of the file as a whole raises `DataError`: a file that cannot be read to its end is not converted in part.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import Path

from llamachat.config.sections import hub_set
from llamachat.data.convert.turns import Repair
from llamachat.data.files import BYTE_ORDER_MARK, decode_line, numbered_lines, open_file, read_rows
from llamachat.data.problems import convert_command
from llamachat.data.records import Row
from llamachat.errors import DataError

_ROLE_KEYS = ("role", "from")
_OPENING = re.compile(r"\s*\[")
_FOLLOWS = re.compile(r"\s*[,\]]")
_GAP = re.compile(r"\s*,?\s*")


def loose_rows(path: str, repairs: Counter[Repair]) -> Iterator[Row]:
    """Every row in order, with its value or its problem; what was repaired is counted."""
    plain = read_rows(path)
    first = next(plain, None)
    file = Path(path).expanduser()
    is_lines = hub_set(path) is None and file.suffix != ".parquet"
    if first and first.problems and not first.line:
        # Of all the faults of a file as a whole, the array's is the one whose fix names this command.
        if not convert_command(first.problems, path):
            raise DataError(first.problems[0].at(path))
        yield from _array(file, repairs)
    elif is_lines:
        for line, raw in numbered_lines(file):
            yield from _on_line(raw, line, repairs)
    else:
        for row in chain([first] if first else [], plain):
            if row.problems:
                raise DataError(row.problems[0].at(path))
            yield row


def _on_line(raw: bytes, line: int, repairs: Counter[Repair]) -> Iterator[Row]:
    while raw.startswith(BYTE_ORDER_MARK):
        raw = raw.removeprefix(BYTE_ORDER_MARK)
        repairs[Repair.BYTE_ORDER_MARK] += 1
    if not raw.strip():
        repairs[Repair.BLANK_LINE] += 1
        return
    row = decode_line(raw, line)
    parts = _parts(raw) if row.problems else []
    if parts:
        repairs[Repair.SEVERAL if len(parts) > 1 else Repair.COMMA] += 1
    for one in [decode_line(part.encode(), line) for part in parts] or [row]:
        yield from _unrolled(one, repairs)


def _unrolled(row: Row, repairs: Counter[Repair]) -> Iterator[Row]:
    """The records of a list; a list of turns is one of them."""
    value = row.value
    is_records = isinstance(value, list) and value and all(isinstance(item, Mapping | list) for item in value)
    if not is_records or is_turns(value):
        yield row
        return
    repairs[Repair.ARRAY] += 1
    for item in value:
        yield replace(row, value=item)


def is_turns(value: object) -> bool:
    """Whether a value without keys of its own is a conversation: a list of turns and nothing else."""
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def _is_turn(value: object) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in _ROLE_KEYS) and "messages" not in value


def _parts(raw: bytes) -> list[str]:
    """The objects of a line that holds several, or one and a comma; none where the line holds anything else."""
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


def _array(path: Path, repairs: Counter[Repair]) -> Iterator[Row]:
    """The items of the array that a file is; an array of turns is one dialog."""
    items = _items(path)
    first = next(items, None)
    if first is not None and _is_turn(first.value):
        turns = [first, *items]
        yield next((turn for turn in turns if turn.problems), Row(1, [turn.value for turn in turns]))
        return
    repairs[Repair.ARRAY] += 1
    yield from chain([first] if first else [], items)


def _items(path: Path) -> Iterator[Row]:
    number = 0
    try:
        with open_file(path) as stream:
            for number, text in enumerate(_item_texts(stream.read().decode("utf-8-sig")), start=1):
                yield decode_line(text.encode(), number)
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: file: cannot be read after record {number} of the array ({error}), and no place after it is sure "
            "to begin a record. Correct the array there, or write one record a line."
        ) from error


def _item_texts(text: str) -> Iterator[str]:
    """The JSON text of each item of an array."""
    decoder = json.JSONDecoder()
    position = _end(_GAP, text, _end(_OPENING, text, 0))
    while not text.startswith("]", position):
        _, end = decoder.raw_decode(text, position)
        if not _FOLLOWS.match(text, end):
            raise ValueError("no comma and no end of the array follows")
        yield text[position:end]
        position = _end(_GAP, text, end)
    if text[position + 1 :].strip():
        raise ValueError("something stands after the array")


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position
