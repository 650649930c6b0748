"""The turns of foreign conversations brought into our form: names, roles, texts, then their order. Each mend is noted.

What has one plain reading is mended; what would be a guess raises `DialogError`, and the record is left out.
Ours to choose: turns of tools are dropped, since Llama 2's format has no place for them and their text as a user's or
an assistant's would be a lie; the two answers around one are then merged.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from llamachat.chat_format.dialog import ROLE_ALIASES, ROLES, DialogError, EndsWith, Message, Role, parse_messages
from llamachat.data.records import slip_of


class Mend(StrEnum):
    """What was changed, as the report names it."""

    BYTE_ORDER_MARK = "byte order mark taken off"
    BLANK_LINE = "blank line removed"
    COMMA = "comma after a record taken off"
    SEVERAL = "line with several records unrolled"
    ARRAY = "array of records unrolled"
    KNOWN_SET = "row of a known set rewritten"
    BARE_TURNS = "list of turns taken as a dialog"
    KEY = "key renamed"
    NULL = "key with null left out"
    LEFT_OUT = "key that nothing reads left out"
    ROLE = "role renamed"
    ROLE_SPELLING = "role in capitals or with white space respelt"
    PARTS = "parts of a content joined"
    TEXT = "text taken as a turn"
    HALVES = "question and answer put together"
    LABEL = "label or id respelt"
    TRAIN_ON_QUESTION = "'train' taken off a turn that is no answer"
    TOOL = "turn of a tool dropped"
    EMPTY = "empty turn removed"
    SYSTEM_MOVED = "system text moved to the front"
    SYSTEMS_JOINED = "system texts joined"
    LEADING_ANSWER = "leading answer dropped"
    MERGED = "turn merged with the one before it"
    OPEN_QUESTION = "question without an answer dropped from the end"
    CLOSING_ANSWER = "answer dropped from the end of a prompt"
    WHOLE_DIALOGS = "answers cut out of dialogs"
    HTML = "text with HTML made plain"
    AS_PROMPT = "prompt taken out of another kind of record"


@dataclass(slots=True)
class Notes:
    """What was mended in one record, how often, and the keys that were left out."""

    mends: Counter[Mend] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, mend: Mend, times: int = 1) -> None:
        if times:
            self.mends[mend] += times

    def leave_out(self, name: str) -> None:
        self.mends[Mend.LEFT_OUT] += 1
        self.left_out[name] += 1


_TURN_KEYS = ("role", "content", "train")
_ALIASES = {"role": ("from", "speaker", "sender", "author"), "content": ("value", "text", "message")}
# Beside the names that the error texts know: those of ShareGPT's exporters, of OpenAI, of other chat templates, of help desks.
_ROLES: dict[str, Role] = {
    **ROLE_ALIASES,
    "developer": "system",
    "agent": "assistant",
    "ai": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "claude": "assistant",
    "client": "user",
    "customer": "user",
    "support": "assistant",
    "visitor": "user",
}
_TOOLS = (
    *("tool", "tools", "function", "ipython", "observation", "function_call", "function_response"),
    *("tool_call", "tool_calls", "tool_response", "tool_result", "environment"),
)
_TEXT_PARTS = ("text", "input_text", "output_text")


def readable_turns(value: object, name: str, notes: Notes) -> list[Message]:
    """The turns of a list in their order, those of tools and those without content left out.

    Raises `DialogError` for the first that cannot be read.
    """
    if not isinstance(value, list):
        parse_messages(value, field=name)  # which refuses it in its words
    assert isinstance(value, list)
    turns: list[Message] = []
    for index, item in enumerate(value):
        turn = _mended_turn(item, notes)
        if turn is None:
            continue
        try:
            turns += parse_messages([turn], field=name)
        except DialogError as error:
            # Parsed one by one, every turn stands at [0].
            where = error.field.replace(f"{name}[0]", f"{name}[{index}]", 1)
            raise DialogError(where, error.reason, error.fix) from error
    return turns


def ordered(messages: Sequence[Message], notes: Notes, *, ends_with: EndsWith) -> list[Message]:
    """The turns in the order that a conversation has: system text first, then user and assistant in turn.

    What stands where none may stand at the end is dropped; what is left may be nothing.
    """
    systems, turns = _parted(messages, notes)
    leading = next((index for index, turn in enumerate(turns) if turn.role == "user"), len(turns))
    notes.add(Mend.LEADING_ANSWER, leading)
    merged: list[Message] = []
    for turn in turns[leading:]:
        if merged and merged[-1].role == turn.role:
            merged[-1] = _merged(merged[-1], turn)
            notes.add(Mend.MERGED)
        else:
            merged.append(turn)
    if merged and ends_with not in ("either", merged[-1].role):
        notes.add(Mend.OPEN_QUESTION if ends_with == "assistant" else Mend.CLOSING_ANSWER)
        merged.pop()
    return [*systems, *merged]


def written(message: Message) -> dict[str, Any]:
    """The message as our files hold it."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    return turn if message.train is None else turn | {"train": message.train}


