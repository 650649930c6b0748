"""Length terms of an answer's shaped score: a ramp before the length limit and a soft bound on drift. Ours.

Shapes: B answers, of one iteration over all processes. Lengths are in tokens, EOS included.
"""

import math

import torch
from torch import Tensor

from llamachat.config.sections import LengthBound


def ramp_to_limit(shaped_B: Tensor, *, lengths_B: Tensor, limit: int, ramp: float, unfinished_score: float) -> Tensor:
    """Lower the shaped scores towards `unfinished_score` over the last `ramp` (a share) of the tokens before the limit.

    shaped + w * min(0, unfinished_score - shaped), where w rises from 0 at (1 - ramp) * limit tokens to 1 at limit + 1,
    the minimum length of a truncated answer had it been finished: a finished answer is never worth less for its length
    than the same answer truncated. Scores below `unfinished_score` stay, as do truncated answers, which have it.
    """
    first = (1.0 - ramp) * limit
    weight_B = ((lengths_B - first) / (limit + 1 - first)).clamp(0.0, 1.0)
    return shaped_B + weight_B * (unfinished_score - shaped_B).clamp(max=0.0)


def hold_length(
    shaped_B: Tensor, *, lengths_B: Tensor, is_finished_B: Tensor, bound: LengthBound, start: float
) -> Tensor:
    """Add a term that pulls the mean length back within bounds, which are relative to `start`, that of iteration 0.

    shaped - coef * excess * d, where excess is log(mean / longest) above the upper bound, -log(shortest / mean) below
    the lower one (both as ratios to `start`) and 0 between them, and d is length / mean - 1, at most 1. The term may
    lower a truncated answer's score but never raises it, so truncation is never better than ending.
    """
    mean = float(lengths_B.double().mean())
    ratio = mean / start
    excess = math.log(ratio / min(max(ratio, bound.shortest), bound.longest))
    loss_B = bound.coef * excess * (lengths_B / mean - 1.0).clamp(max=1.0)
    return shaped_B - torch.where(is_finished_B, loss_B, loss_B.clamp(min=0.0))
