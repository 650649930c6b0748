"""ShareGPT (conversations of from and value) and the preference form that LLaMA-Factory makes of it."""

from collections.abc import Iterator

from llamachat.chat_format.dialog import DialogError
from llamachat.data.sources.source import (
    RawRecord,
    RawRow,
    as_text,
    list_field,
    mapping_at,
    message,
    optional_text,
    pair,
    source,
)

# The writers of these files named the sides after the model or the site that answered.
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


def _turn(value: object, where: str) -> dict[str, str]:
    turn = mapping_at(value, where)
    sender = turn.get("from")
    if not isinstance(sender, str) or sender not in ROLES:
        raise DialogError(
            f"{where}.from",
            f"is {sender!r}. It must be one of {', '.join(ROLES)}, since a dialog has these sides only.",
            "Rename the side, or leave the row out if it holds tool calls (`llamachat data convert` does both).",
        )
    return message(ROLES[sender], as_text(turn.get("value"), f"{where}.value"))


def _messages(row: RawRow) -> list[dict[str, str]]:
    turns = list_field(row, "conversations")
    messages = [_turn(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    system = optional_text(row, "system")
    return [message("system", system), *messages] if system.strip() else messages


@source("dialog", "conversations")
def sharegpt(row: RawRow) -> Iterator[RawRecord]:
    yield {"messages": _messages(row)}


@source("preference", "conversations chosen rejected")
def llamafactory_preference(row: RawRow) -> Iterator[RawRecord]:
    prompt = _messages(row)
    answers = [_turn(row.get(side), side) for side in ("chosen", "rejected")]
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        if answer["role"] != "assistant":
            raise DialogError(
                f"{side}.from",
                "says that the user speaks. The two sides of a pair are answers of the assistant.",
                "Move the user's turn to 'conversations'.",
            )
    yield pair(prompt, *(answer["content"] for answer in answers))
