"""Sets that grade answers: HelpSteer2, HelpSteer3, UltraFeedback. `sources.source` has the ratings that grades become.

A row of nvidia/HelpSteer2's main files is one answer with five grades from 0 to 4; consecutive rows share their prompt and
are compared by helpfulness, as its card says. A row of `preference/preference.jsonl.gz` is a pair with its strength from
-3 (the first is much better) to 3 (the second is). HelpSteer3's configuration `preference` has the same strength, of up
to three annotators.
In openbmb/UltraFeedback every two answers of different score are a pair, as the paper's own reward model was trained
(arXiv:2310.01377, section 3). The score is `fine-grained_score`, the mean of the four aspects' grades: `overall_score`
had wrong tens until the end of 2023. Where it is missing, as in copies from before, the mean is taken of the `Rating`s in
`annotations`. `custom_system_prompt` differs from answer to answer, and a pair has one prompt: it is left out.
HuggingFaceH4/ultrafeedback_binarized (and trl-lib's copy) holds whole dialogs and their `overall_score`s.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from llamachat.chat_format.dialog import DialogError
from llamachat.data.sources.source import (
    Gather,
    RawRecord,
    RawRow,
    Steps,
    as_text,
    graded_pair,
    message,
    pair_of_dialogs,
    rating_of_difference,
    source,
)

STRENGTH: Steps = (1, 2, 3)  # HelpSteer2 and HelpSteer3, and the difference of two grades of HelpSteer2
FINE_GRAINED: Steps = (0.5, 1, 2)  # UltraFeedback: means of four grades from 1 to 5
OVERALL: Steps = (1, 2, 4)  # UltraFeedback: one grade from 1 to 10

_MARK = re.compile(r"\n<extra_id_1>(User|Assistant)\n")
_ROLES = {"User": "user", "Assistant": "assistant"}
_GRADES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")


def _turns(row: RawRow) -> list[dict[str, str]]:
    first, *rest = _MARK.split(row.text("prompt"))
    marks, texts = rest[::2], rest[1::2]
    return [message("user", first)] + [message(_ROLES[mark], text) for mark, text in zip(marks, texts, strict=True)]


def _strength(row: RawRow, name: str) -> float:
    value = row.number(name)
    if value not in range(-3, 4):
        reason = (
            f"is {value!r}, but a whole number from -3 (the first answer is much better) to 3 (the second is) is due."
        )
        raise DialogError(name, reason, "Correct or remove the row.")
    return value


def join_answers(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The answers to one prompt, which are in rows of their own."""
    return {"prompt": rows[0]["prompt"], "graded_responses": list(rows)}


_ANSWERS = Gather(fields=frozenset({"prompt", "response", *_GRADES}), key="prompt", join=join_answers)


@source("preference", "prompt graded_responses", gather=_ANSWERS)
def helpsteer2(row: RawRow) -> Iterator[RawRecord]:
    prompt = _turns(row)
    graded = [(answer.text("response"), answer.number("helpfulness")) for answer in row.objects("graded_responses")]
    for (text, grade), (other, other_grade) in combinations(graded, 2):
        yield from graded_pair(prompt, (text, other), other_grade - grade, STRENGTH)


@source("preference", "prompt response_1 response_2 preference_strength")
def helpsteer2_preference(row: RawRow) -> Iterator[RawRecord]:
    answers = (row.text("response_1"), row.text("response_2"))
    yield from graded_pair(_turns(row), answers, _strength(row, "preference_strength"), STRENGTH)


@source("preference", "context response1 response2 overall_preference")
def helpsteer3(row: RawRow) -> Iterator[RawRecord]:
    answers = (row.text("response1"), row.text("response2"))
    yield from graded_pair(row.messages("context"), answers, _strength(row, "overall_preference"), STRENGTH)


@source("preference", "instruction completions", shape=lambda row: isinstance(row["completions"], list))
def ultrafeedback(row: RawRow) -> Iterator[RawRecord]:
    prompt = [message("user", row.text("instruction"))]
    # A few instructions of the set were answered by no model.
    completions = [] if row["completions"] == [] else row.objects("completions")
    graded = [_graded(completion, f"completions[{index}]") for index, completion in enumerate(completions)]
    for (text, score), (other, other_score) in combinations(graded, 2):
        # Means of equal grades may differ in their last bits.
        yield from graded_pair(prompt, (text, other), round(other_score - score, 6), FINE_GRAINED)


def _graded(completion: RawRow, where: str) -> tuple[str, float]:
    text = as_text(completion.get("response"), f"{where}.response")
    if completion.get("fine-grained_score") is not None:
        return text, completion.number("fine-grained_score")
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, Mapping) else []
    grades = [grade for grade in map(_grade, aspects) if grade is not None]
    if not grades:
        raise DialogError(
            where,
            "has no grade: neither 'fine-grained_score' nor 'annotations' with a 'Rating' each, which say which answer is "
            "better.",
            "Correct or remove the row.",
        )
    return text, sum(grades) / len(grades)


def _grade(aspect: object) -> int | None:
    """The grade of one aspect, a text of digits there; "N/A" where it does not apply."""
    rating = aspect.get("Rating") if isinstance(aspect, Mapping) else None
    return int(rating) if isinstance(rating, str) and rating in ("1", "2", "3", "4", "5") else None


def _is_dialogs(row: Mapping[str, Any]) -> bool:
    return isinstance(row["chosen"], list) and isinstance(row["rejected"], list)


@source("preference", "chosen rejected score_chosen score_rejected", shape=_is_dialogs, has_lists=True)
def ultrafeedback_binarized(row: RawRow) -> Iterator[RawRecord]:
    record = pair_of_dialogs(row.messages("chosen"), row.messages("rejected"))
    better, worse = row.number("score_chosen"), row.number("score_rejected")
    if better < worse:
        raise DialogError(
            "score_chosen",
            "is below 'score_rejected', but the chosen answer has the higher score.",
            "Swap the two sides, or remove the row.",
        )
    if better > worse:
        yield {**record, "rating": rating_of_difference(better - worse, OVERALL)}
