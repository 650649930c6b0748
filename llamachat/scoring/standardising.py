"""Scores of different policies on one scale: constants taken once, from the SFT policy's answers, and then frozen.

Shapes: B answers. Whitening over a policy's own answers would hide that it got better: every policy would have mean 0.
Each model's scores are measured from the mean of the SFT policy's answers, in their deviation. Under the gate the mean of
the SFT policy's combined scores need not be 0: which model decides depends on the answer, so each model's scores count on a
chosen part of the answers. Differences between policies are what these scores are for.
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
    """What one kind of score is measured from, and by."""

    mean: float
    deviation: float

    def apply(self, scores_B: Tensor) -> Tensor:
        """(score - mean) / deviation."""
        return (scores_B - self.mean) / self.deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Constants:
    """A scale for each model there is, and one for the combined score."""

    helpfulness: Scale | None
    safety: Scale | None
    combined: Scale

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> "Constants":
        """The constants of these JSON values, as `asdict` gives them."""
        helpfulness, safety, combined = (
            None if values[name] is None else Scale(**values[name]) for name in ("helpfulness", "safety", "combined")
        )
        assert combined is not None
        return Constants(helpfulness=helpfulness, safety=safety, combined=combined)


def fit_constants(scores: Scores, combined: Combined) -> Constants:
    """Mean and deviation (divided by n) of the SFT policy's scores; ScoringError where they do not differ."""
    scales = {name: _scale(scores_B, f"the {name} model") for name, scores_B in scores.by_model().items()}
    return Constants(
        helpfulness=scales.get("helpfulness"),
        safety=scales.get("safety"),
        combined=_scale(combined.scores_B, "the combination of the models"),
    )


def standardise(scores: Scores, combined: Combined, constants: Constants) -> Tensor:
    """The combined scores, each in deviations of the SFT policy's scores by the model that decided, [B].

    An answer that the gate gave to the safety model is measured on that model's scale, and, where there is a gate, any
    other on the helpfulness model's: the gate itself is decided on raw scores.
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
