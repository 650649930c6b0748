"""What a record is, by kind, and every rule that one must keep: decoded JSON in, frozen records or problems out.

    dialog       {"messages": [...], "is_safe": bool (optional)}
    preference   {"prompt": [...], "chosen": [one answer], "rejected": [one answer], "rating": word (optional),
                  "chosen_is_safe": bool, "rejected_is_safe": bool (optional)}
    prompt       {"prompt": [...], "is_safety": bool (optional), "id": str (optional)}

A key that looks like a misspelt known one is a problem, since what it says would be lost (a rating, a mask); any other
unknown key is left out and named. An optional key with null counts as absent.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, Literal, Protocol, cast, get_args

from llamachat.chat_format.dialog import Dialog, DialogError, EndsWith, Message, check_messages, parse_messages
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
_MISSPELT = 0.8  # similarity of two names from which one is taken for a slip of the other
_KEYS_OF_ALL = frozenset(key for keys in KEYS.values() for key in keys)
# "unsure" is the paper's other word for its lowest rating (Llama 2, section 3.2.1), the other a usual one for its highest.
_RATING_ALIASES: dict[str, Rating] = {"unsure": "negligibly_better", "much_better": "significantly_better"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two answers to one prompt, how much the better one is better, and which of them are safe, where known."""

    prompt: tuple[Message, ...]
    chosen: Message
    rejected: Message
    rating: Rating | None = None
    chosen_is_safe: bool | None = None
    rejected_is_safe: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is to be answered; `is_safety` marks a prompt that asks for something unsafe (the gate reads it)."""

    messages: tuple[Message, ...]
    is_safety: bool = False
    id: str | None = None


Record = Dialog | Preference | Prompt


class TextCheck(Protocol):
    """A rule on the texts of messages: `ChatFormat.check_text`, which refuses the format's own tags."""

    def __call__(self, messages: Sequence[Message], *, field: str = "messages") -> None: ...


@dataclass(slots=True)
class Findings:
    """What parsing one record found beside the record: problems, and keys that nothing reads."""

    line: int
    problems: list[Problem] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def add(self, name: str, reason: str, mend: str) -> None:
        self.problems.append(problem(self.line, name, reason, mend))

    def attempt(self, check: Callable[[], None]) -> None:
        """Run a check that raises `DialogError`, and note what it raises."""
        try:
            check()
        except DialogError as error:
            self.add(error.field, error.reason, error.fix)


@lru_cache(maxsize=4096)
def slip_of(name: str, known: tuple[str, ...]) -> str | None:
    """The known key that this one misspells, or None.

    A name that adds to a key (prompt_id) has a meaning of its own.
    """
    near = get_close_matches(name, known, n=1, cutoff=_MISSPELT)
    return near[0] if near and len(near[0]) >= 4 and not name.startswith(f"{near[0]}_") else None


def nearest_key(name: str) -> tuple[str, str] | None:
    """The known key that an unused one is or is most like, and what has it."""
    owners = dict.fromkeys(_MESSAGE_KEYS, "message") | {key: kind for kind in KINDS for key in KEYS[kind]}
    near = get_close_matches(name, owners, n=1)
    return (near[0], owners[near[0]]) if near and not name.startswith(f"{near[0]}_") else None


def rating_meant(text: str) -> Rating | None:
    """The rating that a text means beyond doubt: ours in another spelling, or a usual other word for one."""
    plain = _plain(text)
    return _RATING_ALIASES.get(plain) or next((rating for rating in RATINGS if rating == plain), None)


def _plain(text: str) -> str:
    return "_".join(text.lower().replace("-", " ").replace("_", " ").split())


def kind_of(value: object) -> Kind | None:
    """The kind of record that the keys tell; None where they tell none."""
    if not isinstance(value, Mapping):
        return None
    if "messages" in value:
        return "dialog"
    if "chosen" in value or "rejected" in value:
        return "preference"
    return "prompt" if "prompt" in value else None


def parse_record(
    value: object, kind: Kind, line: int, check_text: TextCheck, *, is_context: bool = False
) -> tuple[Record | None, Findings]:
    """The record, or None where it has problems; all problems of its fields are found, not the first alone.

    With `is_context` a dialog is read for what it asks: it may end with a question, and need not hold a learnt answer.
    """
    found = Findings(line)
    if not isinstance(value, Mapping):
        found.add("line", f"is {kind_word(value)}, but a record is an object.", f"Write {_shape(kind)}, or drop it.")
        return None, found
    row = cast(Mapping[str, Any], value)
    _check_keys(row, KEYS[kind], "", kind, found)
    missing = [key for key in REQUIRED[kind] if row.get(key) is None]
    for key in missing:
        _add_missing(row, key, kind, found)
    if kind == "dialog":
        record = _dialog(row, found, check_text, is_context=is_context)
    else:
        record = (_preference if kind == "preference" else _prompt)(row, found, check_text)
    return (None if found.problems else record), found


