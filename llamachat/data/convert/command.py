"""`llamachat data convert`: convert a file from any known format to ours, counting every repair and naming every loss.

Reads JSON Lines, a JSON array, parquet or a Hub data set. Writes `.jsonl(.gz)` to a temporary file and renames
it, so that the output is complete or absent. The output passes `data check`; equal inputs give equal bytes.
In an array, an item's index is its line number. A problem with the file as a whole raises `DataError`: a file that
cannot be read to its end is not converted partially.
A file contains one kind of record, that of most of its first rows. Rows of other kinds or that cannot be repaired
are dropped and reported.
"""

import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from shlex import quote
from typing import Any

from llamachat.chat_format.dialog import DialogError
from llamachat.config.section import from_home
from llamachat.config.sections import hub_set
from llamachat.data.convert.forms import LISTS, SIDES, LabelledPair, labelled_pairs, unfolded, unread_answers
from llamachat.data.convert.records import SETS_OF_TURNS, kind_by_keys, repaired_record, sources_of, transcripts_joined
from llamachat.data.convert.turns import Notes, Repair, html_in, without_html
from llamachat.data.files import BYTE_ORDER_MARK, decode_line, is_blank, is_cut, numbered_lines, open_file, read_rows
from llamachat.data.loading import named_source, renamed_rows
from llamachat.data.near_duplicates import NearIndex, sketch_of
from llamachat.data.problems import CONVERT, SHOWN, Problem, converted_path, problem, reason_key, shown_name
from llamachat.data.records import KINDS, REQUIRED, Kind, Record, Row, digest_of, label_of, parse_record
from llamachat.data.sources import SOURCES, Source
from llamachat.data.sources.source import CHOICE_FIX, choice_of, gathered
from llamachat.errors import DataError, UsageError
from llamachat.pipes import regular_file
from llamachat.runs.outputs import check_folder, check_output, written_beside
from llamachat.tables import plural, text_table

LARGEST_ARRAY = 1 << 31  # bytes; decoded text takes four times as much
_HEAD = 100  # rows used to detect the kind of a file
_NAMES = 20  # dropped keys listed in the report
_ROLE_KEYS = ("role", "from")
_OPENING = re.compile(r"\s*\[")
_FOLLOWS = re.compile(r"\s*[,\]]")
_GAP = re.compile(r"\s*,?\s*")

Repaired = tuple[object, Notes]  # a record in our format, not yet checked, and its repairs


@dataclass(slots=True)
class ConvertReport:
    """The outcome for the records of one file. `times` counts changes, `records` the records with such a change."""

    path: str
    out: str
    kind: Kind
    written: int = 0
    untouched: int = 0
    repeated: int = 0
    near: int = 0  # dropped as near-duplicates of an earlier record
    without: int = 0  # rows of a known data set that contain no record of the kind
    times: Counter[Repair] = field(default_factory=Counter)
    records: Counter[Repair] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)  # one for each dropped record
    _seen: set[bytes] = field(default_factory=set)

    def is_new(self, record: Record, notes: Notes) -> bool:
        """Count a valid record; return whether to write it, i.e. whether it differs from all earlier ones."""
        digest = digest_of(record)
        if digest in self._seen:
            self.repeated += 1
            return False
        self._seen.add(digest)
        self.written += 1
        self.untouched += not notes.repairs
        self.times += notes.repairs
        self.records.update(notes.repairs.keys())
        self.left_out += notes.left_out
        return True

    def dropped(self) -> str:
        """One line for each dropped record, "" if there are none."""
        return "".join(f"{fault.at(self.path)}\n" for fault in self.problems)

    def text(self) -> str:
        """The counts as a small table."""
        kinds = self.kind if self.written == 1 else f"{self.kind}s"
        repaired = self.written - self.untouched
        lines = [f"{self.out}: {self.written} {kinds} ({self.untouched} untouched, {repaired} repaired)"]
        rows = [(one.value, f"{self.records[one] or ''}", str(self.times[one])) for one in Repair if self.times[one]]
        lines += text_table([("repair", "records", "times"), *rows], align="<>", indent="  ") if rows else []
        if self.left_out:
            names = [f"{shown_name(name)} ({count})" for name, count in self.left_out.most_common(_NAMES)]
            more = len(self.left_out) - len(names)
            lines.append(f"  left-out keys: {', '.join(names)}{f' and {more} more' if more else ''}")
        losses = Counter(reason_key(fault) for fault in self.problems).most_common()
        losses += [("repeats a record before it", self.repeated)] if self.repeated else []
        losses += [("is nearly the same as a record before it", self.near)] if self.near else []
        losses += [(f"row of a known set without a {self.kind}", self.without)] if self.without else []
        rows = [(reason, str(count)) for reason, count in losses]
        lines += text_table([("dropped because it", "records"), *rows], align="<>", indent="  ") if rows else []
        return "\n".join(lines)


