"""Dolly (databricks-dolly-15k): instruction, context, response."""

from collections.abc import Iterator

from llamachat.data.sources.source import Record, Row, Source, joined, message, optional_text, text_field


def convert(row: Row) -> Iterator[Record]:
    question = joined(text_field(row, "instruction", source="dolly"), optional_text(row, "context"))
    answer = text_field(row, "response", source="dolly")
    yield {"messages": [message("user", question), message("assistant", answer)]}


DOLLY = Source(name="dolly", kind="dialog", fields=frozenset({"instruction", "context", "response"}), convert=convert)
