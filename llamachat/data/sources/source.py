"""Known public data sets: a source describes one and converts its raw rows to our records.

A converter reads one row and does not know the file: it raises `DialogError` with the field, what is required and the
fix, and the file reader adds file and line. It checks only the row's shape; the record itself checks the rules for all
records (alternating turns, no empty text, no control tags).

The strength of a preference is mapped to one of the paper's four ratings (Llama 2, section 3.2.1):

| rating               | HelpSteer2/3 preference | HelpSteer2 helpfulness | UltraFeedback fine-grained | UltraFeedback overall |
|----------------------|-------------------------|------------------------|----------------------------|-----------------------|
| significantly_better | 3 (much better)         | apart by 3 or 4 of 4   | apart by 2 or more of 4    | apart by 4 or more of 9 |
| better               | 2 (better)              | apart by 2             | by 1 or more               | by 2 or more          |
| slightly_better      | 1 (slightly better)     | apart by 1             | by 0.5 or more             | by 1 or more          |
| negligibly_better    |                         |                        | by less                    | by less               |
| no pair              | 0 (about the same)      | equal                  | equal                      | equal                 |

The first column uses the sets' own terms (cards of nvidia/HelpSteer2 and nvidia/HelpSteer3); the others are ours. Equal
answers give no pair, since neither is chosen; the reader counts these rows as dropped. `llamachat.data.sources.oasst`
handles the ranks of OASST; PKU-SafeRLHF, BeaverTails and hh-rlhf have no grades.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from llamachat.chat_format.dialog import DialogError
from llamachat.data.problems import Problem, problem
from llamachat.data.records import Kind, Row, bad_row
from llamachat.errors import kind_word

RawRecord = dict[str, Any]
Steps = tuple[float, float, float]  # minimum differences for slightly_better, better, significantly_better

_OWN_LISTS = ("messages", "prompt", "chosen")
_HIGHEST = 1e9  # maximum score


class RawRow(dict[str, Any]):
    """An object of a data set, read field by field; an invalid field raises `DialogError`."""

    def __missing__(self, name: str) -> Any:
        raise DialogError(name, "is missing, but it is required there.", "Add it, or name the right 'format'.")

    def required(self, name: str, what: str, is_sound: Callable[[Any], bool]) -> Any:
        value = self.get(name)
        return value if is_sound(value) else _refuse(value, name, what)

    def text(self, name: str) -> str:
        """The text of a required field."""
        return as_text(self[name], name)

    def optional_text(self, name: str) -> str:
        """The text of an optional field; "" if it is absent, null or empty."""
        return "" if self.get(name) is None else as_text(self[name], name)

    def number(self, name: str) -> float:
        # NaN and infinity are valid Python numbers but not scores; differences of huge scores cannot be computed.
        what = f"a number up to {_HIGHEST:g}, which says which answer is better,"
        return self.required(name, what, lambda value: type(value) in (int, float) and abs(value) <= _HIGHEST)

    def boolean(self, name: str) -> bool:
        return self.required(name, "true or false", lambda value: isinstance(value, bool))

    def entries(self, name: str) -> list[Any]:
        """The list in a required field, with at least one entry."""
        what = "a list with at least one entry"
        return self.required(name, what, lambda value: isinstance(value, list) and bool(value))

    def objects(self, name: str) -> "list[RawRow]":
        """The objects in such a list."""
        return [as_row(item, f"{name}[{index}]") for index, item in enumerate(self.entries(name))]

    def messages(self, name: str) -> list[dict[str, str]]:
        """The messages (role and content) in such a list."""
        turns = [as_row(turn, name) for turn in self.entries(name)]
        texts = [[as_text(turn.get(key), f"{name}.{key}") for key in ("role", "content")] for turn in turns]
        return [message(role, content) for role, content in texts]


def as_row(value: object, where: str) -> RawRow:
    """The object at `where` in a row."""
    return RawRow(value) if isinstance(value, Mapping) else _refuse(value, where, "an object")


def as_text(value: object, where: str) -> str:
    """The text at `where` in a row."""
    return value if isinstance(value, str) else _refuse(value, where, "text")


def _refuse(value: object, where: str, what: str) -> NoReturn:
    names = {"a string": "text", "null": "nothing"}
    kind = names.get(kind_word(value), kind_word(value))
    if value == []:
        kind = "an empty list"
    elif value != value:
        kind = "no number (NaN)"
    raise DialogError(where, f"holds {kind}, but {what} is required there.", "Correct or remove the row.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """How to join adjacent rows with a common key into the row that the converter reads, for sets stored as tables.

    `join` gets the rows in order, at least one, and raises `DialogError` like a converter.
    """

    fields: frozenset[str]
    key: str
    join: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A known data set: the kind of its records, the raw fields that identify it, and its converter.

    Two sources may share fields (a tree of ranked answers contains both dialogs and preferences): the requested kind
    decides between them, and among sources of one kind the one with more fields is the closer match. `shape` checks the
    rows beyond the names of their fields. `has_lists`: rows contain lists of messages under our keys, but in another
    format.
    """

    name: str
    kind: Kind
    fields: frozenset[str]
    converter: Callable[[RawRow], Iterator[RawRecord]]
    shape: Callable[[Mapping[str, Any]], bool] = lambda row: True
    has_lists: bool = False
    gather: Gather | None = None

    def convert(self, row: Mapping[str, Any]) -> Iterator[RawRecord]:
        """Yield the records of a row."""
        return self.converter(RawRow(row))

    def fits(self, row: Mapping[str, Any]) -> bool:
        """Whether a row has the fields of this data set with the expected content."""
        return self.fields <= row.keys() and self.shape(row)

    def problem(self, line: int, error: DialogError) -> Problem:
        """Convert a converter's error to a problem of the file."""
        return problem(line, error.field, f"{error.reason} The row is read as {self.name}.", error.fix)


