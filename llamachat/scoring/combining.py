"""From the scores of two reward models to one: the paper's gate, one model alone, a weighted sum, a user's function.

Shapes: B answers. All scores are raw: sigmoid and logit undo one another, so no score is ever put through both.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from llamachat.config.combiners import function_name
from llamachat.config.sections import Scoring
from llamachat.scoring.scores import Answers, Combined, Scores
from llamachat.scoring.user_function import load_user_function


class Combine(Protocol):
    """Makes one score of two."""

    def __call__(self, scores: Scores, answers: Answers) -> Combined: ...


def combiner(scoring: Scoring) -> Combine:
    """What `scoring.combine` names. `requirements.check_scoring` has held that the models it needs are there."""
    name = function_name(scoring.combine)
    if name is not None:
        function = load_user_function(name)
        return lambda scores, answers: _ungated(function.scores(scores, answers))
    if scoring.combine == "llama2_gate":
        threshold = scoring.safety_threshold
        return lambda scores, answers: llama2_gate(
            scores, is_safety_prompt_B=answers.is_safety_prompt_B, safety_threshold=threshold
        )
    if scoring.combine == "weighted":
        weights = {"helpfulness": scoring.weights.helpfulness, "safety": scoring.weights.safety}
        return lambda scores, answers: weighted(scores, weights=weights)
    assert scoring.combine == "single", "the configuration is checked when it is read"
    return lambda scores, answers: single(scores)


def llama2_gate(scores: Scores, *, is_safety_prompt_B: Tensor, safety_threshold: float) -> Combined:
    """R_c = R_s if is_safety(prompt) or R_s < 0.15, else R_h (Llama 2, arXiv:2307.09288, section 3.2.3).

    The paper's R_s in that comparison is a probability, the sigmoid of the raw score; what is returned is raw.
    """
    safety_B, helpfulness_B = scores.safety_B, scores.helpfulness_B
    assert safety_B is not None and helpfulness_B is not None, "the gate chooses between two models"
    is_unsafe_B = safety_B.double().sigmoid() < safety_threshold
    is_gated_B = is_safety_prompt_B.to(is_unsafe_B.device) | is_unsafe_B
    scores_B = torch.where(is_gated_B, safety_B, helpfulness_B)
    return Combined(scores_B=scores_B, is_gated_B=is_gated_B, is_unsafe_B=is_unsafe_B, has_gate=True)


def single(scores: Scores) -> Combined:
    """The helpfulness model's score, or the safety model's where that is the only one."""
    scores_B = scores.safety_B if scores.helpfulness_B is None else scores.helpfulness_B
    assert scores_B is not None, "there is a model"
    return _ungated(scores_B)


def weighted(scores: Scores, *, weights: Mapping[str, float]) -> Combined:
    """The sum of the raw scores, each times its model's weight; a model with weight 0 may be absent."""
    given = scores.by_model()
    parts = [weight * given[name] for name, weight in weights.items() if weight != 0]
    return _ungated(torch.stack(parts).sum(dim=0))


def _ungated(scores_B: Tensor) -> Combined:
    none_B = torch.zeros_like(scores_B, dtype=torch.bool)
    return Combined(scores_B=scores_B, is_gated_B=none_B, is_unsafe_B=none_B, has_gate=False)
