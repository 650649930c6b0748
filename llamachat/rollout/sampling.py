"""From logits to a token: temperature, top-p, and the draw.

Shapes: B rows, V vocabulary. A row's draw takes one number that belongs to (seed, prompt, sample, position) alone, so
a row says the same in whatever batch it sits.
"""

import numpy as np
import torch
from torch import Tensor


def sampling_logprobs(logits_BV: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """Log-probabilities (nats, fp32) of what the next token is drawn from; -inf for tokens outside top-p.

    Top-p keeps the likeliest tokens up to and including the one that reaches it (Holtzman et al., arXiv:1904.09751).
    At temperature 0 the model's own, since nothing is drawn.
    """
    logprobs_BV = torch.log_softmax(logits_BV.float() / (temperature or 1.0), dim=-1)
    if temperature == 0 or top_p >= 1:
        return logprobs_BV
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    probabilities_BV = sorted_BV.double().exp()
    mass_before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    kept_BV = mass_before_BV < top_p
    kept_BV[:, 0] = True
    nucleus_BV = torch.zeros_like(kept_BV).scatter(1, order_BV, kept_BV)
    return torch.log_softmax(logprobs_BV.masked_fill(~nucleus_BV, float("-inf")), dim=-1)


def draw(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Ids drawn with these log-probabilities by numbers in [0, 1), [B]: the inverse of the distribution function."""
    distribution_BV = logprobs_BV.double().exp().cumsum(dim=-1)
    total_B1 = distribution_BV[:, -1:].contiguous()
    drawn_B1 = torch.searchsorted(distribution_BV, uniforms_B.unsqueeze(1) * total_B1, right=True)
    # Rounding may put the product on the total itself: then the last token that has a probability.
    last_B1 = torch.searchsorted(distribution_BV, total_B1)
    return torch.minimum(drawn_B1, last_B1).squeeze(1)


def row_uniforms(count: int, *, seed: int, prompt: int, sample: int) -> Tensor:
    """The numbers in [0, 1) that a row draws its first `count` tokens by, one a position, [count] float64."""
    return torch.from_numpy(np.random.default_rng((seed, prompt, sample)).random(count))
