"""Load records of one kind from the sources of a recipe: read, check, split by conversation, mix by weight.

Reads JSON Lines, parquet and Hub data sets, in our own format or that of a known data set (`llamachat.data.sources`).
The source's `on_bad_record` decides whether an invalid record raises an error that lists every bad line of its file, or
is dropped and counted by reason. A problem with the file itself always raises.
The side of the split is a hash of the first user turn, the same in every step, so conversations that start alike are on
one side. A turn that starts many conversations of a source ("hi", "/start") is skipped and the next one decides:
a conversation is on the same side with and without the greeting.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from random import Random
from typing import Generic, Literal, TypeVar, cast, get_args

from llamachat.chat_format.dialog import Dialog, DialogError, Message, check_texts
from llamachat.config.section import from_home
from llamachat.config.sections import DataSource, Split
from llamachat.data.files import read_rows
from llamachat.data.problems import Problem, problem, reason_key, report
from llamachat.data.records import (
    BAD_ANSWER,
    KIND_OF,
    KINDS,
    Kind,
    Preference,
    Prompt,
    Record,
    Row,
    as_prompt,
    bad_row,
    kind_of,
    label_of,
    messages_of,
    parse_record,
    record_with_system,
)
from llamachat.data.sources import SOURCES, Source
from llamachat.data.sources.source import CHOICE_FIX, choice_of, fitting_sources, gathered
from llamachat.errors import DataError
from llamachat.tables import plural

log = logging.getLogger(__name__)

R = TypeVar("R", Dialog, Preference, Prompt)
S = TypeVar("S")
SplitName = Literal["train", "validation", "test", "judge"]

_HEAD = 100  # rows used to detect the format of a file
_TURNS_LOOKED_AT = 4
_SEVERAL, _MANY = 20, 0.1  # a turn is skipped if it starts at least 20 conversations and this share of the source
_FAR, _EXPECTED = 0.15, 5  # largest deviation from a side's share; expected size from which a side must not be empty
_REMEMBERED = 200_000  # records cached between steps, so that each step need not read and check them again


@dataclass(frozen=True, slots=True)
class Mixture(Generic[R]):
    """Records of several sources by side of the split, and the number dropped, by file and reason.

    The training sides (train, judge) are weighted; the evaluation sides contain each record once.
    """

    train: list[R]
    validation: list[R]
    test: list[R]
    judge: list[R]
    dropped: dict[str, int]


# -- sides of the split


def fraction(text: str, *, salt: str = "split") -> float:
    """A number in [0, 1) that depends only on the stripped text and the salt (SHA-256, identical on all machines)."""
    digest = hashlib.sha256(f"{salt}\n{text.strip()}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_of(position: float, split: Split) -> SplitName:
    """The side for the `fraction` of a conversation's deciding turn; from 0 to 1: test, validation, judge, train."""
    if position < split.test:
        return "test"
    if position < split.test + split.validation:
        return "validation"
    return "judge" if position < split.test + split.validation + split.judge else "train"


# A user turn: a hash of the text that ignores case, and the text's `fraction`.
Turn = tuple[int, float]


def user_turns(record: Record) -> tuple[Turn, ...]:
    """The candidates for a record's deciding turn: its first user turns in order, then all user turns joined."""
    texts = [message.content.strip() for message in messages_of(record) if message.role == "user"]
    return tuple((hash(text.casefold()), fraction(text)) for text in (*texts[:_TURNS_LOOKED_AT], "\n".join(texts)))


@dataclass(frozen=True, slots=True)
class Sides:
    """The side of each record of one source, in order, and statistics of the split."""

    sides: list[SplitName]
    num_conversations: int  # distinct conversations, by their user turns
    num_alike: int  # distinct conversations that begin with a turn that many share

    def warning(self, split: Split) -> str | None:
        """A warning if a side is empty or its size is far from the configured share, else None."""
        total = len(self.sides)
        counts: Counter[str] = Counter(self.sides)
        shares = {**split.model_dump(), "train": 1 - sum(split.model_dump().values())}

        def is_far(side: str, share: float) -> bool:
            is_absent = counts[side] == 0 and share * self.num_conversations >= _EXPECTED
            return is_absent or abs(counts[side] / total - share) > _FAR

        if total < _SEVERAL or not any(is_far(side, share) for side, share in shares.items()):
            return None
        shares_text = ", ".join(
            f"{side} {counts[side] / total:.0%} ({share:.0%} configured)" for side, share in shares.items()
        )
        return (
            f"gives other shares than it says: {shares_text}. The {total} records hold {self.num_conversations} different "
            "conversations by what the user says, and equal ones are on one side."
        )


def side_sizes(counts: Mapping[SplitName, int]) -> str:
    """The size of each side as text."""
    return ", ".join(f"{counts[side]} {side}" for side in get_args(SplitName) if counts.get(side))


