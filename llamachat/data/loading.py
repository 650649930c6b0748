"""Records of one kind from the sources of a recipe: read, checked, split by conversation, mixed by weight.

Reads JSON Lines, parquet and hub sets, in our own form or that of a known data set (`llamachat.data.sources`). A record that
breaks the rules stops the reading with every bad line of its file named, or is dropped and counted by reason; which of
the two is the source's `on_bad_record`. A fault of the file itself always stops it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import chain, islice
from random import Random
from typing import Any, Generic, Literal, TypeVar, cast, overload

from llamachat.chat_format.dialog import Dialog, DialogError, Message
from llamachat.config.sections import DataSource, Split
from llamachat.data.jsonl import Row
from llamachat.data.problems import Problem, problem, reason_key, report
from llamachat.data.records import (
    KINDS,
    RATINGS,
    Findings,
    Kind,
    Preference,
    Prompt,
    Rating,
    Record,
    TextCheck,
    as_prompt,
    first_user_turn,
    kind_of,
    parse_record,
    with_system,
)
from llamachat.data.rows import read_rows
from llamachat.data.sources import SOURCES, Source
from llamachat.data.sources.reading import choice_of, fitting_sources, gathered, gathers_of, source_problem
from llamachat.data.splits import SplitName, split_of
from llamachat.errors import DataError

R = TypeVar("R", bound=Record)
S = TypeVar("S")

_HEAD = 100  # rows from which the format of a file is told


@dataclass(frozen=True, slots=True)
class Loaded(Generic[R]):
    """The records of one source, how many were dropped by reason, and the keys that nothing read, with their counts."""

    records: list[R]
    dropped: dict[str, int]
    unused_keys: dict[str, int]


@dataclass(frozen=True, slots=True)
class Splits(Generic[R]):
    """Records by the hash of their first user turn; no conversation is in two of these."""

    train: list[R]
    validation: list[R]
    test: list[R]
    judge: list[R]


@dataclass(frozen=True, slots=True)
class Mixture(Generic[R]):
    """Several sources as one: weighted where it is trained on (train, judge), each record once where it is measured."""

    train: list[R]
    validation: list[R]
    test: list[R]
    judge: list[R]
    dropped: dict[str, int]
    unused_keys: dict[str, int]


@dataclass(frozen=True, slots=True)
class Parsed:
    """One record of a file, or what is wrong with it; neither where a row of a known set holds no record."""

    line: int
    kind: Kind | None
    record: Record | None
    problems: list[Problem] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


@overload
def read_records(source: DataSource, kind: Literal["dialog"], check: TextCheck) -> Loaded[Dialog]: ...
@overload
def read_records(source: DataSource, kind: Literal["preference"], check: TextCheck) -> Loaded[Preference]: ...
@overload
def read_records(source: DataSource, kind: Literal["prompt"], check: TextCheck) -> Loaded[Prompt]: ...
def read_records(source: DataSource, kind: Kind, check: TextCheck) -> Loaded[Any]:
    """The source's records of this kind, in its order; dialogs and preferences are read as prompts where these are due.

    Raises `DataError` with every bad line of the file, unless they are to be dropped; `check` is the chat format's rule
    on texts.
    """
    _check_system(source, check)
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    problems: list[Problem] = []
    for parsed in parse_rows(
        read_rows(source.path), kind=kind, format=source.format, columns=source.columns, check=check, path=source.path
    ):
        unused.update(parsed.unused)
        problems += parsed.problems
        if parsed.record is not None:
            record = as_prompt(parsed.record) if kind == "prompt" else parsed.record
            records.append(record if source.system is None else with_system(record, source.system))
        elif parsed.problems:
            dropped[reason_key(parsed.problems[0])] += 1
        else:
            dropped[f"row without a {kind}"] += 1
        if len(records) == source.limit:
            break
    fatal = problems if source.on_bad_record == "error" else [found for found in problems if found.field == "file"]
    if fatal:
        raise DataError(_refusal(source.path, fatal, len(records)))
    if not records:
        raise DataError(
            f"{source.path}: no record is left ({_counted(dropped)}). A source must hold at least one {kind}. "
            "Mend the file (`llamachat data check` names each line), or take it out of the recipe."
        )
    return Loaded(records, dict(dropped), dict(unused))


def parse_rows(
    rows: Iterator[Row | Problem],
    *,
    kind: Kind | None,
    format: str,
    columns: Mapping[str, str] | None,
    check: TextCheck,
    path: str,
) -> Iterator[Parsed]:
    """Every row in turn, converted from its format, as the record or records that it holds or as its problems.

    Without `kind` each row is taken for what its keys tell.
    """
    named = _named_source(format, kind, path)
    if not columns and format != "native":
        rows = gathered(rows, gathers_of(kind, [named] if named else SOURCES.values()))
    head = list(islice(rows, _HEAD))
    renamed_head = [_renamed(row, columns) for row in head]
    values = [row.value for row in renamed_head if isinstance(row, Row)]
    source = _likeliest_source(kind, values, path) if format == "auto" else named
    told = [kind_of(row.value) for row in renamed_head if isinstance(row, Row)]
    usual = kind or max(KINDS, key=told.count)
    absent = set((columns or {}).values())
    seen_rows = False
    for row in chain(head, rows):
        if isinstance(row, Problem):
            yield Parsed(row.line, None, None, [row])
            continue
        seen_rows = True
        if absent and isinstance(row.value, Mapping):
            absent -= row.value.keys()
        yield from _parse_row(_renamed(row, columns), kind, usual, source, check)
    if absent and seen_rows:
        names = ", ".join(repr(name) for name in sorted(absent))
        mend = "Correct the source's 'columns' ({field of a record: name in the file})."
        yield Parsed(0, None, None, [problem(0, "file", f"has no column {names} in any row.", mend)])


def mix(parts: Iterable[tuple[Sequence[S], float]], seed: int) -> list[S]:
    """All parts one after the other, each record as often as its part's weight says; of a fraction, so many are drawn.

    A part's draw depends on the seed and its own records' positions alone: other parts, and records added at its end,
    change little or nothing of it. Order within a part is kept.
    """
    mixed: list[S] = []
    for records, weight in parts:
        whole = int(weight)
        for _ in range(whole):
            mixed += records
        count = int((weight - whole) * len(records) + 0.5)
        keys = Random(seed)
        ranked = sorted((keys.random(), index) for index in range(len(records)))
        mixed += [records[index] for index in sorted(index for _, index in ranked[:count])]
    return mixed


def split_records(records: Iterable[R], split: Split) -> Splits[R]:
    """The records by side of the split, in their order."""
    sides: dict[SplitName, list[R]] = {"train": [], "validation": [], "test": [], "judge": []}
    for record in records:
        sides[split_of(first_user_turn(record), split)].append(record)
    return Splits(**sides)


@overload
def load_mixture(
    sources: Sequence[DataSource], split: Split, *, kind: Literal["dialog"], check: TextCheck, seed: int
) -> Mixture[Dialog]: ...
@overload
def load_mixture(
    sources: Sequence[DataSource], split: Split, *, kind: Literal["preference"], check: TextCheck, seed: int
) -> Mixture[Preference]: ...
@overload
def load_mixture(
    sources: Sequence[DataSource], split: Split, *, kind: Literal["prompt"], check: TextCheck, seed: int
) -> Mixture[Prompt]: ...
def load_mixture(
    sources: Sequence[DataSource], split: Split, *, kind: Kind, check: TextCheck, seed: int
) -> Mixture[Any]:
    """The sources' records, split by conversation, then mixed by weight; counts are named by file.

    The bad lines of all sources are told in one error.
    """
    loaded: list[tuple[DataSource, Loaded[Any], Splits[Any]]] = []
    errors: list[str] = []
    for source in sources:
        try:
            found = cast(Callable[..., Loaded[Any]], read_records)(source, kind, check)
        except DataError as error:
            errors.append(str(error))
            continue
        loaded.append((source, found, split_records(found.records, split)))
    if errors:
        raise DataError("\n".join(errors))
    return Mixture(
        train=mix([(sides.train, source.weight) for source, _, sides in loaded], seed),
        judge=mix([(sides.judge, source.weight) for source, _, sides in loaded], seed),
        validation=mix([(sides.validation, 1.0) for _, _, sides in loaded], seed),
        test=mix([(sides.test, 1.0) for _, _, sides in loaded], seed),
        dropped=_by_file((source.path, found.dropped) for source, found, _ in loaded),
        unused_keys=_by_file((source.path, found.unused_keys) for source, found, _ in loaded),
    )


def _parse_row(
    row: Row | Problem, kind: Kind | None, usual: Kind, source: Source | None, check: TextCheck
) -> Iterator[Parsed]:
    if isinstance(row, Problem):
        yield Parsed(row.line, None, None, [row])
        return
    if source is None or not isinstance(row.value, Mapping):
        yield _parsed(row.value, row.line, kind, usual, check)
        return
    count = 0
    try:
        for value in source.convert(row.value):
            count += 1
            yield _parsed(value, row.line, kind, usual, check)
    except ValueError as error:
        yield Parsed(row.line, source.kind, None, [source_problem(row.line, str(error))])
        return
    if not count:
        yield Parsed(row.line, source.kind, None)


def _parsed(value: object, line: int, kind: Kind | None, usual: Kind, check: TextCheck) -> Parsed:
    """The record that the keys tell where any kind will do, else the one that is wanted."""
    told = kind_of(value)
    own = kind if kind in ("dialog", "preference") else told or usual
    record, found = parse_record(value, own, line, check, is_context=kind == "prompt")
    return Parsed(line, own if kind or told else None, record, found.problems, found.unused)


def _renamed(row: Row | Problem, columns: Mapping[str, str] | None) -> Row | Problem:
    if not columns or isinstance(row, Problem) or not isinstance(row.value, Mapping):
        return row
    value = {name: item for name, item in row.value.items() if name not in columns.values()}
    value |= {name: row.value[column] for name, column in columns.items() if column in row.value}
    return Row(row.line, value)


def _named_source(format: str, kind: Kind | None, path: str) -> Source | None:
    """The known set that the format names; None where it names none."""
    if format in ("auto", "native"):
        return None
    source = SOURCES.get(format.replace("-", "_"))
    if source is None:
        names = ["auto", "native", *sorted(SOURCES)]
        near = get_close_matches(format, names, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise DataError(f"{path}: unknown format '{format}'. The formats are {', '.join(names)}.{hint}")
    if kind not in (None, "prompt", source.kind):
        fitting = ", ".join(sorted(name for name, other in SOURCES.items() if other.kind == kind))
        raise DataError(
            f"{path}: format '{format}' gives {source.kind}s, but {kind}s are read here. Formats that give them: "
            f"{fitting}. Name one of these, or move the file to where {source.kind}s are read."
        )
    return source


def _likeliest_source(kind: Kind | None, head: Sequence[object], path: str) -> Source | None:
    """The format that most of the first rows have; our own where none has more."""
    votes: Counter[tuple[str, ...]] = Counter()
    for value in head:
        if not isinstance(value, Mapping):
            continue
        fitting = fitting_sources(value, kind, SOURCES.values())
        if fitting:
            votes[tuple(source.name for source in fitting)] += 1
        elif any(isinstance(value.get(key), list) for key in ("messages", "prompt", "chosen")):
            votes[()] += 1
    names = max(votes, key=lambda names: votes[names]) if votes else ()
    best = [SOURCES[name] for name in names]
    if not best or votes[names] == votes[()]:
        return None
    if len(best) > 1:
        raise DataError(f"{path}: its rows {choice_of(best)}")
    return best[0]


def _check_system(source: DataSource, check: TextCheck) -> None:
    if source.system is None:
        return
    try:
        check((Message("system", source.system),), field="system")
    except DialogError as error:
        raise DataError(f"{source.path}: the source's 'system' {error.reason} Write it otherwise.") from error


def _refusal(path: str, problems: Sequence[Problem], good: int) -> str:
    lines = len({found.line for found in problems})
    if all(found.field == "file" for found in problems):
        return report(problems, path)
    what = "1 record breaks" if lines == 1 else f"{lines} records break"
    return (
        f"{path}: {what} the rules, {good} keep them. None is skipped in silence: mend them, or leave them out with "
        f"the source's `on_bad_record: drop`, which counts them.\n{report(problems, path)}"
    )


def _counted(counts: Mapping[str, int]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in counts.items()) or "it has no rows"


def _by_file(counts: Iterable[tuple[str, Mapping[str, int]]]) -> dict[str, int]:
    merged: Counter[str] = Counter()
    for path, found in counts:
        merged.update({f"{path}: {name}": count for name, count in found.items()})
    return dict(merged)


__all__ = [
    "KINDS",
    "RATINGS",
    "Findings",
    "Kind",
    "Loaded",
    "Mixture",
    "Parsed",
    "Preference",
    "Prompt",
    "Rating",
    "Record",
    "Splits",
    "TextCheck",
    "load_mixture",
    "mix",
    "parse_rows",
    "read_records",
    "split_records",
]
