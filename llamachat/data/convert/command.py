"""`llamachat data convert`: a file in any form that we know, written in ours, every mend counted and every loss named.

Reads JSON Lines, a JSON array, parquet or a hub set; writes `.jsonl` or `.jsonl.gz` beside the output and renames it, so
that it appears whole or not at all. What it writes passes `data check`; equal inputs give equal bytes.
One thing surprises: one file holds one kind of records, the one that most of its first rows are of; rows of another
kind are left out, named like those that cannot be mended.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from llamachat.chat_format.dialog import DialogError
from llamachat.data.convert.html import html_in, without_html
from llamachat.data.convert.records import SETS_OF_TURNS, mended_record, sources_of, told_kind, transcripts_joined
from llamachat.data.convert.rows import is_turns, loose_rows
from llamachat.data.convert.turns import Mend, Notes
from llamachat.data.jsonl import Row
from llamachat.data.loading import parse_rows
from llamachat.data.problems import SHOWN, Problem, printable, problem, reason_key
from llamachat.data.records import KINDS, Kind, TextCheck, digest_of, parse_record
from llamachat.data.sources import SOURCES, Source
from llamachat.data.sources.reading import choice_of, gathered, gathers_of
from llamachat.errors import DataError, UsageError

_HEAD = 100  # rows from which the kind of a file is told
_NAMES = 20  # names of left-out keys that the report prints


@dataclass(slots=True)
class ConvertReport:
    """What became of the records of one file. `times` counts changes; `records` the records that had such a change."""

    path: str
    out: str
    kind: Kind
    written: int = 0
    untouched: int = 0
    repeated: int = 0
    without: int = 0  # rows of a known set that hold no record of the kind
    times: Counter[Mend] = field(default_factory=Counter)
    records: Counter[Mend] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)  # one for each record that was dropped

    def dropped(self) -> str:
        """Each record that was dropped on a line, or "" where none was."""
        return "".join(f"{found.at(self.path)}\n" for found in self.problems)

    def text(self) -> str:
        """The counts, as a small table."""
        kinds = self.kind if self.written == 1 else f"{self.kind}s"
        lines = [f"{self.out}: {self.written} {kinds} ({self.untouched} untouched, {self._mended} mended)"]
        rows = [(mend.value, f"{self.records[mend] or ''}", str(self.times[mend])) for mend in Mend if self.times[mend]]
        lines += _table([("mend", "records", "times"), *rows]) if rows else []
        if self.left_out:
            named = [f"{printable(name)} ({count})" for name, count in self.left_out.most_common(_NAMES)]
            more = len(self.left_out) - len(named)
            lines.append(f"  left-out keys: {', '.join(named)}{f' and {more} more' if more else ''}")
        reasons = Counter(reason_key(found) for found in self.problems)
        losses = [(reason, str(count)) for reason, count in reasons.most_common()]
        losses += [("repeats a record before it", str(self.repeated))] if self.repeated else []
        losses += [(f"row of a known set without a {self.kind}", str(self.without))] if self.without else []
        lines += _table([("dropped because it", "records"), *losses]) if losses else []
        return "\n".join(lines)

    @property
    def _mended(self) -> int:
        return self.written - self.untouched


def convert_path(
    path: str,
    out: Path,
    *,
    kind: Kind | None = None,
    format: str = "auto",
    check: TextCheck,
    overwrite: bool = False,
    strict: bool = False,
    plain_text: bool = False,
) -> ConvertReport:
    """Write what a file holds to `out` in our form. Without `kind`, what most of its first rows are.

    With `plain_text` the texts lose their HTML.

    Raises `DataError`, and leaves `out` as it was, where no record is left, or, with `strict`, where one cannot be
    mended; `UsageError` where `out` is no place to write to.
    """
    _check_out(path, out, overwrite)
    # The reader's own words for a format that there is not, or that gives another kind.
    list(parse_rows(iter(()), kind=kind, format=format, columns=None, check=check, path=path))
    source = SOURCES.get(format.replace("-", "_"))
    of_turns = format == "native" or (source is not None and source.name in SETS_OF_TURNS)
    named = None if of_turns else source
    lines: Counter[Mend] = Counter()
    rows = loose_rows(path, lines)
    if format != "native":
        rows = gathered(rows, gathers_of(kind, [source] if source else SOURCES.values()))
    head = list(islice(rows, _HEAD))
    own = kind or (source.kind if source else _usual_kind(head, of_turns=of_turns))
    report = ConvertReport(path, str(out), own)
    seen: set[bytes] = set()
    with _written_beside(out) as stream:
        for row in chain(head, rows):
            if isinstance(row, Problem):
                report.problems.append(row)
                continue
            for found in _records(row, report, named, of_turns=of_turns, wanted=kind):
                if plain_text:
                    _make_plain(found)
                _write(found, row.line, report, check, seen, stream)
        report.times += lines
        _check_result(report, strict=strict)
    return report


def _usual_kind(head: Sequence[Row | Problem], *, of_turns: bool) -> Kind:
    """The kind that most of the first rows are of; dialogs where none tells."""
    keyed = [{"messages": row.value} if is_turns(row.value) else row.value for row in head if isinstance(row, Row)]
    values = [transcripts_joined(value) for value in keyed if isinstance(value, Mapping)]
    sources = [[] if of_turns else sources_of(value, None) for value in values]
    told = [src[0].kind if src else told_kind(value, None) for value, src in zip(values, sources, strict=True)]
    return max(KINDS, key=told.count)


@dataclass(frozen=True, slots=True)
class _Found:
    """A record in our form, before the rules are held against it, and how it came to that."""

    value: object
    notes: Notes


def _records(
    row: Row, report: ConvertReport, named: Source | None, *, of_turns: bool, wanted: Kind | None
) -> Iterator[_Found]:
    """The records of one row, each mended as far as it can be; what cannot be is noted in the report."""
    if is_turns(row.value):
        yield from _mended({"messages": row.value}, row.line, report, Notes(Counter({Mend.BARE_TURNS: 1})))
        return
    if not isinstance(row.value, Mapping):
        yield _Found(row.value, Notes())
        return
    value = row.value if of_turns else transcripts_joined(row.value)
    sources = [named] if named else [] if of_turns else sources_of(value, report.kind)
    if not sources:
        yield from _mended(value, row.line, report, Notes())
        return
    if len(sources) > 1:
        reason, mend = choice_of(sources).rsplit(". ", 1)
        report.problems.append(problem(row.line, "row", f"is of those that {reason}.", mend))
        return
    source, count = sources[0], 0
    try:
        for record in source.convert(value):
            count += 1
            yield from _mended(record, row.line, report, Notes(Counter({Mend.KNOWN_SET: 1})))
    except ValueError as error:
        reason, stop, mend = str(error).rpartition(". ")
        report.problems.append(problem(row.line, source.name, reason + stop.strip(), mend))
        return
    report.without += not count


def _mended(value: Mapping[str, Any], line: int, report: ConvertReport, notes: Notes) -> Iterator[_Found]:
    told = told_kind(value, report.kind)
    if told != report.kind and not notes.mends:
        known = sources_of(value, None)
        told = known[0].kind if known else told
    if told is None:
        yield _Found(value, notes)  # the rules say what it lacks
    elif told != report.kind and report.kind != "prompt":
        report.problems.append(
            problem(
                line,
                "record",
                f"is a {told} by its keys, but {report.kind}s are written here; a file holds one kind.",
                f"Convert the file once more with `--kind {told}` to another one.",
            )
        )
    else:
        try:
            yield _Found(mended_record(value, told, report.kind, notes), notes)
        except DialogError as error:
            report.problems.append(problem(line, error.field, error.reason, error.fix))


def _make_plain(found: _Found) -> None:
    """Take the HTML out of the record's texts; what has no messages is refused by the rules."""
    parts = found.value.values() if isinstance(found.value, Mapping) else ()
    for message in (item for part in parts if isinstance(part, list) for item in part):
        if isinstance(message, dict) and isinstance(message.get("content"), str) and html_in(message["content"]):
            message["content"] = without_html(message["content"])
            found.notes.add(Mend.HTML)