def convert_path(
    path: str,
    out: Path,
    *,
    kind: Kind | None = None,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    forbidden: Sequence[str],
    overwrite: bool = False,
    strict: bool = False,
    plain_text: bool = False,
    drop_near_duplicates: bool = False,
) -> ConvertReport:
    """Convert a file to our format and write it to `out`. Without `kind`, use the kind of most of its first rows.

    `columns` maps fields to their names in the file. `plain_text` removes HTML from the texts. No message may contain a
    text in `forbidden`.

    Raises `DataError`, leaving `out` unchanged, if no record remains or, with `strict`, if one cannot be repaired;
    raises `UsageError` if `out` is not writable.
    """
    _check_name(out)
    check_output(out, [path], option="OUT", overwrite=overwrite)
    check_folder(out, option="OUT")
    source = named_source(format, kind, path)
    of_turns = format == "native" or (source is not None and source.name in SETS_OF_TURNS)
    named = None if of_turns else source
    file_repairs: Counter[Repair] = Counter()
    rows = _loose_rows(path, file_repairs)
    if columns:
        rows = renamed_rows(rows, columns)
    elif format != "native":
        rows = gathered(rows, kind, [source] if source else SOURCES.values())
    if kind == "preference" and named is None:
        rows = labelled_pairs(rows)
    head = list(islice(rows, _HEAD))
    own = kind or (source.kind if source else _usual_kind(head, of_turns=of_turns))
    if source is None:
        _refuse_unread_answers(path, head, own, is_wanted=kind is not None)
    report = ConvertReport(path, str(out), own)
    records = _sound_records(chain(head, rows), report, named, forbidden, of_turns=of_turns, plain_text=plain_text)
    if drop_near_duplicates:
        records = _without_near_duplicates(list(records), report)
    with written_beside(out) as stream:
        for record, value, notes in records:
            if report.is_new(record, notes):
                stream.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")
        report.times += file_repairs
        _check_result(report, strict=strict)
    return report


def _sound_records(
    rows: Iterable[Row],
    report: ConvertReport,
    named: Source | None,
    forbidden: Sequence[str],
    *,
    of_turns: bool,
    plain_text: bool,
) -> Iterator[tuple[Record, object, Notes]]:
    """Yield every valid record with its JSON value; the report collects the problems of the others."""
    for row in rows:
        if row.problems and not row.line:
            raise DataError(row.problems[0].at(report.path))
        report.problems += row.problems
        for value, notes in () if row.problems else _records(row, report, named, of_turns=of_turns):
            if plain_text:
                _make_plain(value, notes)
            record, problems, _ = parse_record(value, report.kind, row.line, forbidden)
            report.problems += problems[:1]
            if record is not None:
                yield record, value, notes


def _without_near_duplicates(
    records: Sequence[tuple[Record, object, Notes]], report: ConvertReport
) -> Iterator[tuple[Record, object, Notes]]:
    """Drop records that are near-duplicates of an earlier one; identical ones stay, to be counted as repeats."""
    index = NearIndex([sketch_of(record) for record, _, _ in records])
    for number, one in enumerate(records):
        near = index.find(number)
        if near is None:
            index.add(number)
        if near is None or digest_of(records[near][0]) == digest_of(one[0]):
            yield one
        else:
            report.near += 1


def is_repairable(value: object, kind: Kind | None, *, forbidden: Sequence[str]) -> bool:
    """Whether `convert_path` turns such a row into valid records; without `kind`, into those of the row's own kind."""
    row = Row(1, value)
    report = ConvertReport("", "", kind or _usual_kind([row], of_turns=False))
    try:
        _refuse_unread_answers("", [row], report.kind, is_wanted=kind is not None)
        sound = list(_sound_records([row], report, None, forbidden, of_turns=False, plain_text=False))
    except DataError:
        return False
    return bool(sound) and not report.problems


def _usual_kind(head: Sequence[Row], *, of_turns: bool) -> Kind:
    """The kind of most of the first rows; dialog if no key indicates one."""
    keyed = [{"messages": row.value} if _is_turns(row.value) else row.value for row in head if not row.problems]
    values = [transcripts_joined(unfolded(value, Counter())) for value in keyed if isinstance(value, Mapping)]
    sources = [[] if of_turns else sources_of(value, None) for value in values]
    kinds = [src[0].kind if src else kind_by_keys(value, None) for value, src in zip(values, sources, strict=True)]
    return max(KINDS, key=kinds.count)


