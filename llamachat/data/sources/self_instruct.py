"""Self-Instruct (seed tasks and user-oriented instructions): one instruction with instances of input and output."""

from collections.abc import Iterator

from llamachat.data.sources.source import (
    Record,
    Row,
    Source,
    joined,
    list_field,
    mapping_at,
    message,
    optional_text,
    text_field,
)


def convert(row: Row) -> Iterator[Record]:
    """One dialog an instance."""
    instruction = text_field(row, "instruction", source="self_instruct")
    for index, item in enumerate(list_field(row, "instances", source="self_instruct")):
        instance = mapping_at(item, f"'instances[{index}]'")
        question = joined(instruction, optional_text(instance, "input"))
        answer = text_field(instance, "output", source="self_instruct")
        yield {"messages": [message("user", question), message("assistant", answer)]}


SELF_INSTRUCT = Source(
    name="self_instruct", kind="dialog", fields=frozenset({"instruction", "instances"}), convert=convert
)
