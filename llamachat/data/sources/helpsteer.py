"""NVIDIA's HelpSteer2 (graded answers; preferences with strength) and HelpSteer3 (preferences of up to three annotators).

Fields by the card of nvidia/HelpSteer2: a row of its main files is one answer, `prompt`, `response` and five grades from
0 to 4 (`helpfulness`, `correctness`, `coherence`, `complexity`, `verbosity`); consecutive rows share their prompt and are
compared by helpfulness, as the card says. A row of `preference/preference.jsonl.gz` is a pair: `prompt`, `response_1`,
`response_2`, `preference_strength` from -3 (the first is much better) to 3 (the second is), with `split` beside them.
Turns of a longer prompt are parted by lines `<extra_id_1>Assistant` and `<extra_id_1>User`.
Fields by the card of nvidia/HelpSteer3, configuration `preference`: `context` (messages up to the last question),
`response1`, `response2`, `overall_preference` from -3 to 3, with `domain`, `language`, `individual_preference` beside.
What strengths become, and that 0 gives no pair, stands in `llamachat.data.sources.strength`.
"""

import re
from collections.abc import Iterator, Sequence
from itertools import combinations

from llamachat.data.sources.source import (
    Gather,
    Record,
    Row,
    Source,
    as_text,
    list_field,
    mapping_at,
    message,
    number_field,
    text_field,
)
from llamachat.data.sources.strength import STRENGTH, graded_pair

_MARK = re.compile(r"\n<extra_id_1>(User|Assistant)\n")
_ROLES = {"User": "user", "Assistant": "assistant"}
_GRADES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def _turns(prompt: str) -> list[dict[str, str]]:
    first, *rest = _MARK.split(prompt)
    marks, texts = rest[::2], rest[1::2]
    return [message("user", first)] + [message(_ROLES[mark], text) for mark, text in zip(marks, texts, strict=True)]


def _strength(row: Row, name: str, *, source: str) -> float:
    value = number_field(row, name, source=source)
    if value not in range(-3, 4):
        raise ValueError(
            f"{name!r} is {value!r}. A row of {source} has a whole number from -3 (the first answer is much better) to 3 "
            "(the second is). Mend or remove the row."
        )
    return value


def join_answers(rows: Sequence[Row]) -> Row:
    """The answers to one prompt, which stand in rows of their own."""
    return {"prompt": rows[0]["prompt"], "graded_responses": list(rows)}


def convert_graded(row: Row) -> Iterator[Record]:
    prompt = _turns(text_field(row, "prompt", source="helpsteer2"))
    answers = list_field(row, "graded_responses", source="helpsteer2")
    graded = [
        (
            text_field(mapping_at(answer, "'graded_responses'"), "response", source="helpsteer2"),
            number_field(answer, "helpfulness", source="helpsteer2"),
        )
        for answer in answers
    ]
    for (text, grade), (other, other_grade) in combinations(graded, 2):
        yield from graded_pair(prompt, (text, other), other_grade - grade, STRENGTH)


def convert_preference(row: Row) -> Iterator[Record]:
    source = "helpsteer2_preference"
    answers = (text_field(row, "response_1", source=source), text_field(row, "response_2", source=source))
    strength = _strength(row, "preference_strength", source=source)
    yield from graded_pair(_turns(text_field(row, "prompt", source=source)), answers, strength, STRENGTH)


def convert_helpsteer3(row: Row) -> Iterator[Record]:
    context = [mapping_at(turn, "'context'") for turn in list_field(row, "context", source="helpsteer3")]
    prompt = [
        message(as_text(turn.get("role"), "context.role"), as_text(turn.get("content"), "context.content"))
        for turn in context
    ]
    answers = (text_field(row, "response1", source="helpsteer3"), text_field(row, "response2", source="helpsteer3"))
    yield from graded_pair(prompt, answers, _strength(row, "overall_preference", source="helpsteer3"), STRENGTH)


HELPSTEER2 = Source(
    name="helpsteer2",
    kind="preference",
    fields=frozenset({"prompt", "graded_responses"}),
    convert=convert_graded,
    gather=Gather(fields=frozenset({"prompt", "response", *_GRADES}), key="prompt", join=join_answers),
)
HELPSTEER2_PREFERENCE = Source(
    name="helpsteer2_preference",
    kind="preference",
    fields=frozenset({"prompt", "response_1", "response_2", "preference_strength"}),
    convert=convert_preference,
)
HELPSTEER3 = Source(
    name="helpsteer3",
    kind="preference",
    fields=frozenset({"context", "response1", "response2", "overall_preference"}),
    convert=convert_helpsteer3,
)
