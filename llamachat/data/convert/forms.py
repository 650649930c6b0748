"""Conversations in other formats than a list of turns: JSON text, columns, marked text; and labelled answers.

JSON text      {"messages": "[{\\"role\\": ...}]"}
columns        {"messages": {"role": [...], "content": [...]}}, how `datasets` represents a list of turns
marked text    {"text": a dialog as Llama 2 tutorials write it}, {"text": "### Human: question ### Assistant: answer"}
labelled       {"prompt": ..., "completion": ..., "label": false} (KTO): an answer and whether it is good
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

from llamachat.chat_format.dialog import as_dicts
from llamachat.chat_format.llama2 import messages_of_text
from llamachat.data.convert.turns import Repair
from llamachat.data.files import decode_line
from llamachat.data.records import Row, bad_row, label_of

LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "turns", "chat")
QUESTIONS = ("prompt", "question", "instruction", "query", "input")
ANSWERS = ("completion", "response", "answer", "output")
SIDES = ("chosen", "rejected")

_HEADING = re.compile(
    r"(?<!#)###[ \t]*(system|human|user|instruction|input|assistant|response|output|answer)[ \t]*:", re.IGNORECASE
)
_ROLES = {"system": "system", **dict.fromkeys(("human", "user", "instruction", "input"), "user")}


def unfolded(row: Mapping[str, Any], repairs: Counter[Repair]) -> Mapping[str, Any]:
    """Convert the row's conversations from the formats above to lists of turns."""
    changed: dict[str, Any] = {}
    for name in (*LISTS, "prompt", "completion", *SIDES):
        value = row.get(name)
        if isinstance(value, str) and (turns := _of_json(value)) is not None:
            repairs[Repair.JSON_TEXT] += 1
            changed[name] = turns
        elif isinstance(value, Mapping) and (turns := _of_columns(value)) is not None:
            repairs[Repair.COLUMNS] += 1
            changed[name] = turns
    text = row.get("text")
    has_others = any(row.get(name) is not None for name in (*LISTS, *QUESTIONS, *ANSWERS, *SIDES))
    if isinstance(text, str) and not has_others and (turns := turns_of_text(text)):
        repairs[Repair.MARKED_TEXT] += 1
        return {name: value for name, value in row.items() if name != "text"} | {"messages": turns}
    return {**row, **changed} if changed else row


def _of_json(text: str) -> list[Any] | None:
    """The turns in a JSON text."""
    if not text.lstrip().startswith("["):
        return None
    value = decode_line(text.encode("utf-8", "surrogatepass"), 0).value
    return value if value and all(isinstance(item, Mapping) for item in value) else None


def _of_columns(columns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The turns in columns of equal length that include roles and contents."""
    values = list(columns.values())
    if not all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return None
    if not any({role, content} <= columns.keys() for role, content in (("role", "content"), ("from", "value"))):
        return None
    # A key that only some turns have is null in the others.
    turns = [dict(zip(columns, turn, strict=True)) for turn in zip(*values, strict=True)]
    return [
        {name: item for name, item in turn.items() if item is not None or name in ("content", "value")}
        for turn in turns
    ]


def turns_of_text(text: str) -> list[dict[str, str]]:
    """The turns of a text in Llama 2's format or with headings (`### Human:`); an empty list for any other text."""
    return as_dicts(messages_of_text(text)) or _of_headings(text)


def _of_headings(text: str) -> list[dict[str, str]]:
    text = text.strip().removeprefix("<s>").removesuffix("</s>")
    marks = list(_HEADING.finditer(text))
    roles = [_ROLES.get(mark[1].lower(), "assistant") for mark in marks]
    if not {"user", "assistant"} <= set(roles):
        return []
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    spoken = [text[mark.end() : end].strip() for mark, end in zip(marks, ends, strict=True)]
    preamble = text[: marks[0].start()].strip()
    turns = [{"role": role, "content": said} for role, said in zip(roles, spoken, strict=True)]
    return [*([{"role": "system", "content": preamble}] if preamble else []), *turns]


# -- labelled answers


class LabelledPair(dict[str, Any]):
    """A row merged from two rows with labelled answers."""


def labelled_pairs(rows: Iterable[Row]) -> Iterator[Row]:
    """Pass rows through; at the end, pair the labelled answers to each prompt, a good one with a bad one.

    Each answer is in at least one pair. If all answers to a prompt have the same label, each is a problem.
    """
    prompts: dict[str, tuple[list[Row], list[Row]]] = {}
    for row in rows:
        value = unfolded(row.value, Counter()) if isinstance(row.value, Mapping) else {}
        label = label_of(value)
        answer = None if label is None else _answer(value)
        if label is None or answer is None:
            yield row
            continue
        prompt, said = answer
        sides = prompts.setdefault(json.dumps(prompt, sort_keys=True, default=str), ([], []))
        sides[not label].append(Row(row.line, {**prompt, "said": said}))
    for good, bad in prompts.values():
        if not (good and bad):
            for row in good or bad:
                reason = "is the same on all answers to this prompt, but a pair compares a good one with a bad one."
                yield bad_row(row.line, "label", reason, "Add an answer with the other label, or convert to dialogs.")
            continue
        count = max(len(good), len(bad))
        for better, worse in islice(zip(cycle(good), cycle(bad), strict=False), count):
            prompt = {name: value for name, value in better.value.items() if name != "said"}
            sides = {"chosen": better.value["said"], "rejected": worse.value["said"]}
            yield Row(better.line, LabelledPair(prompt | sides))


def _answer(row: Mapping[str, Any]) -> tuple[dict[str, Any], Any] | None:
    """The prompt and answer of a row with a labelled answer; None if its keys do not identify them."""
    kept = {name: value for name, value in row.items() if name in ("system", "system_prompt")}
    for name in LISTS:
        turns = row.get(name)
        if isinstance(turns, list) and len(turns) > 1:
            return {**kept, "prompt": turns[:-1]}, turns[-1:]
    question = next((name for name in QUESTIONS if row.get(name) is not None), None)
    answer = next((name for name in ANSWERS if row.get(name) is not None), None)
    if question is None or answer is None:
        return None
    return {**kept, "prompt": row[question]}, row[answer]


# -- texts that would be ignored

_ANSWER_WORDS = re.compile(
    r"(?:answer|respon[sc]e|completion|output|reply|replies|chosen|reject|accepted|prefer)", re.IGNORECASE
)
_NO_ANSWERS = re.compile(
    r"(?:ids?|url|hash|model|source|type|name|date|time|lang|language|by|count|len|length)$", re.IGNORECASE
)
_WORDS = 3  # minimum words of a text that may be an answer, whatever its key


def unread_answers(left_out: Sequence[Mapping[str, Any]], *, num_rows: int, by_content: bool) -> list[str]:
    """The ignored columns with texts that may be answers.

    Their texts occur in most of the `num_rows` rows and differ between rows, and either their name indicates an answer
    or (`by_content`) they have several words.
    """
    texts: dict[str, list[str]] = {}
    for row in left_out:
        for name, value in row.items():
            text = value if isinstance(value, str) else json.dumps(value, default=str) if _holds_texts(value) else ""
            if text.strip():
                texts.setdefault(name, []).append(text)
    columns = []
    for name, values in texts.items():
        is_named = _ANSWER_WORDS.search(name) and not _NO_ANSWERS.search(name)
        is_text = by_content and 2 * sum(len(value.split()) >= _WORDS for value in values) > len(values)
        if (is_named or is_text) and 2 * len(values) >= num_rows and 2 * len(set(values)) > len(values):
            columns.append(name)
    return columns


def _holds_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str | Mapping) for item in value)