def _refuse_unread_answers(path: str, head: Sequence[Row], kind: Kind, *, is_wanted: bool) -> None:
    """Raise `DataError` if most rows contain possible answers under keys that are not read.

    With `is_wanted`, checks the rows whose keys indicate only a prompt instead of the requested kind.
    """
    left_out: list[Mapping[str, Any]] = []
    read_as: Kind = "prompt" if is_wanted else kind
    if is_wanted and kind == "prompt":
        return  # the other rows are dropped and counted
    for row in head:
        value = row.value
        if not isinstance(value, Mapping) or any(isinstance(value.get(name), list | str) for name in LISTS):
            continue
        value = transcripts_joined(unfolded(value, Counter()))
        if sources_of(value, None) or kind_by_keys(value, kind if is_wanted else None) != read_as:
            continue
        notes = Notes()
        with suppress(DialogError):  # reported when the row is converted
            repaired_record(value, read_as, read_as, notes)
            left_out.append({name: value[name] for name in notes.left_out if name in value})
    unread = unread_answers(left_out, num_rows=len(head), by_content=read_as == "prompt")
    if not unread:
        return
    names = " and ".join(repr(shown_name(name)) for name in unread)
    example = ",".join(f"{side}={column}" for side, column in zip(SIDES, [*unread, "..."], strict=False))
    raise DataError(
        f"{path}: most rows hold texts under {names}, which nothing reads: the rows would be converted to {read_as}s without "
        f"them. If these are answers, name them: `--columns {shown_name(example)}` makes a preference with the better answer "
        "as 'chosen' and the other as 'rejected' (check which of them is the better one), `--columns response=...` a dialog. "
        f"To leave them out, add `--kind {read_as}`."
    )


def _records(row: Row, report: ConvertReport, named: Source | None, *, of_turns: bool) -> Iterator[Repaired]:
    """Yield the records of one row, repaired if possible; the report collects the problems of the rest."""
    if _is_turns(row.value):
        yield from _repaired({"messages": row.value}, row.line, report, Repair.BARE_TURNS)
        return
    if not isinstance(row.value, Mapping):
        yield row.value, Notes()
        return
    repairs = Counter([Repair.LABELLED] if isinstance(row.value, LabelledPair) else [])
    value = unfolded(row.value, repairs)
    value = value if of_turns else transcripts_joined(value)
    if report.kind == "dialog" and label_of(value) is False:
        reason = "says that the answer is a bad one, but every answer of a dialog is trained on."
        fix = "Convert with `--kind preference`, which pairs it with a good answer to the same prompt."
        report.problems.append(problem(row.line, "label", reason, fix))
        return
    sources = [named] if named else [] if of_turns else sources_of(value, report.kind)
    if not sources:
        yield from _repaired(value, row.line, report, *repairs.elements())
        return
    if len(sources) > 1:
        report.problems.append(problem(row.line, "row", f"is of those that {choice_of(sources)}", CHOICE_FIX))
        return
    is_empty = True
    try:
        for record in sources[0].convert(value):
            is_empty = False
            yield from _repaired(record, row.line, report, Repair.KNOWN_SET, *repairs.elements())
    except DialogError as error:
        report.problems.append(sources[0].problem(row.line, error))
        return
    report.without += is_empty


def _repaired(value: Mapping[str, Any], line: int, report: ConvertReport, *repairs: Repair) -> Iterator[Repaired]:
    notes = Notes(Counter(repairs))
    own = kind_by_keys(value, report.kind)
    if own != report.kind and not repairs:
        known = sources_of(value, None)
        own = known[0].kind if known else own
    if own is None:
        yield value, notes  # parsing reports what is missing
    elif own != report.kind and report.kind != "prompt":
        reason = f"is a {own} by its keys, but {report.kind}s are written here; a file holds one kind."
        keys = " and ".join(map(repr, REQUIRED[report.kind]))
        fix = (
            f"If it is a {report.kind}, say which columns are {keys} with `--columns KEY=COLUMN`; else convert the file once more with `--kind {own}` to "
            "another one."
        )
        report.problems.append(problem(line, "record", reason, fix))
    else:
        try:
            yield repaired_record(value, own, report.kind, notes), notes
        except DialogError as error:
            report.problems.append(problem(line, error.field, error.reason, error.fix))