def digest_of(record: Record) -> bytes:
    """The same for two records that say the same, however they are written."""
    return hashlib.blake2b(repr(record).encode("utf-8", "backslashreplace"), digest_size=16).digest()


def with_system(record: Record, system: str) -> Record:
    """The record with this system text, where it has none."""
    added = Message("system", system)
    messages = record.messages if isinstance(record, (Dialog, Prompt)) else record.prompt
    if messages[0].role == "system":
        return record
    if isinstance(record, Dialog):
        return Dialog((added, *messages), record.is_safe)
    if isinstance(record, Prompt):
        return Prompt(messages=(added, *messages), is_safety=record.is_safety, id=record.id)
    return Preference(
        prompt=(added, *messages),
        chosen=record.chosen,
        rejected=record.rejected,
        rating=record.rating,
        chosen_is_safe=record.chosen_is_safe,
        rejected_is_safe=record.rejected_is_safe,
    )


def as_prompt(record: Record) -> Prompt:
    """What a record asks: a dialog up to its last user turn, a preference without its answers."""
    if isinstance(record, Prompt):
        return record
    if isinstance(record, Preference):
        return Prompt(messages=record.prompt)
    is_open = record.messages[-1].role == "user"
    return Prompt(messages=record.messages if is_open else record.messages[:-1])


def first_user_turn(record: Record) -> str:
    """The text that decides which side of a split the record falls on."""
    messages = record.prompt if isinstance(record, Preference) else record.messages
    return next(message.content for message in messages if message.role == "user")


def _dialog(row: Mapping[str, Any], found: Findings, check_text: TextCheck, *, is_context: bool) -> Dialog | None:
    messages = _messages(row, "messages", "either" if is_context else "assistant", found, check_text)
    is_safe = _boolean(row, "is_safe", found)
    is_learnt = is_context or any(message.train is not False for message in messages if message.role == "assistant")
    if messages and not found.problems and not is_learnt:
        found.add(
            "messages",
            "has 'train': false on every answer, so there is nothing to learn.",
            "Take it out of the answers that are to be learnt, or drop the record.",
        )
    return Dialog(messages, is_safe) if messages else None


def _preference(row: Mapping[str, Any], found: Findings, check_text: TextCheck) -> Preference | None:
    prompt = _messages(row, "prompt", "user", found, check_text)
    chosen = _answer(row, "chosen", found, check_text)
    rejected = _answer(row, "rejected", found, check_text)
    if chosen and rejected and chosen.content.strip() == rejected.content.strip():
        found.add("rejected", "is the same answer as 'chosen', so there is nothing to compare.", "Drop the record.")
    rating = _rating(row, found)
    labels = {key: _boolean(row, key, found) for key in ("chosen_is_safe", "rejected_is_safe")}
    if not prompt or chosen is None or rejected is None:
        return None
    return Preference(prompt=prompt, chosen=chosen, rejected=rejected, rating=rating, **labels)


def _prompt(row: Mapping[str, Any], found: Findings, check_text: TextCheck) -> Prompt | None:
    messages = _messages(row, "prompt", "user", found, check_text)
    is_safety = bool(_boolean(row, "is_safety", found))
    name = row.get("id")
    if name is not None and not isinstance(name, str):
        found.add("id", f"is {kind_word(name)}, but an id is a string.", f'Write "{name}" in quotes, or take it out.')
        name = None
    elif name is not None and not name.isprintable():
        found.add("id", f"is {_short(name)}, which cannot be written out.", "Write it with printable characters.")
    return Prompt(messages=messages, is_safety=is_safety, id=name) if messages else None


def _messages(
    row: Mapping[str, Any], key: str, ends_with: EndsWith, found: Findings, check_text: TextCheck
) -> tuple[Message, ...]:
    """The messages under a key, () where they cannot be read; each rule that they break is noted."""
    if row.get(key) is None:
        return ()
    value = row[key]
    messages = _parsed_messages(value, key, found)
    if messages or value == []:
        found.attempt(lambda: check_messages(messages, ends_with=ends_with, field=key))
        found.attempt(lambda: check_text(messages, field=key))
    return messages


