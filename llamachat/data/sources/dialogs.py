"""Data sets of dialogs: instructions with answers, and ShareGPT with LLaMA-Factory's preference variant of it.

Instructions: Alpaca, GPTeacher, Dolly (databricks-dolly-15k), Self-Instruct.
"""

from collections.abc import Iterator

from llamachat.chat_format.dialog import DialogError
from llamachat.data.sources.source import RawRecord, RawRow, answered, as_row, as_text, joined, message, pair, source

# These files name the roles after the model or website that answered.
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


def _instructed(row: RawRow, text: str, answer: str) -> RawRecord:
    """The dialog of an instruction, its optional input text, and the answer, under these keys."""
    return answered(joined(row.text("instruction"), row.optional_text(text)), row.text(answer))


def _system(row: RawRow) -> list[dict[str, str]]:
    system = row.optional_text("system")
    return [message("system", system)] if system.strip() else []


@source("dialog", "instruction output")
def alpaca(row: RawRow) -> Iterator[RawRecord]:
    record = _instructed(row, "input", "output")
    yield {"messages": [*_system(row), *_history(row), *record["messages"]]}


def _history(row: RawRow) -> list[dict[str, str]]:
    """Earlier question-answer pairs, oldest first (LLaMA-Factory's multi-turn variant of Alpaca)."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair) for pair in history
    ):
        raise DialogError(
            "history",
            "is not a list of pairs. It holds the earlier turns of the dialog, each as [question, answer].",
            "Correct the pairs or remove the field.",
        )
    return [turn for question, reply in history for turn in answered(question, reply)["messages"]]


@source("dialog", "instruction input response")
def gpteacher(row: RawRow) -> Iterator[RawRecord]:
    yield _instructed(row, "input", "response")


@source("dialog", "instruction context response")
def dolly(row: RawRow) -> Iterator[RawRecord]:
    yield _instructed(row, "context", "response")


@source("dialog", "instruction instances")
def self_instruct(row: RawRow) -> Iterator[RawRecord]:
    """Yield one dialog per instance (seed tasks and user-oriented instructions)."""
    for instance in row.objects("instances"):
        yield answered(joined(row.text("instruction"), instance.optional_text("input")), instance.text("output"))


def _turn(value: object, where: str) -> dict[str, str]:
    turn = as_row(value, where)
    sender = turn.get("from")
    if not isinstance(sender, str) or sender not in ROLES:
        raise DialogError(
            f"{where}.from",
            f"is {sender!r}. It must be one of {', '.join(ROLES)}, since a dialog has these sides only.",
            "Rename the side, or leave the row out if it holds tool calls (`llamachat data convert` does both).",
        )
    return message(ROLES[sender], as_text(turn.get("value"), f"{where}.value"))


def _messages(row: RawRow) -> list[dict[str, str]]:
    turns = enumerate(row.entries("conversations"))
    return [*_system(row), *(_turn(turn, f"conversations[{index}]") for index, turn in turns)]


@source("dialog", "conversations")
def sharegpt(row: RawRow) -> Iterator[RawRecord]:
    yield {"messages": _messages(row)}


@source("preference", "conversations chosen rejected")
def llamafactory_preference(row: RawRow) -> Iterator[RawRecord]:
    prompt = _messages(row)
    answers = {side: _turn(row.get(side), side) for side in ("chosen", "rejected")}
    for side, answer in answers.items():
        if answer["role"] != "assistant":
            raise DialogError(
                f"{side}.from",
                "says that it is the user's. The two sides of a pair are answers of the assistant.",
                "Move the user's turn to 'conversations'.",
            )
    yield pair(prompt, *(answer["content"] for answer in answers.values()))
