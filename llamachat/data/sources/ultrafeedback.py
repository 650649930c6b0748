"""UltraFeedback: four graded answers to an instruction, or the pair that Hugging Face's H4 made of them.

Fields of openbmb/UltraFeedback, by its card: `instruction`, `completions` (each with `response`, `fine-grained_score`,
`overall_score`, `annotations`, `custom_system_prompt`, `principle`, `model`, `critique`), `source`, `models`,
`correct_answers`, `incorrect_answers`. Every two answers of different score are a pair, as the paper's own reward model
was trained (arXiv:2310.01377, section 3). The score is `fine-grained_score`, the mean of the four aspects' grades:
`overall_score` held wrong tens until the end of 2023. Where it is missing, as in copies of before, the mean is taken of
the `Rating`s in `annotations`. `custom_system_prompt` differs from answer to answer, and a pair has one prompt: it is
left out.
Fields of HuggingFaceH4/ultrafeedback_binarized (and trl-lib's copy), by its card: `chosen` and `rejected` (whole
dialogs), `score_chosen`, `score_rejected` (the `overall_score`s), with `prompt`, `prompt_id` and `messages` beside them.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from llamachat.data.sources.source import (
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
from llamachat.data.sources.strength import FINE_GRAINED, OVERALL, graded_pair


def convert(row: Row) -> Iterator[Record]:
    prompt = [message("user", text_field(row, "instruction", source="ultrafeedback"))]
    graded = [
        _graded(mapping_at(item, f"'completions[{index}]'"), f"completions[{index}]")
        for index, item in enumerate(_completions(row))
    ]
    for (text, score), (other, other_score) in combinations(graded, 2):
        # Means of equal grades may differ in their last bits.
        yield from graded_pair(prompt, (text, other), round(other_score - score, 6), FINE_GRAINED)


def _completions(row: Row) -> list[Any]:
    # A few instructions of the set were answered by no model.
    return [] if row["completions"] == [] else list_field(row, "completions", source="ultrafeedback")


def _graded(completion: Row, where: str) -> tuple[str, float]:
    text = as_text(completion.get("response"), f"{where}.response")
    if completion.get("fine-grained_score") is not None:
        return text, number_field(completion, "fine-grained_score", source="ultrafeedback")
    annotations = completion.get("annotations")
    grades = [_grade(aspect) for aspect in annotations.values()] if isinstance(annotations, Mapping) else []
    told = [grade for grade in grades if grade is not None]
    if not told:
        raise ValueError(
            f"'{where}' has no grade. An answer of ultrafeedback has 'fine-grained_score', or 'annotations' with a "
            "'Rating' each, which say which answer is better. Mend or remove the row."
        )
    return text, sum(told) / len(told)


def _grade(aspect: object) -> int | None:
    """The grade of one aspect, a text of digits there; "N/A" where it does not apply."""
    rating = aspect.get("Rating") if isinstance(aspect, Mapping) else None
    return int(rating) if isinstance(rating, str) and rating in ("1", "2", "3", "4", "5") else None


def convert_binarized(row: Row) -> Iterator[Record]:
    chosen, rejected = (_dialog(row, side) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError(
            "'chosen' and 'rejected' part before their last answer. A pair must share its prompt, since the loss "
            "compares two answers to one question. Cut both where they part, or remove the row."
        )
    better, worse = (
        number_field(row, f"score_{side}", source="ultrafeedback_binarized") for side in ("chosen", "rejected")
    )
    if better < worse:
        raise ValueError(
            "'score_chosen' is below 'score_rejected'. The chosen answer of ultrafeedback_binarized has the higher score. "
            "Swap the two sides, or remove the row."
        )
    yield from graded_pair(chosen[:-1], (rejected[-1]["content"], chosen[-1]["content"]), better - worse, OVERALL)


def _dialog(row: Row, side: str) -> list[dict[str, str]]:
    turns = [mapping_at(turn, f"'{side}'") for turn in list_field(row, side, source="ultrafeedback_binarized")]
    messages = [
        message(as_text(turn.get("role"), f"{side}.role"), as_text(turn.get("content"), f"{side}.content"))
        for turn in turns
    ]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{side!r} does not end with an answer to a question. It holds the whole dialog in "
            "ultrafeedback_binarized. Add what is missing, or remove the row."
        )
    return messages


ULTRAFEEDBACK = Source(
    name="ultrafeedback",
    kind="preference",
    fields=frozenset({"instruction", "completions"}),
    convert=convert,
    shape=lambda row: isinstance(row["completions"], list),
)
ULTRAFEEDBACK_BINARIZED = Source(
    name="ultrafeedback_binarized",
    kind="preference",
    fields=frozenset({"chosen", "rejected", "score_chosen", "score_rejected"}),
    convert=convert_binarized,
    shape=lambda row: isinstance(row["chosen"], list) and isinstance(row["rejected"], list),
    has_lists=True,
)
