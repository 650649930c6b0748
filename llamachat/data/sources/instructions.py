"""Sets of instructions with their answers: Alpaca, GPTeacher, Dolly (databricks-dolly-15k), Self-Instruct."""

from collections.abc import Iterator

from llamachat.chat_format.dialog import DialogError
from llamachat.data.sources.source import (
    RawRecord,
    RawRow,
    answered,
    joined,
    list_field,
    mapping_at,
    message,
    optional_text,
    source,
    text_field,
)


@source("dialog", "instruction output")
def alpaca(row: RawRow) -> Iterator[RawRecord]:
    record = answered(joined(text_field(row, "instruction"), optional_text(row, "input")), text_field(row, "output"))
    system = optional_text(row, "system")
    opening = [message("system", system)] if system.strip() else []
    yield {"messages": [*opening, *_history(row), *record["messages"]]}


def _history(row: RawRow) -> list[dict[str, str]]:
    """Earlier pairs of question and answer, oldest first (LLaMA-Factory's multi-turn form of Alpaca)."""
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
    yield answered(joined(text_field(row, "instruction"), optional_text(row, "input")), text_field(row, "response"))


@source("dialog", "instruction context response")
def dolly(row: RawRow) -> Iterator[RawRecord]:
    yield answered(joined(text_field(row, "instruction"), optional_text(row, "context")), text_field(row, "response"))


@source("dialog", "instruction instances")
def self_instruct(row: RawRow) -> Iterator[RawRecord]:
    """One dialog an instance (seed tasks and user-oriented instructions)."""
    instruction = text_field(row, "instruction")
    for index, item in enumerate(list_field(row, "instances")):
        instance = mapping_at(item, f"instances[{index}]")
        yield answered(joined(instruction, optional_text(instance, "input")), text_field(instance, "output"))
