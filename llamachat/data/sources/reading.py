"""Which known set a row is of, and rows of tables put together, before a converter sees them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from llamachat.data.jsonl import Row as FileRow
from llamachat.data.problems import Problem, problem
from llamachat.data.records import Kind
from llamachat.data.sources.source import Gather, Row, Source

_OWN_LISTS = ("messages", "prompt", "chosen")


def fitting_sources(row: Row, kind: Kind | None, sources: Iterable[Source]) -> list[Source]:
    """The sets that a row may be of where this kind is wanted: none, one, or those that its fields cannot tell apart.

    A row of a set that gives another kind is of none; prompts are taken from any.
    """
    # Sets in other forms use the same names for texts and trees.
    is_own = any(isinstance(row.get(key), list) for key in _OWN_LISTS)
    fitting = [source for source in sources if (source.has_lists or not is_own) and source.fits(row)]
    wanted = [source for source in fitting if source.kind == kind] or (fitting if kind in (None, "prompt") else [])
    if not wanted:
        return []
    most = max(len(source.fields) for source in wanted)
    closest = [source for source in wanted if len(source.fields) == most]
    alike = [source for source in closest if source.kind == closest[0].kind]
    return alike[:1] if kind == "prompt" else alike  # the sets that are alike differ in which answer wins alone


def choice_of(sources: Sequence[Source]) -> str:
    """What to say where rows may be of several sets."""
    names = " and ".join(f"'{source.name}'" for source in sources)
    kinds = f"{sources[0].kind}s"
    return (
        f"hold {kinds} of several meanings, which the formats {names} give, and the fields cannot tell which one is "
        f"meant. Name one of these as the format."
    )


def gathers_of(kind: Kind | None, sources: Iterable[Source]) -> list[Gather]:
    """How these sets' tables are put together, where such records are wanted."""
    found = [source.gather for source in sources if kind in (None, "prompt", source.kind)]
    return list(dict.fromkeys(gather for gather in found if gather is not None))


def gathered(rows: Iterator[FileRow | Problem], gathers: Sequence[Gather]) -> Iterator[FileRow | Problem]:
    """The rows, those that belong together as one row with the first one's line; every other row as it is."""
    held: list[FileRow] = []
    own: Gather | None = None
    for row in rows:
        if isinstance(row, Problem):
            yield row
            continue
        gather = next((gather for gather in gathers if _is_of(row.value, gather)), None)
        if held and own is not None:
            if gather is own and row.value[own.key] == held[0].value[own.key]:
                held.append(row)
                continue
            yield _joined(held, own)
        own, held = gather, [] if gather is None else [row]
        if gather is None:
            yield row
    if held and own is not None:
        yield _joined(held, own)


def source_problem(line: int, text: str) -> Problem:
    """A converter's text begins with the quoted field and ends with the mend."""
    parts = text.split("'", 2)
    name, rest = (parts[1], parts[2].strip()) if text.startswith("'") and len(parts) == 3 else ("row", text)
    reason, separator, mend = rest.rpartition(". ")
    return problem(line, name, reason + separator.strip(), mend)


def _is_of(value: object, gather: Gather) -> bool:
    return isinstance(value, Mapping) and gather.fields <= value.keys() and isinstance(value[gather.key], str)


def _joined(held: list[FileRow], gather: Gather) -> FileRow | Problem:
    try:
        return FileRow(held[0].line, gather.join([row.value for row in held]))
    except ValueError as error:
        return source_problem(held[0].line, str(error))
