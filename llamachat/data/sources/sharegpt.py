"""ShareGPT (conversations of from and value) and the preference form that LLaMA-Factory makes of it."""

from collections.abc import Iterator
from typing import Any

from llamachat.data.sources.source import Record, Row, Source, as_text, list_field, mapping_at, message, optional_text

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
    turn = mapping_at(value, f"'{where}'")
    sender = turn.get("from")
    if not isinstance(sender, str) or sender not in ROLES:
        raise ValueError(
            f"'{where}.from' is {sender!r}. It must be one of {', '.join(ROLES)}, since a dialog has these sides only. "
            "Rename the side, or leave the row out if it holds tool calls (`llamachat data convert` does both)."
        )
    return message(ROLES[sender], as_text(turn.get("value"), f"{where}.value"))


def _messages(row: Row, *, source: str) -> list[dict[str, str]]:
    turns = list_field(row, "conversations", source=source)
    messages = [_turn(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    system = optional_text(row, "system")
    return [message("system", system), *messages] if system.strip() else messages


def convert_dialog(row: Row) -> Iterator[Record]:
    yield {"messages": _messages(row, source="sharegpt")}


def convert_preference(row: Row) -> Iterator[Record]:
    record: dict[str, Any] = {"prompt": _messages(row, source="llamafactory_preference")}
    for side in ("chosen", "rejected"):
        answer = _turn(row.get(side), side)
        if answer["role"] != "assistant":
            raise ValueError(
                f"'{side}.from' says that the user speaks. The two sides of a pair are answers of the assistant. "
                "Move the user's turn to 'conversations'."
            )
        record[side] = [answer]
    yield record


SHAREGPT = Source(name="sharegpt", kind="dialog", fields=frozenset({"conversations"}), convert=convert_dialog)
LLAMAFACTORY_PREFERENCE = Source(
    name="llamafactory_preference",
    kind="preference",
    fields=frozenset({"conversations", "chosen", "rejected"}),
    convert=convert_preference,
)
