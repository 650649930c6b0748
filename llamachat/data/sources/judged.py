"""Data sets with judged answers: labels (hh-rlhf, PKU-SafeRLHF, BeaverTails, our rated pairs) or grades.

A row of Anthropic/hh-rlhf consists of two whole transcripts, each one text, that differ in the last answer.
PKU-Alignment/PKU-SafeRLHF annotates harmlessness and helpfulness separately, so one row contains two pairs, often with
opposite winners; each is a separate source, both with safety labels. The releases with 10K and 30K rows have the
same fields; PKU-SafeRLHF-single-dimension has no safety labels and is not supported.
PKU-Alignment/BeaverTails has splits named `330k_train`, `30k_train` and so on, so its path must name one.
Rated pairs come from `llamachat pairs`, after rating. An unrated pair contains no record; the reader counts it. A
chosen answer labelled unsafe next to a safe one is kept, as in `pku_saferlhf_helpfulness`: people may prefer it. No
reward model is trained on it (Llama 2, section 3.2.1): training drops and counts it.

The grades are those of HelpSteer2, HelpSteer3 and UltraFeedback; `sources.source` maps them to ratings.
A row of nvidia/HelpSteer2's main files is one answer with five grades from 0 to 4; consecutive rows share a prompt and
are compared by helpfulness, as its card says. A row of `preference/preference.jsonl.gz` is a pair with a strength from
-3 (the first is much better) to 3 (the second is). HelpSteer3's configuration `preference` has the same, from up
to three annotators.
In openbmb/UltraFeedback every two answers with different scores form a pair, as in training the paper's own reward
model (arXiv:2310.01377, section 3). The score is `fine-grained_score`, the mean grade of the four aspects:
`overall_score` had wrong tens until the end of 2023. If it is missing, as in older copies, the score is the mean of the
`Rating`s in `annotations`. `custom_system_prompt` differs between answers, but a pair has one prompt, so it is dropped.
HuggingFaceH4/ultrafeedback_binarized (and trl-lib's copy) contains whole dialogs and their `overall_score`s.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from llamachat.chat_format.dialog import DialogError
from llamachat.data.sources.source import (
    Gather,
    RawRecord,
    RawRow,
    Steps,
    answered,
    as_text,
    graded_pair,
    message,
    pair,
    pair_of_dialogs,
    rating_of_difference,
    source,
)

STRENGTH: Steps = (1, 2, 3)  # HelpSteer2 and HelpSteer3; also differences of HelpSteer2 grades
FINE_GRAINED: Steps = (0.5, 1, 2)  # UltraFeedback: means of four grades from 1 to 5
OVERALL: Steps = (1, 2, 4)  # UltraFeedback: one grade from 1 to 10

_HELPSTEER_MARK = re.compile(r"\n<extra_id_1>(User|Assistant)\n")
_HELPSTEER_ROLES = {"User": "user", "Assistant": "assistant"}
_GRADES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")

_HH_MARK = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_HH_OPENING = re.compile(r"\s*Human:")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_SIDES = {"a": "b", "b": "a"}
_PKU_FIELDS = "prompt response_0 response_1 is_response_0_safe is_response_1_safe better_response_id safer_response_id"


# -- labels


def _is_transcripts(row: Mapping[str, Any]) -> bool:
    """Whether a row has two transcripts and no prompt; pairs of plain answers with the same two keys have a prompt."""
    sides = (row["chosen"], row["rejected"])
    return not row.get("prompt") and all(isinstance(side, str) and _HH_OPENING.match(side) for side in sides)


@source("preference", "chosen rejected", shape=_is_transcripts)
def hh_rlhf(row: RawRow) -> Iterator[RawRecord]:
    yield pair_of_dialogs(_transcript(row, "chosen"), _transcript(row, "rejected"))


def _transcript(row: RawRow, side: str) -> list[dict[str, str]]:
    text = row.text(side)
    marks = list(_HH_MARK.finditer(text))
    if not marks or marks[0].start() != 0:
        raise DialogError(
            side,
            "does not begin with 'Human:'. A transcript marks its turns with a blank line and 'Human:' or 'Assistant:'.",
            "Correct the marks, or name another 'format'.",
        )
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return [
        message(_HH_ROLES[mark.group(1)], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)
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
    choice = row.get("choice")  # in a table null means that the key is absent
    if choice is None and row.get("rating") is None:
        return
    if choice is None:
        # Dropping it would lose an annotator's work.
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


# -- grades


def _turns(row: RawRow) -> list[dict[str, str]]:
    first, *rest = _HELPSTEER_MARK.split(row.text("prompt"))
    marks, texts = rest[::2], rest[1::2]
    return [message("user", first)] + [
        message(_HELPSTEER_ROLES[mark], text) for mark, text in zip(marks, texts, strict=True)
    ]


def _strength(row: RawRow, name: str) -> float:
    value = row.number(name)
    if value not in range(-3, 4):
        reason = (
            f"is {value!r}, but a whole number from -3 (the first answer is much better) to 3 (the second is) is due."
        )
        raise DialogError(name, reason, "Correct or remove the row.")
    return value


_ANSWERS = Gather(  # the answers to one prompt, which are in separate rows
    fields=frozenset({"prompt", "response", *_GRADES}),
    key="prompt",
    join=lambda rows: {"prompt": rows[0]["prompt"], "graded_responses": list(rows)},
)


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
    # Some instructions of the set have no answer from any model.
    completions = [] if row["completions"] == [] else row.objects("completions")
    graded = [_graded(completion, f"completions[{index}]") for index, completion in enumerate(completions)]
    for (text, score), (other, other_score) in combinations(graded, 2):
        # Means of equal grades may differ by rounding.
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
    """The grade of one aspect, stored as digits; "N/A" if it does not apply."""
    rating = aspect.get("Rating") if isinstance(aspect, Mapping) else None
    return int(rating) if isinstance(rating, str) and rating in ("1", "2", "3", "4", "5") else None


@source(
    "preference",
    "chosen rejected score_chosen score_rejected",
    shape=lambda row: isinstance(row["chosen"], list) and isinstance(row["rejected"], list),
    has_lists=True,
)
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