def _parted(messages: Sequence[Message], notes: Notes) -> tuple[list[Message], list[Message]]:
    """The system text, if any, and the turns that say something."""
    systems = [message for message in messages if message.role == "system"]
    if len(systems) > 1 or systems[:1] != list(messages[:1]):
        said = [message for message in systems if message.content.strip()]
        notes.add(Mend.EMPTY, len(systems) - len(said))
        if len(said) > 1:
            notes.add(Mend.SYSTEMS_JOINED)
        elif said and messages[0] is not said[0]:
            notes.add(Mend.SYSTEM_MOVED)
        # The same text said twice is one instruction.
        texts = dict.fromkeys(message.content for message in said)
        systems = [Message("system", "\n\n".join(texts))] if said else []
    turns = [message for message in messages if message.role != "system"]
    spoken = [message for message in turns if message.content.strip()]
    notes.add(Mend.EMPTY, len(turns) - len(spoken))
    return systems, spoken


def _merged(first: Message, second: Message) -> Message:
    """Both texts, a blank line between; learnt only where both may be learnt."""
    train = False if False in (first.train, second.train) else first.train
    return Message(first.role, f"{first.content.rstrip()}\n\n{second.content.lstrip(chr(10))}", train)


def _mended_turn(item: object, notes: Notes) -> object | None:
    """The turn in our words; None where it falls away; as it is where it cannot be read."""
    if not isinstance(item, Mapping):
        return item
    turn = _renamed(item, notes)
    if isinstance(turn.get("role"), str):
        plain = turn["role"].strip().lower()
        if plain in _TOOLS:
            notes.add(Mend.TOOL)
            return None
        role = plain if plain in ROLES else _ROLES.get(plain, turn["role"])
        if role != turn["role"]:
            notes.add(Mend.ROLE_SPELLING if role == plain else Mend.ROLE)
        turn["role"] = role
    if "role" in turn and turn.get("content") is None:
        notes.add(Mend.EMPTY)
        return None
    if isinstance(turn.get("content"), list | Mapping):
        text = _joined_parts(turn["content"])
        if text is not None:
            turn["content"] = text
            notes.add(Mend.PARTS)
    if turn.get("train") is True and turn.get("role") in ("system", "user"):
        del turn["train"]
        notes.add(Mend.TRAIN_ON_QUESTION)
    return turn


def _renamed(item: Mapping[Any, Any], notes: Notes) -> dict[str, Any]:
    """The keys that we know, under our names."""
    turn = {key: item[key] for key in _TURN_KEYS if key in item}
    if "train" in turn and turn["train"] is None:
        del turn["train"]
        notes.add(Mend.NULL)
    for key in item:
        if key in _TURN_KEYS:
            continue
        own = next((name for name, others in _ALIASES.items() if key in others), None) or slip_of(str(key), _TURN_KEYS)
        if own is not None and own not in turn:
            turn[own] = item[key]
            notes.add(Mend.KEY)
        elif key == "weight" and "train" not in turn and item[key] in (0, 1):
            # OpenAI's fine-tuning files: an answer of weight 0 is read, not learnt.
            turn |= {"train": False} if item[key] == 0 else {}
            notes.add(Mend.KEY)
        else:
            notes.leave_out(f"messages[].{key}")
    return turn


def _joined_parts(content: Any) -> str | None:
    """The texts of a content in parts, a line break between; None where a part is no text (an image, a call)."""
    if isinstance(content, Mapping):
        parts = content.get("parts", [content])
        return _joined_parts(parts) if isinstance(parts, list) else None
    texts = []
    for part in content:
        if isinstance(part, Mapping) and part.get("type", "text") in _TEXT_PARTS:
            part = part.get("text")
        if not isinstance(part, str):
            return None
        texts.append(part)
    return "\n".join(texts)
