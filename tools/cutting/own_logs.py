"""Messy chat logs and pairs, like a help desk's export, for the tutorial `docs/your-own-data.md`.

Valid conversations of the bundled data get typical defects of exports: other role names, a greeting before the first
question, an unanswered question, two turns in a row, empty turns, HTML, tool turns, a tag of the chat format in the
text, duplicates, truncated lines, a whole history in one dialog. A dialog has at most one kind; kinds are counted.
"""

import html
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from llamachat.chat_format.llama2 import SPECIAL_TAGS
from llamachat.data.loading import fraction
from tools.cutting.choosing import Dialog, chosen, distinct, length, pick, text_of

Turns = list[dict[str, Any]]
LONGEST_PAIR = 500  # characters of prompt and both answers
PAIRS_OF_A_PROMPT = 4
_GREETINGS = ("Hello! How can I help you today?", "Welcome to the chat. What can I do for you?")
_LOOKUP = {"from": "function_call", "value": '{"name": "find_order", "arguments": {"customer": 1207}}'}
_OBSERVATION = {"from": "observation", "value": '{"status": "open"}'}
_NOTE = "You are the assistant of a help desk. Be friendly and brief."
_LONG_DIALOGS, _LONG_ANSWERS, _IN_A_HISTORY = 4, 2, 30


@dataclass(slots=True)
class Logs:
    """The lines of a file, and the number of lines with each kind of defect."""

    lines: list[str] = field(default_factory=list)
    mess: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, *records: Any) -> None:
        self.lines += [json.dumps(record, ensure_ascii=False) for record in records]
        self.mess[kind] += len(records)

    def text(self) -> bytes:
        return "".join(f"{line}\n" for line in self.lines).encode()


