"""Sets of instructions with their answers: Alpaca, GPTeacher, Dolly, Self-Instruct.

Alpaca has instruction, input, output, with LLaMA-Factory's optional system and history; GPTeacher a response in place of
the output; Dolly (databricks-dolly-15k) instruction, context, response; Self-Instruct (seed tasks and user-oriented
instructions) one instruction with instances of input and output.
"""

from collections.abc import Iterator

from llamachat.chat_format.dialog import DialogError
from llamachat.data.sources.source import (
    RawRecord,
    RawRow,
    Source,
    answered,
    joined,
    list_field,
    mapping_at,
    message,
    optional_text,
    text_field,
)


def convert_alpaca(row: RawRow) -> Iterator[RawRecord]:
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


def convert_gpteacher(row: RawRow) -> Iterator[RawRecord]:
    yield answered(joined(text_field(row, "instruction"), optional_text(row, "input")), text_field(row, "response"))


def convert_dolly(row: RawRow) -> Iterator[RawRecord]:
    yield answered(joined(text_field(row, "instruction"), optional_text(row, "context")), text_field(row, "response"))


def convert_self_instruct(row: RawRow) -> Iterator[RawRecord]:
    """One dialog an instance."""
    instruction = text_field(row, "instruction")
    for index, item in enumerate(list_field(row, "instances")):
        instance = mapping_at(item, f"instances[{index}]")
        yield answered(joined(instruction, optional_text(instance, "input")), text_field(instance, "output"))


ALPACA = Source(name="alpaca", kind="dialog", fields=frozenset({"instruction", "output"}), convert=convert_alpaca)
GPTEACHER = Source(
    name="gpteacher", kind="dialog", fields=frozenset({"instruction", "input", "response"}), convert=convert_gpteacher
)
DOLLY = Source(
    name="dolly", kind="dialog", fields=frozenset({"instruction", "context", "response"}), convert=convert_dolly
)
SELF_INSTRUCT = Source(
    name="self_instruct",
    kind="dialog",
    fields=frozenset({"instruction", "instances"}),
    convert=convert_self_instruct,
)