def sides_of(records: Sequence[tuple[Turn, ...]], split: Split) -> Sides:
    """Assign the records of a source, given by their `user_turns`, to the sides of the split.

    A turn that starts many conversations is skipped, since it would put them all on one side.
    """
    conversations = set(records)
    many = max(_SEVERAL, _MANY * len(conversations))
    shared: set[int] = set()
    while True:
        counts = Counter(_deciding(turns, shared)[0] for turns in conversations)
        more = {text for text, count in counts.items() if count >= many} - shared
        if not more:
            break
        shared |= more
    sides: list[SplitName] = [split_of(_deciding(turns, shared)[1], split) for turns in records]
    return Sides(sides, len(conversations), sum(turns[0][0] in shared for turns in conversations))


def _deciding(turns: tuple[Turn, ...], shared: Collection[int]) -> Turn:
    return next((turn for turn in turns[:-1] if turn[0] not in shared), turns[-1])


def mix(parts: Iterable[tuple[Sequence[S], float]], seed: int) -> list[S]:
    """Concatenate all parts, repeating each by its weight; the fractional part of a weight samples that share.

    A part's sample depends only on the seed and the positions of its records. Other parts do not affect it, and records
    appended to it change little. The order within a part is kept.
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


# -- records of sources


def load_mixture(
    sources: Sequence[DataSource], split: Split, record: type[R], *, forbidden: Sequence[str], seed: int
) -> Mixture[R]:
    """Load the sources' records of this kind, split them by conversation and mix them by weight.

    If `record` is Prompt, dialogs and preferences are read as prompts. No message may contain a text in `forbidden`
    (`ChatFormat.forbidden`). The bad lines of all sources are reported in one error.
    """
    parts: dict[SplitName, list[tuple[list[R], float]]] = {side: [] for side in get_args(SplitName)}
    dropped: Counter[str] = Counter()
    counts: Counter[SplitName] = Counter()
    errors: list[str] = []
    for source in sources:
        try:
            records, left_out = _read(source, record, tuple(forbidden))
        except DataError as error:
            errors.append(str(error))
            continue
        for side, of_side in parts.items():
            of_side.append(([], source.weight if side in ("train", "judge") else 1.0))
        spread = sides_of([user_turns(one) for one in records], split)
        for one, side in zip(records, spread.sides, strict=True):
            parts[side][-1][0].append(one)
        counts.update(spread.sides)
        if warning := spread.warning(split):
            log.warning("%s: data.split: %s", source.path, warning)
        dropped.update({f"{source.path}: {reason}": count for reason, count in left_out.items()})
    if errors:
        raise DataError("\n".join(errors))
    if sources:
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        _log_once(f"{sources[0].path}{more}: split into {side_sizes(counts)}")
    return Mixture(**{side: mix(of_side, seed) for side, of_side in parts.items()}, dropped=dict(dropped))


@lru_cache(maxsize=64)
def _log_once(text: str) -> None:
    """Log a line only once, although several mixtures of one command produce it."""
    log.info("%s", text)


def read_records(source: DataSource | Path | str, record: type[R], *, forbidden: Sequence[str] = ()) -> list[R]:
    """Read all records of one source or file in order, from all sides of the split; see `load_mixture`."""
    source = source if isinstance(source, DataSource) else DataSource(path=str(source))
    return list(_read(source, record, tuple(forbidden))[0])


_Read = tuple[tuple[Record, ...], dict[str, int]]
_remembered: dict[tuple[object, ...], _Read] = {}


def _read(source: DataSource, record: type[R], forbidden: tuple[str, ...]) -> tuple[Sequence[R], Mapping[str, int]]:
    """The records of a source and the counts of dropped ones, cached in the process.

    Three reward models read the same pairs. The cache key covers the source, the kind, the forbidden texts and the
    file's current state on disk.
    """
    file = Path(from_home(source.path))
    state = file.stat() if file.is_file() else None
    stamp = state and (state.st_ino, state.st_size, state.st_mtime_ns)
    key = (source.model_dump_json(exclude={"weight"}), str(file.resolve()), stamp, record, forbidden)
    result = _remembered.get(key) or _read_source(source, KIND_OF[record], forbidden)
    if key not in _remembered and len(result[0]) <= _REMEMBERED:
        while len(result[0]) + sum(len(records) for records, _ in _remembered.values()) > _REMEMBERED:
            del _remembered[next(iter(_remembered))]
        _remembered[key] = result
    return cast(tuple[Sequence[R], Mapping[str, int]], result)


def _read_source(source: DataSource, kind: Kind, forbidden: Sequence[str]) -> _Read:
    try:
        check_texts((Message("system", source.system or ""),), forbidden, field="system")
    except DialogError as error:
        raise DataError(f"{source.path}: the source's 'system' {error.reason} Use another text.") from error
    records: list[Record] = []
    dropped: Counter[str] = Counter()
    problems: list[Problem] = []
    options = source.model_dump(include={"path", "format", "columns"})
    for row in parse_rows(read_rows(source.path), kind=kind, forbidden=forbidden, **options):
        problems += row.problems
        if row.record is not None:
            record = as_prompt(row.record) if kind == "prompt" else row.record
            record = record_with_system(record, source.system)
            records.append(replace(record, source=source.path) if isinstance(record, Preference) else record)
        elif row.problems:
            dropped[reason_key(row.problems[0])] += 1
        else:
            dropped[f"row without a {kind}"] += 1
        if len(records) == source.limit:
            break
    fatal = problems if source.on_bad_record == "error" else [fault for fault in problems if fault.field == "file"]
    if fatal:
        raise DataError(_refusal(source.path, fatal, len(records)))
    if not records:
        counts = "; ".join(f"{count} x {reason}" for reason, count in dropped.items()) or "it has no rows"
        raise DataError(
            f"{source.path}: no record is left ({counts}). A source must hold at least one {kind}. "
            "Correct the file (`llamachat data check` names each line), or take it out of the recipe."
        )
    return tuple(records), dict(dropped)


def _refusal(path: str, problems: Sequence[Problem], good: int) -> str:
    if all(fault.field == "file" for fault in problems):
        return report(problems, path)
    lines = len({fault.line for fault in problems})
    verb = "breaks" if lines == 1 else "break"
    return (
        f"{path}: {plural(lines, 'record')} {verb} the rules, {good} keep them. None is skipped silently: correct them, or drop them with "
        f"the source's `on_bad_record: drop`, which counts them.\n{report(problems, path)}"
    )


# -- rows of a file


def parse_rows(
    rows: Iterable[Row],
    *,
    path: str,
    kind: Kind | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    forbidden: Sequence[str] = (),
) -> Iterator[Row]:
    """Yield each row converted from its format, once for each record it contains, or with its problems.

    Without `kind`, the keys of each row determine its kind. `path` appears in error messages.
    """
    named = named_source(format, kind, path)
    if columns:
        rows = renamed_rows(rows, columns)
    elif format != "native":
        rows = gathered(rows, kind, [named] if named else SOURCES.values())
    rows = iter(rows)
    head = list(islice(rows, _HEAD))
    values = [row.value for row in head if not row.problems]
    source = _likeliest_source(kind, values, path) if format == "auto" else named
    kinds = [kind_of(value) for value in values]
    usual = kind or max(KINDS, key=kinds.count)
    for row in chain(head, rows):
        if row.problems:
            yield row
        else:
            yield from _parse_row(row, kind, usual, source, forbidden)


def _parse_row(
    row: Row, kind: Kind | None, usual: Kind, source: Source | None, forbidden: Sequence[str]
) -> Iterator[Row]:
    if source is None or not isinstance(row.value, Mapping):
        yield _parsed(row, row.value, kind, usual, forbidden)
        return
    if source.kind == "dialog" and kind != "prompt" and label_of(row.value) is False:
        yield replace(row, kind=source.kind, problems=(problem(row.line, *BAD_ANSWER),))
        return
    is_empty = True
    try:
        for value in source.convert(row.value):
            is_empty = False
            yield _parsed(row, value, kind, usual, forbidden)
    except DialogError as error:
        yield replace(row, kind=source.kind, problems=(source.problem(row.line, error),))
        return
    if is_empty:
        yield replace(row, kind=source.kind)


def _parsed(row: Row, value: object, kind: Kind | None, usual: Kind, forbidden: Sequence[str]) -> Row:
    """Parse the record as `kind`, or as the kind that its keys indicate if any kind is accepted."""
    by_keys = kind_of(value)
    own = kind if kind in ("dialog", "preference") else by_keys or usual
    record, problems, unused = parse_record(value, own, row.line, forbidden, is_context=kind == "prompt")
    shown = own if kind or by_keys else None
    return Row(row.line, row.value, problems=problems, kind=shown, record=record, unused=unused)


def renamed_rows(rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    """Rename columns ({new name: name in the file}); the last row is a problem of the file if a column is in no row."""
    absent, has_rows = set(columns.values()), False
    for row in rows:
        if row.problems or not isinstance(row.value, Mapping):
            has_rows = has_rows or not row.problems
            yield row
            continue
        has_rows = True
        absent -= row.value.keys()
        value = {name: item for name, item in row.value.items() if name not in columns.values()}
        value |= {name: row.value[column] for name, column in columns.items() if column in row.value}
        yield replace(row, value=value)
    if absent and has_rows:
        names = ", ".join(repr(name) for name in sorted(absent))
        fix = "Correct `--columns FIELD=COLUMN`, or the source's 'columns' ({field of a record: name in the file})."
        yield bad_row(0, "file", f"has no column {names} in any row.", fix)


def named_source(format: str, kind: Kind | None, path: str) -> Source | None:
    """The known data set that the format names, or None for auto and native."""
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
    """The format that most of the first rows match; None, for our own, if no other has more rows."""
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
        raise DataError(f"{path}: its rows {choice_of(best)} {CHOICE_FIX}")
    return best[0]
