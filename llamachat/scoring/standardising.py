"""Scores of different policies on one scale, by constants that are computed once from the SFT policy's answers.

Shapes: B answers. Whitening over each policy's own answers would hide improvement: every policy would have mean 0.
So each model's scores are standardized with mean and deviation of the SFT policy's answers. Under the gate the mean of
the SFT policy's combined scores need not be 0: the deciding model depends on the answer: each model judges a selected
part of the answers. Only differences between policies are meaningful.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamachat.errors import ScoringError
from llamachat.scoring.scores import Combined, Scores


@dataclass(frozen=True, slots=True)
class Scale:
    """The mean and deviation of one kind of score."""

    mean: float
    deviation: float

    def apply(self, scores_B: Tensor) -> Tensor:
        """(score - mean) / deviation."""
        return (scores_B - self.mean) / self.deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """A scale for each available model, and one for the combined score."""

    helpfulness: Scale | None
    safety: Scale | None
    combined: Scale

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> "Constants":
        """Create the constants from JSON values, as returned by `asdict`."""
        helpfulness, safety, combined = (
            None if values[name] is None else Scale(**values[name]) for name in ("helpfulness", "safety", "combined")
        )
        assert combined is not None
        return Constants(helpfulness=helpfulness, safety=safety, combined=combined)


def fit_constants(scores: Scores, combined: Combined) -> Constants:
    """Mean and deviation (divided by n) of the SFT policy's scores; raise ScoringError if they are all equal."""
    scales = {name: _scale(scores_B, f"the {name} model") for name, scores_B in scores.by_model().items()}
    return Constants(
        helpfulness=scales.get("helpfulness"),
        safety=scales.get("safety"),
        combined=_scale(combined.scores_B, "the combination of the models"),
    )


def standardise(scores: Scores, combined: Combined, constants: Constants) -> Tensor:
    """The combined scores in deviations of the SFT policy's scores, on the deciding model's scale, [B].

    With a gate, an answer decided by the safety model is on its scale, any other on the helpfulness model's. The
    gate itself compares raw scores.
    """
    if not combined.has_gate:
        return constants.combined.apply(combined.scores_B)
    assert scores.safety_B is not None and scores.helpfulness_B is not None, "the gate chooses between two models"
    assert constants.safety is not None and constants.helpfulness is not None
    on_safety_B = constants.safety.apply(scores.safety_B)
    on_helpfulness_B = constants.helpfulness.apply(scores.helpfulness_B)
    return torch.where(combined.is_gated_B, on_safety_B, on_helpfulness_B)


def _scale(scores_B: Tensor, source: str) -> Scale:
    values_B = scores_B.double()
    deviation = float(values_B.std(correction=0)) if len(values_B) else 0.0
    if deviation <= 1e-6:
        raise ScoringError(
            f"{source} gave {len(values_B)} answers of the SFT policy scores with deviation {deviation:.1e}. Other"
            " policies are measured in deviations of these scores, so they must differ. Evaluate on more prompts, or train"
            " the reward model: one that scores all answers alike is useless."
        )
    return Scale(float(values_B.mean()), deviation)
