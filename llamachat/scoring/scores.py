"""Input and results of scoring: answers, the raw scores of the two reward models, and the combined score.

Shapes: B answers. A raw score is the output of a reward model's head before any sigmoid: a logit, from -inf to inf.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llamachat.chat_format.dialog import Message
from llamachat.errors import ScoringError


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Sampled answers, with the other inputs of scoring."""

    prompts: Sequence[Sequence[Message]]
    completions: Sequence[str]
    is_safety_prompt_B: Tensor  # prompts marked as asking for something unsafe
    is_finished_B: Tensor  # False if the length limit truncated the answer
    # Additional values per answer, for a user's function.
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.is_safety_prompt_B.dtype == self.is_finished_B.dtype == torch.bool
        lengths = {len(self.prompts), len(self.is_safety_prompt_B), len(self.is_finished_B)}
        lengths |= {len(values) for values in self.columns.values()}
        assert lengths == {len(self.completions)}, "one of each by answer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Raw scores of the answers by each reward model; None for a missing model."""

    helpfulness_B: Tensor | None
    safety_B: Tensor | None

    def __post_init__(self) -> None:
        scores_by_model = self.by_model()
        assert len({scores_B.shape for scores_B in scores_by_model.values()}) <= 1, "both models score the same answers"
        for name, scores_B in scores_by_model.items():
            assert scores_B.dim() == 1, "one number for each answer"
            check_finite(scores_B, f"the {name} model")

    def by_model(self) -> dict[str, Tensor]:
        """The available scores by model name."""
        both = {"helpfulness": self.helpfulness_B, "safety": self.safety_B}
        return {name: scores_B for name, scores_B in both.items() if scores_B is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Combined:
    """One raw score for each answer, and the decisions of the gate."""

    scores_B: Tensor
    is_gated_B: Tensor  # the gate used the safety model's score instead of the helpfulness model's
    is_unsafe_B: Tensor  # the safety model's score is below the gate's threshold; all False without a gate
    has_gate: bool  # scores come from two models with different scales


def check_finite(scores_B: Tensor, source: str) -> None:
    """Raise ScoringError if a score is infinite or NaN."""
    wrong = (~scores_B.isfinite()).nonzero().flatten().tolist()
    if wrong:
        raise ScoringError(
            f"{source} gave {float(scores_B[wrong[0]])} for answer {wrong[0]} ({len(wrong)} of {len(scores_B)} are not"
            " finite). Every score must be finite, since whitening mixes all of them: a single bad one would spoil the batch."
            " Train the reward model again (a lower learning rate, base.dtype bfloat16 instead of float16), or correct"
            " the function."
        )
