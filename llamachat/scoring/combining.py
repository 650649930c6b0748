"""Combine the scores of two reward models into one (the paper's gate, one model, a weighted sum, a user function),
rank K answers by it, and shape it into PPO's reward.

Shapes: B answers, of one iteration over all processes; N prompts with K adjacent answers each. All scores are raw:
sigmoid and logit cancel, so no score is ever passed through both.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from llamachat.config.sections import Scoring, function_name
from llamachat.maths.masked import VARIANCE_FLOOR, masked_mean, masked_variance
from llamachat.scoring.scores import Answers, Combined, Scores
from llamachat.scoring.user_function import load_user_function

Shaping = Literal["whiten_logit", "whiten", "none"]
Combine = Callable[[Scores, Answers], Combined]  # combines two scores into one


def combiner(scoring: Scoring) -> Combine:
    """The function that `scoring.combine` names. `models.check_scoring` has checked that its models exist."""
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

    The paper compares a probability, the sigmoid of the raw score; the returned score is raw.
    """
    safety_B, helpfulness_B = scores.safety_B, scores.helpfulness_B
    assert safety_B is not None and helpfulness_B is not None, "the gate chooses between two models"
    is_unsafe_B = safety_B.double().sigmoid() < safety_threshold
    is_gated_B = is_safety_prompt_B.to(is_unsafe_B.device) | is_unsafe_B
    scores_B = torch.where(is_gated_B, safety_B, helpfulness_B)
    return Combined(scores_B=scores_B, is_gated_B=is_gated_B, is_unsafe_B=is_unsafe_B, has_gate=True)


def single(scores: Scores) -> Combined:
    """The helpfulness model's score, or the safety model's if it is the only one."""
    scores_B = scores.safety_B if scores.helpfulness_B is None else scores.helpfulness_B
    assert scores_B is not None, "there is a model"
    return _ungated(scores_B)


def weighted(scores: Scores, *, weights: Mapping[str, float]) -> Combined:
    """The weighted sum of the raw scores; a model with weight 0 may be missing."""
    scores_by_model = scores.by_model()
    parts = [weight * scores_by_model[name] for name, weight in weights.items() if weight != 0]
    return _ungated(torch.stack(parts).sum(dim=0))


def ranking(combined: Combined, *, samples_per_prompt: int) -> Tensor:
    """Indices of each prompt's samples, best first, [N, K]; ties keep their order.

    Differs from the paper (rejection sampling, Llama 2 section 3.2.3): it does not state how the gate ranks samples of
    one prompt. The models' scales differ, so by gated score alone an unsafe answer (scored by the safety model) could
    beat a safe one (scored by the helpfulness model). So answers below the threshold rank last. Within each of the
    two groups the combined score decides; for one prompt it comes from one model.
    """
    assert len(combined.scores_B) % samples_per_prompt == 0, "K samples of every prompt"
    scores_NK = combined.scores_B.view(-1, samples_per_prompt)
    is_unsafe_NK = combined.is_unsafe_B.view(-1, samples_per_prompt)
    # Two stable sorts, the primary key last.
    by_score_NK = scores_NK.sort(dim=1, descending=True, stable=True).indices
    by_group_NK = is_unsafe_NK.gather(1, by_score_NK).int().sort(dim=1, stable=True).indices
    return by_score_NK.gather(1, by_group_NK)


def shape_scores(scores_B: Tensor, *, is_finished_B: Tensor, shaping: Shaping, unfinished_score: float) -> Tensor:
    """R~c = whiten(logit(R_c)) (Llama 2, arXiv:2307.09288, section 3.2.3), over the finished answers of the iteration.

    `scores_B` are raw. The paper's R_c is a probability, sigmoid(score), so logit(R_c) = logit(sigmoid(score)) is the
    raw score itself: `whiten_logit` whitens the raw scores, `whiten` their sigmoids (the equation without the logit),
    `none` leaves them unchanged. Mean and variance (divided by n) are the batch's (the paper states no population;
    ours).

    An unfinished answer gets `unfinished_score`, in shaped units, since a reward model judges whole answers; it is
    excluded from mean and variance. If all finished answers have equal scores, these become 0; if none is finished,
    nothing is whitened: mean 0, deviation 1.
    """
    assert is_finished_B.dtype == torch.bool and is_finished_B.shape == scores_B.shape
    values_B = scores_B.double()
    values_B = values_B.sigmoid() if shaping == "whiten" else values_B
    if shaping == "none" or not bool(is_finished_B.any()):
        mean, deviation = 0.0, 1.0
    else:
        mean = float(masked_mean(values_B, is_finished_B))
        deviation = float((masked_variance(values_B, is_finished_B) + VARIANCE_FLOOR).sqrt())
    shaped_B = torch.where(is_finished_B, (values_B - mean) / deviation, unfinished_score)
    return shaped_B.float()


def _ungated(scores_B: Tensor) -> Combined:
    none_B = torch.zeros_like(scores_B, dtype=torch.bool)
    return Combined(scores_B=scores_B, is_gated_B=none_B, is_unsafe_B=none_B, has_gate=False)
