"""Scores of different policies on one scale: constants taken once, from the SFT policy's answers, and then frozen.

Shapes: B answers. Whitening over a policy's own answers would hide that it got better: every policy would have mean 0.
Mean 0 here is the SFT policy, and 1 is one deviation of its answers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
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

    def to_plain(self) -> dict[str, Any]:
        """As JSON values, for a summary or a manifest."""
        return asdict(self)

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> "Constants":
        """The constants that `to_plain` wrote down."""
        helpfulness, safety, combined = (
            None if values[name] is None else Scale(**values[name]) for name in ("helpfulness", "safety", "combined")
        )
        assert combined is not None
        return Constants(helpfulness=helpfulness, safety=safety, combined=combined)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standardised:
    """Scores in deviations of the SFT policy's answers, above its mean."""

    helpfulness_B: Tensor | None
    safety_B: Tensor | None
    combined_B: Tensor


def fit_constants(scores: Scores, combined: Combined) -> Constants:
    """Mean and deviation (divided by n) of the SFT policy's scores; ScoringError where they do not differ."""
    scales = {name: _scale(scores_B, f"the {name} model") for name, scores_B in scores.by_model().items()}
    return Constants(
        helpfulness=scales.get("helpfulness"),
        safety=scales.get("safety"),
        combined=_scale(combined.scores_B, "the combination of the models"),
    )


def standardise(scores: Scores, combined: Combined, constants: Constants) -> Standardised:
    """The scores on the scale of the SFT policy's.

    An answer that the gate gave to the safety model is measured on that model's scale, and, where there is a gate, any
    other on the helpfulness model's: the gate itself is decided on raw scores.
    """
    by_model = {
        name: scale.apply(scores_B)
        for name, scores_B in scores.by_model().items()
        if (scale := constants.helpfulness if name == "helpfulness" else constants.safety) is not None
    }
    return Standardised(
        helpfulness_B=by_model.get("helpfulness"),
        safety_B=by_model.get("safety"),
        combined_B=torch.where(combined.is_gated_B, by_model["safety"], by_model["helpfulness"])
        if combined.has_gate
        else constants.combined.apply(combined.scores_B),
    )


def _scale(scores_B: Tensor, source: str) -> Scale:
    values_B = scores_B.double()
    deviation = float(values_B.std(correction=0)) if len(values_B) else 0.0
    if deviation <= 1e-6:
        raise ScoringError(
            f"{source} gave {len(values_B)} answers of the SFT policy scores with deviation {deviation:.1e}. Other"
            " policies are measured in deviations of these scores, so they must differ. Evaluate on more prompts, or train"
            " the reward model: one that scores all answers alike has learnt nothing."
        )
    return Scale(float(values_B.mean()), deviation)