def _write(
    found: _Found, line: int, report: ConvertReport, check: TextCheck, seen: set[bytes], stream: IO[bytes]
) -> None:
    """Hold the rules against a record; write it if it keeps them and is new."""
    record, findings = parse_record(found.value, report.kind, line, check)
    if record is None:
        report.problems.append(findings.problems[0])
        return
    digest = digest_of(record)
    if digest in seen:
        report.repeated += 1
        return
    seen.add(digest)
    stream.write(json.dumps(found.value, ensure_ascii=False).encode() + b"\n")
    report.written += 1
    report.untouched += not found.notes.mends
    report.times += found.notes.mends
    report.records.update(found.notes.mends.keys())
    report.left_out += found.notes.left_out


def _check_out(path: str, out: Path, overwrite: bool) -> None:
    """Refuse an output that is the input, that lies there already, or that a reader would take for something else."""
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise UsageError(
            f"'{out}': the name of the output ends otherwise. Our form is JSON Lines, and readers go by the name. "
            "End it with .jsonl or .jsonl.gz."
        )
    file = Path(path).expanduser()
    if out.is_dir():
        raise UsageError(f"'{out}' is a folder. One file is written. Name a file in it.")
    if out.resolve() == file.resolve() or (out.exists() and file.exists() and out.samefile(file)):
        raise UsageError(f"'{out}' is the input itself. The original stays as it is. Name another output.")
    if out.exists() and not overwrite:
        raise UsageError(
            f"'{out}' exists already. Nothing is written over unasked. Name another output, or add `--overwrite`."
        )