def source(kind: Kind, fields: str, **more: Any) -> Callable[[Callable[[RawRow], Iterator[RawRecord]]], Source]:
    """Decorate a converter to make it a source named after it; `fields` are separated by spaces."""

    def make(convert: Callable[[RawRow], Iterator[RawRecord]]) -> Source:
        return Source(name=convert.__name__, kind=kind, fields=frozenset(fields.split()), converter=convert, **more)

    return make


# -- detecting the data set of a row


def fitting_sources(row: Mapping[str, Any], kind: Kind | None, sources: Iterable[Source]) -> list[Source]:
    """The data sets that a row may belong to for this kind: none, one, or several with indistinguishable fields.

    A data set of another kind does not match, except that prompts are read from any kind.
    """
    # Data sets in other formats use the same names for texts and trees.
    is_own = any(isinstance(row.get(key), list) for key in _OWN_LISTS)
    fitting = [source for source in sources if (source.has_lists or not is_own) and source.fits(row)]
    wanted = [source for source in fitting if source.kind == kind] or (fitting if kind in (None, "prompt") else [])
    most = max((len(source.fields) for source in wanted), default=0)
    closest = [source for source in wanted if len(source.fields) == most]
    alike = [source for source in closest if source.kind == closest[0].kind]
    return alike[:1] if kind == "prompt" else alike  # similar sets differ only in which answer wins


def choice_of(sources: Sequence[Source]) -> str:
    """Part of the error message for rows that match several data sets."""
    names = " and ".join(f"'{source.name}'" for source in sources)
    return (
        f"hold {sources[0].kind}s of several meanings, which the formats {names} give, and the fields do not decide "
        "which one is meant."
    )


CHOICE_FIX = "Name one of these as the format."


def gathered(rows: Iterable[Row], kind: Kind | None, sources: Iterable[Source]) -> Iterator[Row]:
    """Yield the rows, with related rows of a table merged into one that has the first one's line number.

    Only applies to tables of these data sets that yield records of this kind.
    """
    gathers = dict.fromkeys(
        source.gather for source in sources if source.gather and kind in (None, "prompt", source.kind)
    )
    if not gathers:
        yield from rows
        return
    keys = {gather.key for gather in gathers}
    group: list[Row] = []
    own: Gather | None = None
    for row in rows:
        if row.problems:
            yield row
            continue
        may_be = not isinstance(row.value, dict) or not keys.isdisjoint(row.value)
        gather = next((gather for gather in gathers if _is_of(row.value, gather)), None) if may_be else None
        if own and gather is own and row.value[own.key] == group[0].value[own.key]:
            group.append(row)
            continue
        if own:
            yield _joined(group, own)
        own, group = gather, [row]
        if gather is None:
            yield row
    if own:
        yield _joined(group, own)


def _is_of(value: object, gather: Gather) -> bool:
    return isinstance(value, Mapping) and gather.fields <= value.keys() and isinstance(value[gather.key], str)


def _joined(group: list[Row], gather: Gather) -> Row:
    try:
        return Row(group[0].line, gather.join([row.value for row in group]))
    except DialogError as error:
        return bad_row(group[0].line, error.field, error.reason, error.fix)


# -- parts of a record


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def joined(instruction: str, text: str) -> str:
    """One user turn from an instruction and its optional input text."""
    return f"{instruction}\n\n{text}" if text.strip() else instruction


def answered(question: str, answer: str) -> RawRecord:
    """The dialog of a question and its answer."""
    return {"messages": [message("user", question), message("assistant", answer)]}


def pair(prompt: Sequence[Mapping[str, Any]], chosen: str, rejected: str, **labels: Any) -> RawRecord:
    """The preference between two answers to a prompt."""
    answers = {"chosen": [message("assistant", chosen)], "rejected": [message("assistant", rejected)]}
    return {"prompt": list(prompt), **answers, **labels}


def pair_of_dialogs(chosen: Sequence[dict[str, str]], rejected: Sequence[dict[str, str]], **labels: Any) -> RawRecord:
    """The preference between two dialogs that differ only in their last answer."""
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise DialogError(
                side,
                "does not end with an answer to a question, but it holds the whole dialog here, and the answers at the "
                "end are what a pair compares.",
                "Add what is missing, or remove the row.",
            )
    if chosen[:-1] != rejected[:-1]:
        raise DialogError(
            "rejected",
            "differs from 'chosen' before the last answer. A pair must share its prompt, since the loss compares two "
            "answers to one question.",
            "Truncate both where they start to differ, or remove the row.",
        )
    return pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"], **labels)


def rating_of_difference(difference: float, steps: Steps) -> str:
    """The rating of a pair whose answers differ by this amount."""
    assert difference > 0, "the chosen answer is the better one"
    ratings = ("negligibly_better", "slightly_better", "better", "significantly_better")
    return ratings[sum(difference >= step for step in steps)]


def graded_pair(
    prompt: Sequence[dict[str, str]], answers: tuple[str, str], difference: float, steps: Steps
) -> Iterator[RawRecord]:
    """The pair whose second answer is better by `difference` (negative: the first is); none if they are equal."""
    if difference:
        rejected, chosen = answers if difference > 0 else answers[::-1]
        yield pair(prompt, chosen, rejected, rating=rating_of_difference(abs(difference), steps))
