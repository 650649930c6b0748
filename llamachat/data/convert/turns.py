"""Converts the turns of foreign conversations: names, roles, texts, then order. Each repair is recorded.

Content with one plausible reading is repaired; otherwise `DialogError` is raised and the record is dropped.
Our choice: tool turns are dropped, since Llama 2's format cannot express them and attributing their text to the user or
assistant would be wrong; the answers before and after one are then merged. HTML is removed only on request: in a dialog
about web pages the tags are the answer.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from html import unescape
from typing import Any

from llamachat.chat_format.dialog import ROLE_ALIASES, ROLES, EndsWith, Message, Role, parse_message, parse_messages
from llamachat.data.records import slip_of


class Repair(StrEnum):
    """A change, worded as in the report."""

    BYTE_ORDER_MARK = "byte order mark taken off"
    BLANK_LINE = "blank line removed"
    COMMA = "comma after a record taken off"
    SEVERAL = "line with several records unrolled"
    ARRAY = "array of records unrolled"
    JSON_TEXT = "conversation as JSON text parsed"
    COLUMNS = "conversation in columns made a list of turns"
    MARKED_TEXT = "text with marks of turns split into turns"
    LABELLED = "labelled answers put together as a pair"
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
    """The repairs of one record with their counts, and its dropped keys."""

    repairs: Counter[Repair] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, repair: Repair, times: int = 1) -> None:
        if times:
            self.repairs[repair] += times

    def leave_out(self, name: str) -> None:
        self.repairs[Repair.LEFT_OUT] += 1
        self.left_out[name] += 1


_TURN_KEYS = ("role", "content", "train")
_ALIASES = {"role": ("from", "speaker", "sender", "author"), "content": ("value", "text", "message")}
# In addition to the names in the error texts: those of ShareGPT exporters, OpenAI, other chat templates and help desks.
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
    """The turns of a list in order, without tool turns and empty ones.

    Raises `DialogError` for the first unreadable turn.
    """
    if not isinstance(value, list):
        return list(parse_messages(value, field=name))  # raises with its own message
    turns = [(index, _repaired_turn(item, notes)) for index, item in enumerate(value)]
    return [parse_message(turn, f"{name}[{index}]") for index, turn in turns if turn is not None]


def ordered(messages: Sequence[Message], notes: Notes, *, ends_with: EndsWith) -> list[Message]:
    """Order the turns as a conversation: system text first, then alternating user and assistant.

    A last turn that may not end the conversation is dropped; the result may be empty.
    """
    systems, turns = _parted(messages, notes)
    leading = next((index for index, turn in enumerate(turns) if turn.role == "user"), len(turns))
    notes.add(Repair.LEADING_ANSWER, leading)
    merged: list[Message] = []
    for turn in turns[leading:]:
        if merged and merged[-1].role == turn.role:
            merged[-1] = _merged(merged[-1], turn)
            notes.add(Repair.MERGED)
        else:
            merged.append(turn)
    if merged and ends_with not in ("either", merged[-1].role):
        notes.add(Repair.OPEN_QUESTION if ends_with == "assistant" else Repair.CLOSING_ANSWER)
        merged.pop()
    return [*systems, *merged]


def written(message: Message) -> dict[str, Any]:
    """The message as stored in our files."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    return turn if message.train is None else turn | {"train": message.train}


def _parted(messages: Sequence[Message], notes: Notes) -> tuple[list[Message], list[Message]]:
    """The system text, if any, and the non-empty turns."""
    systems = [message for message in messages if message.role == "system"]
    if len(systems) > 1 or systems[:1] != list(messages[:1]):
        said = [message for message in systems if message.content.strip()]
        notes.add(Repair.EMPTY, len(systems) - len(said))
        if len(said) > 1:
            notes.add(Repair.SYSTEMS_JOINED)
        elif said and messages[0] is not said[0]:
            notes.add(Repair.SYSTEM_MOVED)
        # A repeated text is one instruction.
        texts = dict.fromkeys(message.content for message in said)
        systems = [Message("system", "\n\n".join(texts))] if said else []
    turns = [message for message in messages if message.role != "system"]
    spoken = [message for message in turns if message.content.strip()]
    notes.add(Repair.EMPTY, len(turns) - len(spoken))
    return systems, spoken


