"""Constraints that an answer keeps or breaks, and instructions made of them (Ghost Attention, Llama 2 section 3.3)."""

from llamachat.constraints.families import (
    CHECKABLE,
    FAMILIES,
    Constraint,
    Family,
    Recall,
    are_compatible,
    bundled_lists,
    families,
)
from llamachat.constraints.instruction import (
    Instruction,
    constrain,
    draw_instruction,
    is_kept,
    passes,
    recall_questions,
    recalled,
    values_of,
)
from llamachat.constraints.mending import mended, plain_recall
from llamachat.constraints.values import Side, parse_list, read_list, side_of

__all__ = [
    "CHECKABLE",
    "FAMILIES",
    "Constraint",
    "Family",
    "Instruction",
    "Recall",
    "Side",
    "are_compatible",
    "bundled_lists",
    "constrain",
    "draw_instruction",
    "families",
    "is_kept",
    "mended",
    "parse_list",
    "passes",
    "plain_recall",
    "read_list",
    "recall_questions",
    "recalled",
    "side_of",
    "values_of",
]
