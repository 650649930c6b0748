"""PKU-Alignment's sets: PKU-SafeRLHF (two answers compared twice) and BeaverTails (answers labelled safe or unsafe).

PKU-SafeRLHF annotates harmlessness and helpfulness apart, so one row holds two pairs, often with opposite winners. Each
is a source of its own, for the safety and for the helpfulness reward model; both carry the safety labels.
Fields by the card of PKU-Alignment/PKU-SafeRLHF: `prompt`, `response_0`, `response_1`, `is_response_0_safe`,
`is_response_1_safe`, `better_response_id` (the more helpful one), `safer_response_id`; categories, severities and
origins stand beside them and are not read. The set's releases of 10K and 30K rows have the same fields;
PKU-SafeRLHF-single-dimension has no safety labels and is none of these.
Fields by the card of PKU-Alignment/BeaverTails: `prompt`, `response`, `category` (14 kinds of harm, each true or false),
`is_safe`. Its splits are named `330k_train`, `30k_train` and so on, so its path names one.
"""

from collections.abc import Iterator, Mapping

from llamachat.data.sources.source import Record, Row, Source, boolean_field, message, text_field


def _pair(row: Row, *, winner: str, source: str) -> Record:
    best = row.get(winner)
    if isinstance(best, bool) or best not in (0, 1):
        raise ValueError(
            f"{winner!r} is {best!r}. A row of {source} has 0 or 1 there, the number of the answer that wins. "
            "Mend or remove the row."
        )
    best = int(best)
    return {
        "prompt": [message("user", text_field(row, "prompt", source=source))],
        "chosen": [message("assistant", text_field(row, f"response_{best}", source=source))],
        "rejected": [message("assistant", text_field(row, f"response_{1 - best}", source=source))],
        "chosen_is_safe": boolean_field(row, f"is_response_{best}_safe", source=source),
        "rejected_is_safe": boolean_field(row, f"is_response_{1 - best}_safe", source=source),
    }


def convert_safety(row: Row) -> Iterator[Record]:
    pair = _pair(row, winner="safer_response_id", source="pku_saferlhf_safety")
    if pair["rejected_is_safe"] and not pair["chosen_is_safe"]:
        raise ValueError(
            "'safer_response_id' names the unsafe answer, but the other one is labelled safe. A safety pair teaches that "
            "the safe answer is the better one. Mend the label or remove the row."
        )
    yield pair


def convert_helpfulness(row: Row) -> Iterator[Record]:
    yield _pair(row, winner="better_response_id", source="pku_saferlhf_helpfulness")


def convert_beavertails(row: Row) -> Iterator[Record]:
    answer = text_field(row, "response", source="beavertails")
    yield {
        "messages": [
            message("user", text_field(row, "prompt", source="beavertails")),
            message("assistant", answer),
        ],
        "is_safe": boolean_field(row, "is_safe", source="beavertails"),
    }


_FIELDS = frozenset(
    {
        *("prompt", "response_0", "response_1", "is_response_0_safe", "is_response_1_safe"),
        *("better_response_id", "safer_response_id"),
    }
)
PKU_SAFETY = Source(name="pku_saferlhf_safety", kind="preference", fields=_FIELDS, convert=convert_safety)
PKU_HELPFULNESS = Source(
    name="pku_saferlhf_helpfulness", kind="preference", fields=_FIELDS, convert=convert_helpfulness
)
BEAVERTAILS = Source(
    name="beavertails",
    kind="dialog",
    fields=frozenset({"prompt", "response", "category", "is_safe"}),
    convert=convert_beavertails,
    shape=lambda row: isinstance(row["category"], Mapping),
)