def _parsed_messages(value: object, key: str, found: Findings) -> tuple[Message, ...]:
    """The messages, or () and the fault of each that is none."""
    messages: list[Message] = []
    num_problems = len(found.problems)
    for index, item in enumerate(value if isinstance(value, list) else [value]):
        if isinstance(item, Mapping):
            _check_keys(item, _MESSAGE_KEYS, f"{key}[{index}].", "message", found)
        try:
            messages += parse_messages([item] if isinstance(value, list) else value, field=key)
        except DialogError as error:
            # Parsed one by one, so that each fault is found, every message stands at [0].
            found.add(error.field.replace(f"{key}[0]", f"{key}[{index}]", 1), error.reason, error.fix)
    return tuple(messages) if len(found.problems) == num_problems else ()


def _answer(row: Mapping[str, Any], key: str, found: Findings, check_text: TextCheck) -> Message | None:
    """The one assistant message under 'chosen' or 'rejected'."""
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 1:
        what = f"is a list of {len(value)} messages" if isinstance(value, list) else f"is {kind_word(value)}"
        mend = f'Write "{key}": [{{"role": "assistant", "content": "..."}}].'
        if isinstance(value, list) and value:
            is_repeat = value[:-1] == row.get("prompt")
            what += ", the prompt among them" if is_repeat else ", and they do not start with 'prompt'"
            mend = "Keep its last message alone." if is_repeat else "Keep the answer to 'prompt' alone, or drop it."
        found.add(key, f"{what}, but it is one answer to the prompt that both share.", mend)
        return None
    messages = _parsed_messages(value, key, found)
    if not messages:
        return None
    (message,) = messages
    if message.role != "assistant":
        found.add(f"{key}[0].role", f"is '{message.role}', but an answer is the assistant's.", "Write 'assistant'.")
        return None
    found.attempt(lambda: _check_answer_text(message, key))
    found.attempt(lambda: check_text((message,), field=key))
    return message


def _check_answer_text(message: Message, key: str) -> None:
    try:
        check_messages((Message("user", "?"), message), ends_with="assistant", field=key)
    except DialogError as error:
        # The question before it is ours, so the answer stands at [1] there and at [0] in the record.
        raise DialogError(error.field.replace("[1]", "[0]", 1), error.reason, error.fix) from error


def _rating(row: Mapping[str, Any], found: Findings) -> Rating | None:
    value = row.get("rating")
    if value is None or value in RATINGS:
        return value
    words = ", ".join(RATINGS)
    if not isinstance(value, str):
        found.add("rating", f"is {kind_word(value)}, but a rating is a word.", f"Write one of {words}, or take it out.")
        return None
    near = rating_meant(value) or next(iter(get_close_matches(_plain(value), RATINGS, n=1)), None)
    mend = f"Write '{near}'." if near else "Write one of them, or take it out."
    found.add("rating", f"is {_short(value)}, but the ratings are {words}.", mend)
    return None


def _boolean(row: Mapping[str, Any], key: str, found: Findings) -> bool | None:
    value = row.get(key)
    if value is None or isinstance(value, bool):
        return value
    found.add(key, f"is {_short(value)}, but it is true, false or absent.", "Write true or false, without quotes.")
    return None


def _check_keys(row: Mapping[str, Any], known: tuple[str, ...], at: str, what: str, found: Findings) -> None:
    """Unknown keys: one that is nearly a known key, not there itself, is a slip; the others are named as unused."""
    for key in row:
        if key in known:
            continue
        # A key of another kind of record is spelt as it is meant.
        near = slip_of(key, known) if isinstance(key, str) and key not in _KEYS_OF_ALL else None
        if near and near not in row:
            found.add(
                f"{at}{key}",
                f"is no key of a {what}, and what it says would be lost ({', '.join(known)}).",
                f"Rename it '{near}' if that is meant, or take it out.",
            )
        else:
            found.unused.append(f"{at}{key}")


def _add_missing(row: Mapping[str, Any], key: str, kind: Kind, found: Findings) -> None:
    if any(near.field in row and f"'{key}'" in near.mend for near in found.problems):
        return  # told as a slip of the pen already
    other = kind_of(row)
    held = ", ".join(repr(name) for name in list(row)[:8]) or "nothing"
    what = "null" if key in row else f"missing; the record holds {held}"
    if other is not None and other != kind and not any(name in row for name in REQUIRED[kind]):
        mend = f"It looks like a {other}: move it to a file of those, or name that file where {other}s are read."
    else:
        mend = f"Write {_shape(kind)}, or name the 'format' or the 'columns' of the file."
    found.add(key, f"is {what}, but a {kind} needs it.", mend)


def _shape(kind: Kind) -> str:
    return "{" + ", ".join(f'"{key}": [...]' for key in REQUIRED[kind]) + "}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
