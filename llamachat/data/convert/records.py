"""Converts foreign records to our three kinds: detects a row's kind, key names, labels and pairs of answers.

    dialog       'messages' or an alias; a question and its answer as texts
    preference   answers as texts, messages, or whole dialogs that differ in their last answer; a prompt in any format
    prompt       a text, messages, or the prompt of another kind of record

The result has the shape of a record but may still violate its rules; `parse_record` decides.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamachat.chat_format.dialog import DialogError, EndsWith, Message
from llamachat.data.convert.forms import ANSWERS, LISTS, QUESTIONS, SIDES
from llamachat.data.convert.turns import Notes, Repair, ordered, readable_turns, written
from llamachat.data.records import KEYS, KINDS, RATINGS, REQUIRED, Kind, rating_meant, slip_of
from llamachat.data.sources import SOURCES, Source
from llamachat.data.sources.source import fitting_sources

# Data sets of turns are read here, with repairs; their own converters reject unknown content.
SETS_OF_TURNS = ("sharegpt", "llamafactory_preference")

_SYSTEMS = ("system", "system_prompt")
_FLAGS = ("is_safe", "chosen_is_safe", "rejected_is_safe", "is_safety")
_TRANSCRIPT = re.compile(r"\s*Human:")
_REQUIRED = tuple(dict.fromkeys(key for kind in KINDS for key in REQUIRED[kind]))
_NAMES = frozenset([key for kind in KINDS for key in KEYS[kind]] + [*LISTS, *QUESTIONS, *ANSWERS, *_SYSTEMS])


@dataclass(slots=True)
class _Row:
    """One row whose keys are read one by one; unread keys are reported as dropped."""

    values: Mapping[str, Any]
    notes: Notes
    taken: set[str] = field(default_factory=set)

    def first(self, names: Sequence[str]) -> str | None:
        """The first of these keys whose value is not null."""
        return next((name for name in names if self.values.get(name) is not None), None)

    def take(self, name: str, own: str) -> Any:
        self.taken.add(name)
        if name != own:
            self.notes.add(Repair.KEY)
        return self.values[name]


def sources_of(row: Mapping[str, Any], kind: Kind | None) -> list[Source]:
    """The known data sets that match the row's keys: none if it is read here, several if it is ambiguous."""
    fitting = fitting_sources(row, kind, [source for source in SOURCES.values() if source.name not in SETS_OF_TURNS])
    is_listed = any(_is_list(row, key) for key in (*LISTS, "prompt", *SIDES))
    return [source for source in fitting if source.has_lists or not is_listed]


