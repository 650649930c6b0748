"""What `llamachat pairs` writes, once people have rated it: two answers to a prompt, and which one is better.

Fields: `prompt` (messages), `answer_a`, `answer_b`, `choice` ("a", "b", or null where nobody has rated the pair), and, each
where known, `rating` (one of our four words), `a_is_safe`, `b_is_safe`. Where the answers come from stands beside them and
is not read. An unrated pair holds no record; the reader counts it.
A chosen answer that is labelled unsafe beside a safe one is kept here, as in `pku_saferlhf_helpfulness`: people may
prefer it. No reward model learns from it (Llama 2, section 3.2.1): training leaves it out and counts it.
"""

from collections.abc import Iterator

from llamachat.data.sources.source import Record, Row, Source, boolean_field, list_field, message, text_field

_SIDES = {"a": "b", "b": "a"}


def convert(row: Row) -> Iterator[Record]:
    choice = row["choice"]
    if choice is None:
        _check_unrated(row)
        return
    if not isinstance(choice, str) or choice not in _SIDES:
        raise ValueError(
            f"'choice' is {choice!r}. A rated pair names its better answer, 'a' or 'b'; an unrated one has null. "
            f"Write {_meant(choice)}."
        )
    other = _SIDES[choice]
    record: Record = {
        "prompt": list_field(row, "prompt", source="rated_pairs"),
        "chosen": [message("assistant", text_field(row, f"answer_{choice}", source="rated_pairs"))],
        "rejected": [message("assistant", text_field(row, f"answer_{other}", source="rated_pairs"))],
    }
    if row.get("rating") is not None:
        record["rating"] = row["rating"]
    for label, side in (("chosen_is_safe", choice), ("rejected_is_safe", other)):
        if row.get(f"{side}_is_safe") is not None:
            record[label] = boolean_field(row, f"{side}_is_safe", source="rated_pairs")
    yield record


def _check_unrated(row: Row) -> None:
    """A rating without a choice is a slip of the pen, and dropping it would lose a person's work."""
    if row.get("rating") is not None:
        raise ValueError(
            f"'choice' is null, but 'rating' is {row['rating']!r}. A rating says how much better the chosen answer is, so "
            "it goes with a choice. Write 'a' or 'b', or take the rating out."
        )


def _meant(choice: object) -> str:
    near = choice.strip().lower() if isinstance(choice, str) else ""
    return f"'{near}'" if near in _SIDES else "'a', 'b' or null"


RATED_PAIRS = Source(
    name="rated_pairs",
    kind="preference",
    fields=frozenset({"prompt", "answer_a", "answer_b", "choice"}),
    convert=convert,
    has_lists=True,
)
