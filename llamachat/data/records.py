"""The kinds of records and the rules for each: parses decoded JSON into frozen records or problems.

    dialog       {"messages": [...], "is_safe": bool (optional)}
    preference   {"prompt": [...], "chosen": [one answer], "rejected": [one answer], "rating": word (optional),
                  "chosen_is_safe": bool, "rejected_is_safe": bool (optional)}
    prompt       {"prompt": [...], "is_safety": bool (optional), "id": str (optional)}

A key that looks like a misspelt known key is a problem, since its value (a rating, a mask) would be lost. Any other
unknown key is ignored and reported. An optional key with null counts as absent.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal, cast, get_args

from llamachat.chat_format.dialog import (
    Dialog,
    DialogError,
    EndsWith,
    Message,
    check_message,
    check_messages,
    check_texts,
    parse_message,
    parse_messages,
    with_system,
)
from llamachat.data.problems import Problem, problem
from llamachat.errors import kind_word

Kind = Literal["dialog", "preference", "prompt"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Rating = Literal["significantly_better", "better", "slightly_better", "negligibly_better"]
RATINGS: tuple[Rating, ...] = get_args(Rating)

KEYS: dict[Kind, tuple[str, ...]] = {
    "dialog": ("messages", "is_safe"),
    "preference": ("prompt", "chosen", "rejected", "rating", "chosen_is_safe", "rejected_is_safe"),
    "prompt": ("prompt", "is_safety", "id"),
}
REQUIRED: dict[Kind, tuple[str, ...]] = {
    "dialog": ("messages",),
    "preference": ("prompt", "chosen", "rejected"),
    "prompt": ("prompt",),
}
_MESSAGE_KEYS = ("role", "content", "train")
_MISSPELT = 0.8  # similarity from which a name counts as a misspelling of a known key
_KEYS_OF_ALL = frozenset(key for keys in KEYS.values() for key in keys)
# The paper also calls its lowest rating "unsure" (Llama 2, section 3.2.1); "much_better" is common for its highest.
_RATING_ALIASES: dict[str, Rating] = {"unsure": "negligibly_better", "much_better": "significantly_better"}
_LABEL_NAMES = ("label", "kto_tag", "desirable", "is_desirable", "is_good")
# Spellings of a label for good and bad answers; numbers count only in KTO's format.
_LABELS = {
    **dict.fromkeys(("true", "chosen", "good", "desirable"), True),
    **dict.fromkeys(("false", "rejected", "bad", "undesirable"), False),
}
_NUMBERS = {"1": True, "1.0": True, "0": False, "0.0": False, "-1": False, "-1.0": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two answers to one prompt, with the strength of the preference and safety labels, if known."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    rating: Rating | None = None
    chosen_is_safe: bool | None = None
    rejected_is_safe: bool | None = None
    source: str = field(default="", compare=False, repr=False)  # path of its file


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation to answer; `is_safety` marks a prompt that asks for something unsafe (read by the gate)."""

    messages: tuple[Message, ...]
    is_safety: bool = False
    id: str | None = None


# The problem of a dialog whose label marks the answer as bad.
BAD_ANSWER = (
    "label",
    "says that the answer is a bad one, but every answer of a dialog is trained on.",
    "Drop the record; `llamachat data convert` does it, and with `--kind preference` pairs it with a good one.",
)

