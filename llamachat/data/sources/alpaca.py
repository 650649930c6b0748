"""Alpaca (instruction, input, output; with LLaMA-Factory's optional system and history) and GPTeacher (response)."""

from collections.abc import Iterator

from llamachat.data.sources.source import Record, Row, Source, joined, message, optional_text, text_field


def _convert(row: Row, *, answer: str, source: str) -> Iterator[Record]:
    messages = []
    system = optional_text(row, "system")
    if system.strip():
        messages.append(message("system", system))
    for question, reply in _history(row):
        messages += [message("user", question), message("assistant", reply)]
    question = joined(text_field(row, "instruction", source=source), optional_text(row, "input"))
    messages += [message("user", question), message("assistant", text_field(row, answer, source=source))]
    yield {"messages": messages}


def _history(row: Row) -> list[tuple[str, str]]:
    """Earlier pairs of question and answer, oldest first (LLaMA-Factory's multi-turn form of Alpaca)."""
    history = row.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 and all(isinstance(turn, str) for turn in pair) for pair in history
    ):
        raise ValueError(
            "'history' is not a list of pairs. It holds the earlier turns of the dialog, each as [question, answer]. "
            "Mend the pairs or remove the field."
        )
    return [(question, reply) for question, reply in history]


def convert_alpaca(row: Row) -> Iterator[Record]:
    return _convert(row, answer="output", source="alpaca")


def convert_gpteacher(row: Row) -> Iterator[Record]:
    return _convert(row, answer="response", source="gpteacher")


ALPACA = Source(name="alpaca", kind="dialog", fields=frozenset({"instruction", "output"}), convert=convert_alpaca)
GPTEACHER = Source(
    name="gpteacher", kind="dialog", fields=frozenset({"instruction", "input", "response"}), convert=convert_gpteacher
)
