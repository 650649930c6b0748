"""Sets that label answers without grading them: hh-rlhf, PKU-SafeRLHF, BeaverTails, and pairs that people rated for us.

A row of Anthropic/hh-rlhf is two whole transcripts, each one text, that part at the last answer.
PKU-Alignment/PKU-SafeRLHF annotates harmlessness and helpfulness apart, so one row holds two pairs, often with opposite
winners; each is a source of its own, and both carry the safety labels. The releases of 10K and 30K rows have the same
fields; PKU-SafeRLHF-single-dimension has no safety labels and is none of these.
PKU-Alignment/BeaverTails has splits named `330k_train`, `30k_train` and so on, so its path names one.
Rated pairs are what `llamachat pairs` writes, once people have rated it. An unrated pair holds no record; the reader
counts it. A chosen answer that is labelled unsafe next to a safe one is kept here, as in `pku_saferlhf_helpfulness`:
people may prefer it. No reward model learns from it (Llama 2, section 3.2.1): training leaves it out and counts it.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from llamachat.chat_format.dialog import DialogError
from llamachat.data.sources.source import RawRecord, RawRow, answered, message, pair, pair_of_dialogs, source

_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_OPENING = re.compile(r"\s*Human:")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_SIDES = {"a": "b", "b": "a"}
_PKU_FIELDS = "prompt response_0 response_1 is_response_0_safe is_response_1_safe better_response_id safer_response_id"


def _is_transcripts(row: Mapping[str, Any]) -> bool:
    """Pairs of plain answers under the same two names are usual; a prompt next to them says that these are such."""
    sides = (row["chosen"], row["rejected"])
    return not row.get("prompt") and all(isinstance(side, str) and _OPENING.match(side) for side in sides)


@source("preference", "chosen rejected", shape=_is_transcripts)
def hh_rlhf(row: RawRow) -> Iterator[RawRecord]:
    yield pair_of_dialogs(_transcript(row, "chosen"), _transcript(row, "rejected"))


def _transcript(row: RawRow, side: str) -> list[dict[str, str]]:
    text = row.text(side)
    marks = list(_MARK.finditer(text))
    if not marks or marks[0].start() != 0:
        raise DialogError(
            side,
            "does not begin with 'Human:'. A transcript marks its turns with a blank line and 'Human:' or 'Assistant:'.",
            "Correct the marks, or name another 'format'.",
        )
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        message(_ROLES[mark.group(1)], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)
    ]


def _pku_pair(row: RawRow, winner: str) -> RawRecord:
    best = row.get(winner)
    if isinstance(best, bool) or best not in (0, 1):
        reason = f"is {best!r}, but 0 or 1 is required there, the number of the answer that wins."
        raise DialogError(winner, reason, "Correct or remove the row.")
    best = int(best)
    return pair(
        [message("user", row.text("prompt"))],
        row.text(f"response_{best}"),
        row.text(f"response_{1 - best}"),
        chosen_is_safe=row.boolean(f"is_response_{best}_safe"),
        rejected_is_safe=row.boolean(f"is_response_{1 - best}_safe"),
    )


@source("preference", _PKU_FIELDS)
def pku_saferlhf_safety(row: RawRow) -> Iterator[RawRecord]:
    record = _pku_pair(row, "safer_response_id")
    if record["rejected_is_safe"] and not record["chosen_is_safe"]:
        raise DialogError(
            "safer_response_id",
            "names the unsafe answer, but the other one is labelled safe. A safety pair teaches that the safe answer is "
            "the better one.",
            "Correct the label or remove the row.",
        )
    yield record


@source("preference", _PKU_FIELDS)
def pku_saferlhf_helpfulness(row: RawRow) -> Iterator[RawRecord]:
    yield _pku_pair(row, "better_response_id")


@source("dialog", "prompt response category is_safe", shape=lambda row: isinstance(row["category"], Mapping))
def beavertails(row: RawRow) -> Iterator[RawRecord]:
    dialog = answered(row.text("prompt"), row.text("response"))
    yield {**dialog, "is_safe": row.boolean("is_safe")}


@source("preference", "prompt answer_a answer_b choice", has_lists=True)
def rated_pairs(row: RawRow) -> Iterator[RawRecord]:
    choice = row["choice"]
    if choice is None and row.get("rating") is None:
        return
    if choice is None:
        # Dropping it would lose a person's work.
        raise DialogError(
            "choice",
            f"is null, but 'rating' is {row['rating']!r}. A rating says how much better the chosen answer is.",
            "Write 'a' or 'b', or take the rating out.",
        )
    if not isinstance(choice, str) or choice not in _SIDES:
        near = choice.strip().lower() if isinstance(choice, str) else ""
        raise DialogError(
            "choice",
            f"is {choice!r}. A rated pair names its better answer, 'a' or 'b'; an unrated one has null.",
            f"Write '{near}'." if near in _SIDES else "Write 'a', 'b' or null.",
        )
    labels = {} if row.get("rating") is None else {"rating": row["rating"]}
    other = _SIDES[choice]
    for label, side in (("chosen_is_safe", choice), ("rejected_is_safe", other)):
        if row.get(f"{side}_is_safe") is not None:
            labels[label] = row.boolean(f"{side}_is_safe")
    yield pair(row.entries("prompt"), row.text(f"answer_{choice}"), row.text(f"answer_{other}"), **labels)