Record = Dialog | Preference | Prompt
KIND_OF: dict[type[Record], Kind] = {Dialog: "dialog", Preference: "preference", Prompt: "prompt"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file: its value or its problems and, once parsed, its record or its problems.

    A parsed row with neither a record nor problems belongs to a known data set and contains no record.
    """

    line: int  # the row number from 1 in files without lines; 0 for the whole file
    value: Any = None
    problems: tuple[Problem, ...] = ()
    kind: Kind | None = None
    record: Record | None = None
    unused: tuple[str, ...] = ()  # ignored keys


def bad_row(line: int, field: str, reason: str, fix: str) -> Row:
    """A row that consists of one problem."""
    return Row(line, problems=(problem(line, field, reason, fix),))


@lru_cache(maxsize=4096)
def slip_of(name: str, known: tuple[str, ...]) -> str | None:
    """The known key that this name misspells, or None.

    A name that extends a key (prompt_id) has its own meaning and is not a misspelling.
    """
    near = get_close_matches(name.strip().lower(), known, n=1, cutoff=_MISSPELT)
    return near[0] if near and len(near[0]) >= 4 and not name.startswith(f"{near[0]}_") else None


def nearest_key(name: str) -> tuple[str, str] | None:
    """The known key that an unused key equals or resembles most, and the kind of object that has it."""
    owners = dict.fromkeys(_MESSAGE_KEYS, "message") | {key: kind for kind in KINDS for key in KEYS[kind]}
    near = get_close_matches(name, owners, n=1)
    return (near[0], owners[near[0]]) if near and not name.startswith(f"{near[0]}_") else None


def rating_meant(text: str) -> Rating | None:
    """The rating that a text clearly means: ours in another spelling, or a common synonym."""
    plain = _plain(text)
    return _RATING_ALIASES.get(plain) or next((rating for rating in RATINGS if rating == plain), None)


def _plain(text: str) -> str:
    return "_".join(text.lower().replace("-", " ").replace("_", " ").split())


def kind_of(value: object) -> Kind | None:
    """The kind of record that the keys indicate, or None."""
    if not isinstance(value, Mapping):
        return None
    if "messages" in value:
        return "dialog"
    if "chosen" in value or "rejected" in value:
        return "preference"
    return "prompt" if "prompt" in value else None


def label_of(row: Mapping[str, Any]) -> bool | None:
    """Whether a labelled answer is good (`label` in KTO's data); None without a label."""
    for name in _LABEL_NAMES:
        value = row.get(name)
        word = str(value).strip().lower() if isinstance(value, str | int | float) else ""
        is_of_kto = name != "label" or "completion" in row or "response" in row
        label = _LABELS.get(word, _NUMBERS.get(word) if is_of_kto else None)
        if label is not None:
            return label
    return None


def digest_of(record: Record) -> bytes:
    """A digest that is equal for records with equal content, whatever their JSON formatting."""
    return hashlib.blake2b(repr(record).encode("utf-8", "backslashreplace"), digest_size=16).digest()


def messages_of(record: Record) -> tuple[Message, ...]:
    """The messages of a record; of a preference only the prompt."""
    return record.prompt if isinstance(record, Preference) else record.messages


def record_with_system(record: Record, system: str | None) -> Record:
    """The record with this system text, unless it already has one."""
    if system is None:
        return record
    messages = with_system(messages_of(record), system)
    return replace(record, prompt=messages) if isinstance(record, Preference) else replace(record, messages=messages)


def as_prompt(record: Record) -> Prompt:
    """The prompt of a record: a dialog up to its last user turn, or a preference without its answers."""
    if isinstance(record, Prompt):
        return record
    messages = messages_of(record)
    return Prompt(messages=messages if messages[-1].role == "user" else messages[:-1])


def first_user_turn(record: Record) -> str:
    """The first user text, which decides the record's side of the split."""
    return next(message.content for message in messages_of(record) if message.role == "user")


def parse_record(
    value: object, kind: Kind, line: int, forbidden: Sequence[str], *, is_context: bool = False
) -> tuple[Record | None, tuple[Problem, ...], tuple[str, ...]]:
    """Parse a record; return it (None if there are problems), the problems of all fields, and its unused keys.

    No message may contain a text in `forbidden` (`ChatFormat.forbidden`). With `is_context`, a dialog is read as a
    prompt: it may end with a question and needs no trained answer.
    """
    parser = _Parser(line, forbidden)
    record = parser.record(value, kind, is_context=is_context)
    return None if parser.problems else record, tuple(parser.problems), tuple(parser.unused)


class _Noting:
    """A context manager that records a `DialogError` and continues; `@contextmanager` costs more than the checks."""

    __slots__ = ("_parser",)

    def __init__(self, parser: "_Parser") -> None:
        self._parser = parser

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, DialogError):
            return False
        self._parser.note(error.field, error.reason, error.fix)
        return True


@dataclass(slots=True)
class _Parser:
    """Parses one record; a problem is recorded and parsing continues with the next field."""

    line: int
    forbidden: Sequence[str]
    problems: list[Problem] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def note(self, name: str, reason: str, fix: str) -> None:
        self.problems.append(problem(self.line, name, reason, fix))

    def noting(self) -> "_Noting":
        """Record any `DialogError` raised inside the block."""
        return _Noting(self)

    def record(self, value: object, kind: Kind, *, is_context: bool) -> Record | None:
        if not isinstance(value, Mapping):
            self.note(
                "line", f"is {kind_word(value)}, but a record is an object.", f"Write {_shape(kind)}, or drop it."
            )
            return None
        row = cast(Mapping[str, Any], value)
        self.check_keys(row, KEYS[kind], "", kind)
        for key in REQUIRED[kind]:
            if row.get(key) is None:
                self.note_missing(row, key, kind)
        if kind == "dialog":
            return self.dialog(row, is_context=is_context)
        return self.preference(row) if kind == "preference" else self.prompt(row)

    def dialog(self, row: Mapping[str, Any], *, is_context: bool) -> Dialog | None:
        messages = self.messages(row, "messages", "either" if is_context else "assistant")
        is_safe = self.boolean(row, "is_safe")
        if not is_context and label_of(row) is False:
            self.note(*BAD_ANSWER)
        is_usable = is_context or any(message.train is not False for message in messages if message.role == "assistant")
        if messages and not self.problems and not is_usable:
            self.note(
                "messages",
                "has 'train': false on every answer, so there is nothing to learn.",
                "Remove it from the answers to train on, or drop the record.",
            )
        return Dialog(messages, is_safe) if messages else None

    def preference(self, row: Mapping[str, Any]) -> Preference | None:
        prompt = self.messages(row, "prompt", "user")
        chosen, rejected = self.answer(row, "chosen"), self.answer(row, "rejected")
        if chosen and rejected and chosen.content.strip() == rejected.content.strip():
            self.note("rejected", "is the same answer as 'chosen', so there is nothing to compare.", "Drop the record.")
        rating = self.rating(row)
        is_safe: dict[str, Any] = {key: self.boolean(row, key) for key in ("chosen_is_safe", "rejected_is_safe")}
        if not prompt or chosen is None or rejected is None:
            return None
        return Preference(prompt=prompt, chosen=chosen, rejected=rejected, rating=rating, **is_safe)

    def prompt(self, row: Mapping[str, Any]) -> Prompt | None:
        messages = self.messages(row, "prompt", "user")
        is_safety = bool(self.boolean(row, "is_safety"))
        name = row.get("id")
        if name is not None and not isinstance(name, str):
            reason = f"is {kind_word(name)}, but an id is a string."
            self.note("id", reason, f'Write "{name}" in quotes, or take it out.')
        elif name is not None and not name.isprintable():
            self.note("id", f"is {_short(name)}, which cannot be written out.", "Write it with printable characters.")
        return Prompt(messages=messages, is_safety=is_safety, id=name) if messages else None

    def messages(self, row: Mapping[str, Any], key: str, ends_with: EndsWith) -> tuple[Message, ...]:
        """Parse the messages under a key; () if they are unreadable. Each violated rule is recorded."""
        value = row.get(key)
        if value is None:
            return ()
        messages = self.readable_messages(value, key)
        if messages or value == []:
            with self.noting():
                check_messages(messages, ends_with=ends_with, field=key)
            self.check_texts(messages, key)
        return messages

    def check_texts(self, messages: Sequence[Message], key: str) -> None:
        """Record the first text that contains a tag of the chat format."""
        if self.forbidden:
            with self.noting():
                check_texts(messages, self.forbidden, field=key)

    def readable_messages(self, value: object, key: str) -> tuple[Message, ...]:
        """Parse the messages; () if one is unreadable. Each such problem is recorded."""
        if not isinstance(value, list):
            with self.noting():
                return parse_messages(value, field=key)
            return ()
        messages: list[Message] = []
        num_problems = len(self.problems)
        noting = self.noting()
        for index, item in enumerate(value):
            at = f"{key}[{index}]"
            if isinstance(item, (dict, Mapping)):
                self.check_keys(item, _MESSAGE_KEYS, at, "message")
            with noting:
                messages.append(parse_message(item, at))
        return tuple(messages) if len(self.problems) == num_problems else ()

    def answer(self, row: Mapping[str, Any], key: str) -> Message | None:
        """The single assistant message under 'chosen' or 'rejected'."""
        value = row.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != 1:
            self.note_no_answer(row, key)
            return None
        message = next(iter(self.readable_messages(value, key)), None)
        if message is not None and message.role != "assistant":
            self.note(f"{key}[0].role", f"is '{message.role}', but an answer is the assistant's.", "Write 'assistant'.")
            return None
        if message is not None:
            with self.noting():
                check_message(message, f"{key}[0]")
            self.check_texts([message], key)
        return message

    def note_no_answer(self, row: Mapping[str, Any], key: str) -> None:
        value = row[key]
        what = f"is a list of {len(value)} messages" if isinstance(value, list) else f"is {kind_word(value)}"
        fix = f'Write "{key}": [{{"role": "assistant", "content": "..."}}].'
        if isinstance(value, list) and value:
            is_repeat = value[:-1] == row.get("prompt")
            what += ", the prompt among them" if is_repeat else ", and they do not start with 'prompt'"
            fix = "Keep its last message alone." if is_repeat else "Keep the answer to 'prompt' alone, or drop it."
        self.note(key, f"{what}, but it is one answer to the prompt that both share.", fix)

    def rating(self, row: Mapping[str, Any]) -> Rating | None:
        value = row.get("rating")
        if value is None or value in RATINGS:
            return value
        words = ", ".join(RATINGS)
        if not isinstance(value, str):
            fix = f"Write one of {words}, or take it out."
            self.note("rating", f"is {kind_word(value)}, but a rating is a word.", fix)
            return None
        near = rating_meant(value) or next(iter(get_close_matches(_plain(value), RATINGS, n=1)), None)
        fix = f"Write '{near}'." if near else "Write one of them, or take it out."
        self.note("rating", f"is {_short(value)}, but the ratings are {words}.", fix)
        return None

    def boolean(self, row: Mapping[str, Any], key: str) -> bool | None:
        value = row.get(key)
        if value is None or isinstance(value, bool):
            return value
        self.note(key, f"is {_short(value)}, but it is true, false or absent.", "Write true or false, without quotes.")
        return None

    def check_keys(self, row: Mapping[str, Any], known: tuple[str, ...], at: str, what: str) -> None:
        """Check for unknown keys: a likely misspelling of an absent known key is a problem, any other key is unused."""
        for key in row:
            if key in known:
                continue
            name = f"{at}.{key}" if at else str(key)
            # A known key of another kind of record is not a misspelling.
            near = slip_of(key, known) if isinstance(key, str) and key not in _KEYS_OF_ALL else None
            if near and near not in row:
                self.note(
                    name,
                    f"is no key of a {what}, and what it says would be lost ({', '.join(known)}).",
                    f"Rename it '{near}' if that is meant, or take it out.",
                )
            else:
                self.unused.append(name)

    def note_missing(self, row: Mapping[str, Any], key: str, kind: Kind) -> None:
        if any(slip.field in row and f"'{key}'" in slip.fix for slip in self.problems):
            return  # already reported as a misspelt key
        other = kind_of(row)
        present = ", ".join(repr(name) for name in list(row)[:8]) or "nothing"
        inner = next((name for name, value in row.items() if other is None and _holds_records(value)), None)
        what = "null" if key in row else f"missing; the record holds {present}"
        if other is not None and other != kind and not any(name in row for name in REQUIRED[kind]):
            fix = f"It looks like a {other}: move it to a file of those, or name that file where {other}s are read."
        elif inner is not None:
            fix = f"If the records are under {inner!r}, take them out: `jq -c '.{json.dumps(inner)}[]' IN > OUT`."
        else:
            fix = (
                f"Write {_shape(kind)}, or name the form with `--format` or the columns with `--columns` (in a recipe the "
                "source's 'format' and 'columns')."
            )
        self.note(key, f"is {what}, but a {kind} needs it.", fix)


def _holds_records(value: object) -> bool:
    """Whether a value is a list of objects other than turns."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, Mapping) and not {"role", "from"} & item.keys() for item in value)
    )


def _shape(kind: Kind) -> str:
    return "{" + ", ".join(f'"{key}": [...]' for key in REQUIRED[kind]) + "}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