def _make_plain(value: object, notes: Notes) -> None:
    """Remove the HTML from the record's texts; parsing rejects a value without messages."""
    parts = value.values() if isinstance(value, Mapping) else ()
    for message in (item for part in parts if isinstance(part, list) for item in part):
        if isinstance(message, dict) and isinstance(message.get("content"), str) and html_in(message["content"]):
            message["content"] = without_html(message["content"])
            notes.add(Repair.HTML)


def _check_name(out: Path) -> None:
    """Reject an output whose name a reader would take for another file type."""
    if not out.name.endswith((".jsonl", ".jsonl.gz")):
        raise UsageError(
            f"'{out}': the name of the output has another ending. Our form is JSON Lines, and readers go by the name. "
            "End it with .jsonl or .jsonl.gz."
        )


def _check_result(report: ConvertReport, *, strict: bool) -> None:
    if strict and report.problems:
        what = plural(len(report.problems), "record")
        lines = [fault.at(report.path) for fault in report.problems[:SHOWN]]
        more = len(report.problems) - len(lines)
        lines += [f"and {more} more (without `--strict` all are named)."] if more else []
        raise DataError(
            f"{report.path}: {what} cannot be repaired, and with `--strict` nothing is written. Correct the lines, or "
            "remove `--strict` to drop them.\n" + "\n".join(lines)
        )
    if not report.written:
        losses = f"{report.dropped()}{report.text()}\n" if report.problems or report.without else ""
        raise DataError(
            f"{losses}{report.path}: holds no {report.kind} that can be written, so nothing was. A file of records must "
            "hold one at least. Name its form with `--format`, what it should give with `--kind`, or correct the lines."
        )


# -- rows of a file whose format is repaired while reading


def _loose_rows(path: str, repairs: Counter[Repair]) -> Iterator[Row]:
    """Yield every row in order, with its value or its problem; repairs are counted."""
    plain = read_rows(path)
    first = next(plain, None)
    file = Path(from_home(path))
    is_lines = hub_set(path) is None and regular_file(file).suffix != ".parquet"
    if first and first.problems and not first.line:
        # Of all problems with a whole file, only the array's names this command as its fix.
        if CONVERT not in first.problems[0].fix:
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
    if is_blank(raw):
        repairs[Repair.BLANK_LINE] += 1
        return
    row = decode_line(raw, line)
    broken = row.problems and not is_cut(raw)
    parts = [decode_line(part.encode(), line) for part in _parts(raw)] if broken else []
    if any(not part.problems for part in parts):
        repairs[Repair.SEVERAL if len(parts) > 1 else Repair.COMMA] += 1
    for one in parts or [row]:
        yield from _unrolled(one, repairs)


def _unrolled(row: Row, repairs: Counter[Repair]) -> Iterator[Row]:
    """Yield the records of a list; a list of turns is a single record."""
    value = row.value
    is_records = isinstance(value, list) and value and all(isinstance(item, Mapping | list) for item in value)
    if not is_records or _is_turns(value):
        yield row
        return
    repairs[Repair.ARRAY] += 1
    for item in value:
        yield replace(row, value=item)


def _is_turns(value: object) -> bool:
    """Whether a value is a bare conversation: a list that consists only of turns."""
    return isinstance(value, list) and bool(value) and all(map(_is_turn, value))


def _is_turn(value: object) -> bool:
    return isinstance(value, Mapping) and any(key in value for key in _ROLE_KEYS) and "messages" not in value


def _parts(raw: bytes) -> list[str]:
    """The objects on a line with several, or with one and a comma; an empty list for any other line."""
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
    """Yield the items of a JSON array file; an array of turns is one dialog."""
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
            raw = stream.read(LARGEST_ARRAY + 1)
        if len(raw) > LARGEST_ARRAY:
            raise DataError(
                f"{path}: file: is an array of more than {LARGEST_ARRAY >> 30} GiB, which is read as a whole. Write one record"
                f" a line: `jq -c '.[]' {quote(str(path))} > {quote(str(converted_path(path)))}` (of .gz by way of `zcat`)."
            )
        for number, text in enumerate(_item_texts(raw.decode("utf-8-sig")), start=1):
            yield decode_line(text.encode(), number)
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: file: cannot be read after record {number} of the array ({error}), and no place after it is sure "
            "to begin a record. Correct the array there, or write one record a line."
        ) from error


def _item_texts(text: str) -> Iterator[str]:
    """Yield the JSON text of each item of an array."""
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
