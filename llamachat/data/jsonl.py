"""JSON Lines, plain or gzip: one decoded value a line, and a `Problem` for each line that is none.

Stricter than `json.loads`: NaN, Infinity, a key named twice, bytes that are not UTF-8 and blank lines between records
are problems, since another reader would take them otherwise or pass them over. Lines end with LF or CRLF.
One thing surprises: blank lines at the end of the file are no problem; a writer that ends each line twice leaves one.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llamachat.data.problems import Problem, problem

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CONSTANT = re.compile(r'"(?:[^"\\]|\\.)*"|(-?Infinity|NaN)')


@dataclass(frozen=True, slots=True)
class Row:
    """A decoded value and the line it stands on; in files without lines, its number from 1."""

    line: int
    value: Any


def read_jsonl(path: Path) -> Iterator[Row | Problem]:
    """Every line of the file in order, as a row or as the reason why it is none."""
    return decode_lines(_lines(path))


def has_byte_order_mark(path: Path) -> bool:
    """Whether the text begins with the mark that some editors write; the reading skips it."""
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        return file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK


def decode_lines(lines: Iterable[bytes | Problem]) -> Iterator[Row | Problem]:
    """Rows of raw lines; a problem in place of a line (the file could not be read on) is handed through."""
    blank: list[int] = []
    for line, raw in enumerate(lines, start=1):
        if isinstance(raw, Problem):
            yield raw
            continue
        if line == 1:
            raw = raw.removeprefix(BYTE_ORDER_MARK)
        if not raw.strip():
            blank.append(line)
            continue
        for missing in blank:
            yield problem(
                missing,
                "line",
                "is blank, but every line holds one record: a blank one may be where a record was lost.",
                "Remove the line (`llamachat data convert` does it).",
            )
        blank.clear()
        yield decode_line(raw, line)


def decode_line(raw: bytes, line: int) -> Row | Problem:
    """The JSON value of one line."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        return problem(
            line,
            f"byte {error.start + 1}",
            f"is 0x{raw[error.start]:02x}, which is not UTF-8 here, but text must be UTF-8 to become the right tokens.",
            "Save the file as UTF-8 (for example `iconv -f WINDOWS-1252 -t UTF-8 IN > OUT`), or mend the line.",
        )
    try:
        return Row(line, json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant))
    except json.JSONDecodeError as error:
        return _syntax_problem(text, line, error)
    except _RepeatedKeyError as error:
        return problem(
            line,
            str(error),
            "is named twice in one object, and only one of the two values can be kept.",
            "Remove or rename one of them.",
        )
    except _ConstantError as error:
        column = next(found.start(1) for found in _CONSTANT.finditer(text) if found.group(1)) + 1
        return problem(
            line, f"column {column}", f"holds {error}, which JSON does not have.", "Write a number or null, or drop it."
        )
    except RecursionError:
        return problem(line, "line", "is nested too deep to be a record.", "Drop the line.")
    except ValueError:  # an integer of more digits than Python converts
        return problem(line, "line", "holds a number of thousands of digits.", "Write it as a string, or drop it.")


def _syntax_problem(text: str, line: int, error: json.JSONDecodeError) -> Problem:
    field = f"column {error.pos + 1}"
    if text.startswith("\ufeff"):
        return problem(
            line,
            "column 1",
            "is a byte order mark inside the file, left where two files were joined; JSON may not hold it.",
            "Take the mark out (the three bytes EF BB BF).",
        )
    if error.msg == "Extra data":
        return problem(
            line,
            field,
            "goes on after a whole JSON value, but each line holds exactly one record.",
            "Put what follows on a line of its own, or take it out.",
        )
    if error.msg.startswith("Unterminated string") or error.pos >= len(text.rstrip()):
        return problem(
            line,
            f"column {len(text.rstrip()) + 1}",
            "is the end of the line in the middle of a record: the record is cut off, or spread over several lines.",
            "Write the whole record on one line, or drop it.",
        )
    return problem(
        line,
        field,
        f"is not JSON ({error.msg.removesuffix(' at')}), but every line holds one JSON object.",
        "Mend the line, or drop it.",
    )


class _RepeatedKeyError(Exception):
    pass


class _ConstantError(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(repr(next(name for name in found if names.count(name) > 1)))
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise _ConstantError(name)


def _lines(path: Path) -> Iterator[bytes | Problem]:
    """Raw lines; where the compressed data break off, a problem with the number of the line that could not be read."""
    if not path.name.endswith(".gz"):
        with path.open("rb") as plain:
            yield from plain
        return
    line = 1
    try:
        with gzip.open(path) as stream:
            for raw in stream:
                yield raw
                line += 1
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = "ends in the middle" if isinstance(error, EOFError) else f"is damaged ({error})"
        yield problem(
            line,
            "file",
            f"{what} of the gzip data: this line and what follows cannot be read.",
            "Fetch or compress the file again.",
        )
