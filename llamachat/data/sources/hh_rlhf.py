"""Anthropic's hh-rlhf: two transcripts, chosen and rejected, that part at the last answer.

Fields by the card of Anthropic/hh-rlhf: `chosen` and `rejected`, each a whole transcript as one text.
"""

import re
from collections.abc import Iterator

from llamachat.data.sources.source import Record, Row, Source, message, text_field

_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_OPENING = re.compile(r"\s*Human:")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def _turns(transcript: str, side: str) -> list[dict[str, str]]:
    marks = list(_MARK.finditer(transcript))
    if not marks or marks[0].start() != 0:
        raise ValueError(
            f"{side!r} does not begin with 'Human:'. A transcript of hh-rlhf marks its turns with a blank line and "
            "'Human:' or 'Assistant:'. Mend the marks, or name another 'format'."
        )
    ends = [mark.start() for mark in marks[1:]] + [len(transcript)]
    turns = [
        message(_ROLES[mark.group(1)], transcript[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=True)
    ]
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise ValueError(
            f"{side!r} does not end with an answer ('Assistant:') to a question. The answers at the end are what a "
            "pair compares. Cut the transcript after its last answer, or remove the row."
        )
    return turns


def convert(row: Row) -> Iterator[Record]:
    chosen = _turns(text_field(row, "chosen", source="hh_rlhf"), "chosen")
    rejected = _turns(text_field(row, "rejected", source="hh_rlhf"), "rejected")
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(
            "'chosen' and 'rejected' part before their last answer. A pair must share its prompt, since the loss "
            "compares two answers to one question. Cut both where they part, or remove the row."
        )
    yield {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _is_transcripts(row: Row) -> bool:
    """Pairs of plain answers under the same two names are usual; a prompt beside them says that these are such."""
    sides = (row["chosen"], row["rejected"])
    return not row.get("prompt") and all(isinstance(side, str) and _OPENING.match(side) for side in sides)


HH_RLHF = Source(
    name="hh_rlhf",
    kind="preference",
    fields=frozenset({"chosen", "rejected"}),
    convert=convert,
    shape=_is_transcripts,
)