def _check_result(report: ConvertReport, *, strict: bool) -> None:
    if strict and report.problems:
        what = "1 record" if len(report.problems) == 1 else f"{len(report.problems)} records"
        lines = [found.at(report.path) for found in report.problems[:SHOWN]]
        more = len(report.problems) - len(lines)
        lines += [f"and {more} more (without `--strict` all are named)."] if more else []
        raise DataError(
            f"{report.path}: {what} cannot be mended, and with `--strict` nothing is written then. Mend the lines, or "
            "leave `--strict` out to drop them.\n" + "\n".join(lines)
        )
    if not report.written:
        losses = f"{report.dropped()}{report.text()}\n" if report.problems or report.without else ""
        raise DataError(
            f"{losses}{report.path}: holds no {report.kind} that can be written, so nothing was. A file of records must "
            "hold one at least. Name its form with `--format`, what it should give with `--kind`, or mend the lines."
        )


@contextmanager
def _written_beside(out: Path) -> Iterator[IO[bytes]]:
    """A stream whose content appears under the name `out` whole, and only if nothing was raised."""
    side = out.with_name(f".incoming-{os.getpid()}-{out.name}")
    try:
        with side.open("wb") as raw:
            if out.suffix == ".gz":
                # No name and no time inside: equal records give equal files.
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    yield cast(IO[bytes], packed)
            else:
                yield raw
            raw.flush()
            os.fsync(raw.fileno())
        side.replace(out)
    except OSError as error:
        raise UsageError(
            f"'{out}' cannot be written ({error.strerror}). The records are written beside it and renamed. Make the "
            "folder or room in it, or name another output."
        ) from error
    finally:
        side.unlink(missing_ok=True)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of a name and numbers, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *numbers in rows:
        cells = [name.ljust(widths[0])]
        cells += [number.rjust(width) for number, width in zip(numbers, widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