def own_chats(talks: Iterable[Dialog], questions: Iterable[Dialog]) -> Logs:
    """Logs of conversations that end with a question, and of single questions."""
    talks = distinct((talk for talk in talks if len(talk) >= 3), key=text_of)
    ordered = chosen(talks, len(talks), key=text_of, salt="own logs")
    history, ordered = ordered[: _IN_A_HISTORY * _LONG_DIALOGS], ordered[_IN_A_HISTORY * _LONG_DIALOGS :]
    logs = Logs()
    for place, talk in enumerate(ordered):
        kind, make = _KINDS[place % len(_KINDS)]
        logs.add(kind, _record(len(logs.lines), make(_turns(talk[:-1]), talk[-1]["content"])))
        if place % 20 == 0:
            logs.add("repeats the line before it", json.loads(logs.lines[-1]))
        if place % 60 == 30:
            logs.lines.append(logs.lines[-1][: len(logs.lines[-1]) * 2 // 3])
            logs.mess["cut off in the middle"] += 1
        if place % 150 == 40:
            logs.lines.append("")
            logs.mess["blank"] += 1
    for dialog in chosen(questions, 150, key=text_of, salt="own logs"):
        logs.add("sound but for its names", _record(len(logs.lines), _turns(dialog)))
    for place in range(_LONG_DIALOGS):
        turns = [turn for talk in history[place::_LONG_DIALOGS] for turn in _turns(talk[:-1])]
        logs.add("a customer's whole history in one dialog", _record(len(logs.lines), turns))
    for place in range(_LONG_ANSWERS):
        transcript = "\n".join(text_of(talk) for talk in history[place::_LONG_ANSWERS])
        turns = [{"from": "human", "value": "Please send me the transcript."}, {"from": "gpt", "value": transcript}]
        logs.add("an answer of several pages", _record(len(logs.lines), turns))
    return logs


def own_pairs(pairs: Iterable[dict[str, Any]]) -> Logs:
    """Pairs as texts, without ratings: a prompt of one turn and two answers."""
    short = [pair for pair in pairs if len(pair["prompt"]) == 1 and _size(pair) <= LONGEST_PAIR]
    pairs_of_prompt: Counter[str] = Counter()
    logs = Logs()
    for place, pair in enumerate(chosen(short, len(short), key=json.dumps, salt="own pairs")):
        prompt = pair["prompt"][0]["content"]
        pairs_of_prompt[prompt] += 1
        if pairs_of_prompt[prompt] > PAIRS_OF_A_PROMPT:
            continue
        row = {"prompt": prompt, **{side: pair[side][0]["content"] for side in ("chosen", "rejected")}}
        if place % 40 == 7:
            logs.add("two equal answers", row | {"rejected": row["chosen"]})
        elif place % 40 == 23:
            logs.add("an answer that is empty", row | {"rejected": " "})
        else:
            logs.add("sound but for its form", row | {"annotator": f"a{place % 3}"})
    return logs


def _size(pair: dict[str, Any]) -> int:
    return length(pair["prompt"]) + length(pair["chosen"]) + length(pair["rejected"])


def _record(number: int, turns: Turns) -> dict[str, Any]:
    return {"id": f"chat-{number:04d}", "conversations": turns}


def _turns(dialog: Dialog) -> Turns:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in dialog]


def _renamed(turns: Turns, names: dict[str, str]) -> Turns:
    return [turn | {"from": names[turn["from"]]} for turn in turns]


def _with_two_in_a_row(turns: Turns) -> Turns:
    """Split the last answer of more than one sentence into two turns; if there is none, add a follow-up question."""
    for place in range(len(turns) - 1, -1, -1):
        first, stop, rest = turns[place]["value"].partition(". ")
        if rest:
            parts = [turns[place] | {"value": first + stop.strip()}, turns[place] | {"value": rest}]
            return [*turns[:place], *parts, *turns[place + 1 :]]
    return [turns[0], {"from": "human", "value": "Are you there?"}, *turns[1:]]


def _with_nothing_said(turns: Turns) -> Turns:
    place = int(fraction(turns[0]["value"], salt="nothing") * len(turns))
    return [*turns[:place], {"from": turns[place]["from"], "value": " "}, *turns[place:]]


def _in_html(turns: Turns) -> Turns:
    return [turn | {"value": f"<p>{html.escape(turn['value']).replace('. ', '.<br>')}</p>"} for turn in turns]


def _with_tag(turns: Turns) -> Turns:
    begin, end = SPECIAL_TAGS[:2]
    return [turns[0] | {"value": f"{begin} {turns[0]['value']} {end}"}, *turns[1:]]


def _greeted(turns: Turns) -> Turns:
    return [{"from": "gpt", "value": pick(_GREETINGS, turns[0]["value"], salt="greeting")}, *turns]


def _with_tool(turns: Turns) -> Turns:
    return [turns[0], _LOOKUP, _OBSERVATION, *turns[1:]]


Make = Callable[[Turns, str], Turns]
_SOUND: tuple[str, Make] = ("sound but for its names", lambda turns, last: turns)
_OPEN: tuple[str, Make] = (
    "a question at the end that nobody answered",
    lambda turns, last: [*turns, {"from": "human", "value": last}],
)
_ROUND: tuple[tuple[str, Make], ...] = (
    _OPEN,
    ("an answer before the first question", lambda turns, last: _greeted(turns)),
    ("two turns in a row of one speaker", lambda turns, last: _with_two_in_a_row(turns)),
    ("HTML in the text", lambda turns, last: _in_html(turns)),
    ("a turn that says nothing", lambda turns, last: _with_nothing_said(turns)),
    ("roles `customer` and `agent`", lambda turns, last: _renamed(turns, {"human": "customer", "gpt": "agent"})),
    ("roles `Human ` and `GPT`", lambda turns, last: _renamed(turns, {"human": "Human ", "gpt": "GPT"})),
    ("turns of a tool", lambda turns, last: _with_tool(turns)),
    ("a system text that stands last", lambda turns, last: [*turns, {"from": "system", "value": _NOTE}]),
    ("a tag of the chat format in the text", lambda turns, last: _with_tag(turns)),
    ("a greeting and no question", lambda turns, last: _greeted(turns)[:1]),
)
# Most dialogs of a log are valid, unanswered questions are the usual defect, and irreparable ones are rare.
_RARE = ("a tag of the chat format in the text", "a greeting and no question")
_KINDS: tuple[tuple[str, Make], ...] = tuple(
    kind for number in range(3) for kind in _ROUND if number == 0 or kind[0] not in _RARE for kind in (kind, _SOUND)
)