def _merged(first: Message, second: Message) -> Message:
    """Join both texts with a blank line; trained on only if both may be."""
    train = False if False in (first.train, second.train) else first.train
    return Message(first.role, f"{first.content.rstrip()}\n\n{second.content.lstrip(chr(10))}", train)


def _repaired_turn(item: object, notes: Notes) -> object | None:
    """The turn in our format; None to drop it; unchanged if it is unreadable."""
    if not isinstance(item, Mapping):
        return item
    turn = _renamed(item, notes)
    if not {"role", "content"} & turn.keys():
        return item
    if isinstance(turn.get("role"), str):
        plain = turn["role"].strip().lower()
        if plain in _TOOLS:
            notes.add(Repair.TOOL)
            return None
        role = plain if plain in ROLES else _ROLES.get(plain, turn["role"])
        if role != turn["role"]:
            notes.add(Repair.ROLE_SPELLING if role == plain else Repair.ROLE)
        turn["role"] = role
    if "role" in turn and turn.get("content") is None:
        notes.add(Repair.EMPTY)
        return None
    if isinstance(turn.get("content"), list | Mapping):
        text = _joined_parts(turn["content"])
        if text is not None:
            turn["content"] = text
            notes.add(Repair.PARTS)
    if turn.get("train") is True and turn.get("role") in ("system", "user"):
        del turn["train"]
        notes.add(Repair.TRAIN_ON_QUESTION)
    return turn


def _renamed(item: Mapping[Any, Any], notes: Notes) -> dict[str, Any]:
    """The known keys with our names."""
    turn = {key: item[key] for key in _TURN_KEYS if key in item}
    if "train" in turn and turn["train"] is None:
        del turn["train"]
        notes.add(Repair.NULL)
    for key in item:
        if key in _TURN_KEYS:
            continue
        own = next((name for name, others in _ALIASES.items() if key in others), None) or slip_of(str(key), _TURN_KEYS)
        if own is not None and own not in turn:
            turn[own] = item[key]
            notes.add(Repair.KEY)
        elif key == "weight" and "train" not in turn and item[key] in (0, 1):
            # OpenAI's fine-tuning format: an answer of weight 0 is context, not a target.
            turn |= {"train": False} if item[key] == 0 else {}
            notes.add(Repair.KEY)
        else:
            notes.leave_out(f"messages[].{key}")
    return turn


def _joined_parts(content: Any) -> str | None:
    """Join the texts of a multi-part content with line breaks; None if any part is not text (an image, a call)."""
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


# Layout tags. All others stay, since they may be placeholders or code.
_TAGS = "a|b|blockquote|br|div|em|font|h[1-6]|hr|i|img|li|ol|p|pre|small|span|strong|sub|sup|table|tbody|td|th|thead|tr|u|ul"
_TAG = re.compile(rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{1,6}|#x[0-9a-f]{1,5});", re.IGNORECASE)
_LINE_ENDS = re.compile(r"<br\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote|pre)\s*>", re.IGNORECASE)
_MANY_LINES = re.compile(r"\n{3,}")


def html_in(text: str) -> str | None:
    """The first piece of HTML in a text."""
    match = _TAG.search(text) or _ENTITY.search(text)
    return match.group() if match else None


def without_html(text: str) -> str:
    """Remove tags, keep the page's line breaks, and decode entities."""
    lines = _LINE_ENDS.sub("\n", text)
    # Decode entities last: an escaped tag is text.
    plain = unescape(_TAG.sub("", lines)).replace("\xa0", " ")
    return _MANY_LINES.sub("\n\n", plain).strip()