def transcripts_joined(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a pair whose prompt is the common prefix of hh_rlhf transcripts to two whole transcripts."""
    prompt = row.get("prompt")
    sides = {side: row[side] for side in SIDES if isinstance(row.get(side), str)}
    if not isinstance(prompt, str) or not _TRANSCRIPT.match(prompt) or len(sides) < len(SIDES):
        return row
    whole = {side: text if text.startswith(prompt) else prompt + text for side, text in sides.items()}
    return {name: value for name, value in row.items() if name != "prompt"} | whole


def kind_by_keys(row: Mapping[str, Any], kind: Kind | None) -> Kind | None:
    """The kind of record that the row's keys indicate, `kind` if several are possible; None if no key does."""
    return _kind(row, kind) or _kind(_slips_renamed(row, _REQUIRED, Notes()), kind)


def _kind(row: Mapping[str, Any], kind: Kind | None) -> Kind | None:
    fields = _Row(row, Notes())
    if kind == "dialog" and isinstance(row.get("messages"), list):
        return "dialog"
    if fields.first(SIDES):
        return "preference"
    if row.get("messages") is not None or any(_is_list(row, name) for name in LISTS):
        return "dialog"
    question, answer = fields.first(QUESTIONS), fields.first(ANSWERS)
    if question is None:
        return None
    # A prompt in our format may include a reference answer; 'completion' is the other half of TRL's dialogs.
    is_dialog = answer is not None and (kind == "dialog" or answer == "completion" or isinstance(row[question], str))
    return "dialog" if is_dialog and kind != "prompt" else "prompt"


def repaired_record(row: Mapping[str, Any], own: Kind, wanted: Kind, notes: Notes) -> dict[str, Any]:
    """Convert a row of kind `own` to a record of kind `wanted`; they differ only if a prompt is wanted.

    Raises `DialogError` instead of guessing.
    """
    # A kind indicated only by misspelt keys is read from all of these.
    required = REQUIRED[own] if _kind(row, wanted) else _REQUIRED
    slips = tuple(dict.fromkeys((*required, *KEYS[wanted])))
    fields = _Row(_slips_renamed(row, slips, notes), notes)
    if own == "preference":
        record = _pair(fields)
        if wanted == "prompt":
            record = {"prompt": record["prompt"]}
    elif own == "prompt":
        record = {"prompt": _question(fields, ends_with="user")}
    elif wanted == "prompt":
        record = {"prompt": _turns(fields, ends_with="user")}
    else:
        record = {"messages": _turns(fields, ends_with="assistant")}
    if own != wanted:
        notes.add(Repair.AS_PROMPT)
    record = {key: [written(message) for message in messages] for key, messages in record.items()}
    record |= _labels(fields, [key for key in KEYS[wanted] if key not in REQUIRED[wanted]])
    for name in fields.values:
        if name not in fields.taken:
            notes.leave_out(str(name))
    return record


def _slips_renamed(row: Mapping[str, Any], known: tuple[str, ...], notes: Notes) -> dict[str, Any]:
    """Rename misspelt keys. A key of another kind of record is not a misspelling."""
    renamed: dict[str, Any] = {}
    for name, value in row.items():
        key = None if name in _NAMES else slip_of(str(name), known)
        # Nor is it one if the row has the key's content under another name.
        others = QUESTIONS if key == "prompt" else LISTS if key == "messages" else ()
        has_other = any(row.get(other) is not None for other in others)
        if key is None or key in row or key in renamed or has_other or (key == "messages" and not _is_list(row, name)):
            renamed[name] = value
        else:
            renamed[key] = value
            notes.add(Repair.KEY)
    return renamed


def _turns(row: _Row, *, ends_with: EndsWith) -> list[Message]:
    """The conversation under any known key, or from a question and its answer."""
    name = next((name for name in LISTS if _is_list(row.values, name)), None)
    name = name or ("messages" if row.values.get("messages") is not None else None)
    if name is not None:
        turns = readable_turns(row.take(name, "messages"), name, row.notes)
    else:
        answer = row.first(ANSWERS)
        if answer is None:
            raise DialogError(
                "messages", "is missing, and so is an answer to a question.", "Add one, or drop the record."
            )
        row.notes.add(Repair.HALVES)
        said = _as_turns(row.take(answer, answer), answer, "assistant", row.notes)
        turns = [*_question(row, ends_with="either"), *said]
    turns = ordered([*_system(row), *turns], row.notes, ends_with=ends_with)
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken:
        raise _nothing_left(name or "messages", ends_with)
    return turns


def _is_list(row: Mapping[str, Any], name: str) -> bool:
    return isinstance(row.get(name), list)


def _nothing_left(name: str, ends_with: EndsWith) -> DialogError:
    what = "answer to a question" if ends_with == "assistant" else "question"
    return DialogError(
        name, f"holds no {what}, with every turn that has no place taken out.", "Add what is missing, or drop it."
    )


def _question(row: _Row, *, ends_with: EndsWith) -> list[Message]:
    """The prompt as messages."""
    name = row.first(QUESTIONS)
    if name is None:
        raise DialogError("prompt", "is missing, but an answer is one to a question.", "Add it, or drop the record.")
    turns = [*_system(row), *_as_turns(row.take(name, "prompt"), name, "user", row.notes)]
    turns = ordered(turns, row.notes, ends_with=ends_with)
    if not any(turn.role == "user" for turn in turns):
        raise _nothing_left(name, "user")
    return turns


def _system(row: _Row) -> list[Message]:
    """The system text under its own key next to the turns."""
    name = row.first(_SYSTEMS)
    if name is None or not isinstance(row.values[name], str):
        return []
    text = row.take(name, "messages")
    return [Message("system", text)] if text.strip() else []


def _as_turns(value: object, name: str, role: Any, notes: Notes) -> list[Message]:
    """Convert a text (as one turn of that role), a message, or a list of these."""
    if isinstance(value, str):
        notes.add(Repair.TEXT)
        return [Message(role, value)]
    if isinstance(value, Mapping):
        notes.add(Repair.TEXT)
        value = [value]
    return readable_turns(value, name, notes)


def _pair(row: _Row) -> dict[str, Any]:
    """The shared prompt and both answers."""
    for side in SIDES:
        if row.values.get(side) is None:
            raise DialogError(side, "is missing, but a pair compares two answers.", "Add it, or drop the record.")
    prompt = _explicit_prompt(row)
    sides = {side: _as_turns(row.take(side, side), side, "assistant", row.notes) for side in SIDES}
    prompt = _without_answer(prompt, sides, row.notes)
    whole = {side: _whole_dialog(side, turns, prompt, row.notes) for side, turns in sides.items()}
    shared = whole["chosen"][:-1]
    if _texts(shared) != _texts(whole["rejected"][:-1]):
        raise DialogError(
            "rejected",
            "differs from 'chosen' before the last answer, but a pair compares two answers to one prompt.",
            "Truncate both where they start to differ, or drop the record.",
        )
    if any(len(turns) > 1 for turns in sides.values()):
        row.notes.add(Repair.WHOLE_DIALOGS)
    if any(_asks(turns) for turns in sides.values()):
        shared = _agreed(shared, prompt)
    return {"prompt": shared, **{side: turns[-1:] for side, turns in whole.items()}}


def _explicit_prompt(row: _Row) -> list[Message]:
    name = row.first(LISTS)
    if row.first(QUESTIONS) is not None:
        return _question(row, ends_with="either")
    if name is None:
        return _system(row)
    turns = readable_turns(row.take(name, "prompt"), name, row.notes)
    return ordered([*_system(row), *turns], row.notes, ends_with="either")


def _without_answer(prompt: list[Message], sides: Mapping[str, list[Message]], notes: Notes) -> list[Message]:
    """Remove a final answer from the prompt if it is one of the two compared; reject any other."""
    if not prompt or prompt[-1].role != "assistant":
        return prompt
    if not any(turns and turns[-1].content.strip() == prompt[-1].content.strip() for turns in sides.values()):
        raise DialogError(
            "prompt",
            "ends with an answer that is neither of the two: what they answer is not known.",
            "Drop the last answer from the prompt, or drop the record.",
        )
    notes.add(Repair.CLOSING_ANSWER)
    return prompt[:-1]


def _asks(turns: Sequence[Message]) -> bool:
    """Whether the turns start with the prompt rather than an answer."""
    return next((turn.role for turn in turns if turn.role != "system"), None) == "user"


def _whole_dialog(side: str, turns: list[Message], prompt: list[Message], notes: Notes) -> list[Message]:
    whole = ordered(turns if _asks(turns) else [*prompt, *turns], notes, ends_with="either")
    if not any(message.role == "user" for message in whole):
        raise DialogError("prompt", "is missing, but a pair compares two answers to it.", "Add it, or drop the record.")
    if whole[-1].role != "assistant":
        raise DialogError(side, "does not end with an answer that says something.", "Add it, or drop the record.")
    return whole


def _agreed(shared: list[Message], prompt: list[Message]) -> list[Message]:
    """The common part of two whole dialogs, checked against a prompt given with them."""
    turns, prompt_turns = ([text for text in _texts(part) if text[0] != "system"] for part in (shared, prompt))
    is_part = prompt_turns in (turns[: len(prompt_turns)], turns[len(turns) - len(prompt_turns) :])
    systems = [message for message in (*prompt, *shared) if message.role == "system"]
    if not is_part or len({message.content for message in systems}) > 1:
        raise DialogError(
            "chosen",
            "and 'rejected' do not start with 'prompt', but a pair shares its prompt.",
            "Keep only the answers to 'prompt', or drop the record.",
        )
    return [*systems[:1], *(message for message in shared if message.role != "system")]


def _texts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content.strip()) for message in messages]


def _labels(row: _Row, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Yield the optional keys with values; booleans, ratings and ids are normalized if that needs no guess."""
    for name in keys:
        if name not in row.values:
            continue
        row.taken.add(name)
        value = row.values[name]
        if value is None:
            row.notes.add(Repair.NULL)
            continue
        spelt = _respelt(name, value)
        if spelt is not value:
            row.notes.add(Repair.LABEL)
        yield name, spelt


def _respelt(name: str, value: Any) -> Any:
    if name in _FLAGS and isinstance(value, str):
        return {"true": True, "false": False}.get(value.strip().lower(), value)
    if name == "rating" and isinstance(value, str) and value not in RATINGS:
        return rating_meant(value) or value
    if name == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value
