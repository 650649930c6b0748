"""What a source is: a known public data set, and the function that turns one raw row of it into our records.

A converter sees one row and knows no file: it raises `ValueError` naming the field, what it must hold and the mend;
the reader of the file puts `file:line` before that. It checks the row's shape only: what holds for every record
(alternating turns, no empty text, no control tags) is checked once, by the record itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Record = dict[str, Any]
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """How neighbouring rows that share a key become the one row that the converter reads, in sets that are a table.

    `join` gets the rows in their order, at least one, and raises `ValueError` as a converter does.
    """

    fields: frozenset[str]
    key: str
    join: Callable[[Sequence[Row]], Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A known data set: the record kind it yields, the raw fields that betray it, and its converter.

    Two sources may share fields (a tree of ranked answers holds both dialogs and preferences): the wanted kind decides
    between them, and among sources of one kind the one with more fields is the closer match. `shape` tells more of the
    rows than the fields' names do. `has_lists`: rows hold lists of messages under our own keys, and yet are not ours.
    """

    name: str
    kind: Literal["dialog", "preference", "prompt"]
    fields: frozenset[str]
    convert: Callable[[Row], Iterator[Record]]
    shape: Callable[[Row], bool] = lambda row: True
    has_lists: bool = False
    gather: Gather | None = None

    def fits(self, row: Row) -> bool:
        """Whether a row has the fields of this set, and in them what the set has there."""
        return self.fields <= row.keys() and self.shape(row)


def text_field(row: Row, name: str, *, source: str) -> str:
    """The text in a field that the source always has."""
    if name not in row:
        raise ValueError(
            f"{name!r} is missing. A row of {source} has it as text. Add the field, or name the right 'format'."
        )
    return as_text(row[name], name)


def optional_text(row: Row, name: str) -> str:
    """The text in a field that a source may leave out, null or empty; "" then."""
    return "" if row.get(name) is None else as_text(row[name], name)


def list_field(row: Row, name: str, *, source: str) -> list[Any]:
    """The list in a field that the source always has."""
    value = row.get(name)
    if not isinstance(value, list) or not value:
        raise ValueError(
            f"{name!r} holds {_kind_of(value)}. A row of {source} has a list there, with at least one entry. "
            "Mend or remove the row."
        )
    return value


def number_field(row: Row, name: str, *, source: str) -> float:
    """The number in a field that the source always has."""
    value = row.get(name)
    # NaN is a number to Python, and no score.
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise ValueError(
            f"{name!r} holds {_kind_of(value)}. A row of {source} has a number there, which says which answer is "
            "better. Mend or remove the row."
        )
    return value


def boolean_field(row: Row, name: str, *, source: str) -> bool:
    """The boolean in a field that the source always has."""
    value = row.get(name)
    if not isinstance(value, bool):
        raise ValueError(
            f"{name!r} holds {_kind_of(value)}. A row of {source} has true or false there. Mend or remove the row."
        )
    return value


def mapping_at(value: object, where: str) -> Mapping[str, Any]:
    """The object at a place inside a row."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} holds {_kind_of(value)}. An object is required there. Mend or remove the row.")
    return value


def as_text(value: object, where: str) -> str:
    """The text at a place inside a row."""
    if not isinstance(value, str):
        raise ValueError(f"{where!r} holds {_kind_of(value)}. Text is required there. Mend or remove the row.")
    return value


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def joined(instruction: str, text: str) -> str:
    """One user turn of an instruction and the text that it speaks of, if any."""
    return f"{instruction}\n\n{text}" if text.strip() else instruction


def _kind_of(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, list) and not value:
        return "an empty list"
    if isinstance(value, float) and value != value:
        return "no number (NaN)"
    names = {str: "text", bool: "a boolean", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
