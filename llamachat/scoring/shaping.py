"""From combined scores to what PPO is rewarded with: whitening, and the score of answers that were cut.

Shapes: B answers of one iteration (of all processes together: whitening a share of them would be another reward).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llamachat.maths.masked import VARIANCE_FLOOR, masked_mean, masked_variance

Shaping = Literal["whiten_logit", "whiten", "none"]


@dataclass(frozen=True, slots=True)
class Shaped:
    """The rewards of whole answers, and what was subtracted and divided by; a critic's head is folded by the same two."""

    scores_B: Tensor
    mean: float
    deviation: float


def shape_scores(scores_B: Tensor, *, is_finished_B: Tensor, shaping: Shaping, unfinished_score: float) -> Shaped:
    """R~c = whiten(logit(R_c)) (Llama 2, arXiv:2307.09288, section 3.2.3), over the finished answers of the iteration.

    `scores_B` are raw. The paper's R_c is a probability, sigmoid(score), so its logit(R_c) = logit(sigmoid(score)) is the
    raw score itself: `whiten_logit` whitens the scores as they are, `whiten` their sigmoids (the equation without the
    logit), `none` leaves them as they are. Mean and variance are those of the batch (the paper names no population;
    ours), divided by n.

    An unfinished answer gets `unfinished_score`, in shaped units, since a reward model judges whole answers; it takes no
    part in mean and variance. Where all finished answers score the same they get 0, and where none is finished nothing is
    whitened: mean 0, deviation 1.
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
    return Shaped(shaped_B.float(), mean, deviation)
