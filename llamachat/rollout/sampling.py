"""Sample a token from logits: temperature, then top-k, then top-p.

Shapes: B rows, V vocabulary. A row's sample uses one random number that depends only on (seed, prompt, sample,
position), so a row gets the same tokens in any batch.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 64  # tokens per block; the first cumulative sum is over blocks


def choose(
    logits_BV: Tensor, uniforms_B: Tensor, *, temperature: float, top_p: float, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """The next id of each row [B] and its log-probability [B] (nats, fp32): a faster `sampling_logprobs` and `draw`.

    Without top-p, the distribution function is computed over blocks, then over the tokens of the sampled block only.
    """
    if temperature != 0 and top_p < 1:
        logprobs_BV = sampling_logprobs(logits_BV, temperature=temperature, top_p=top_p, top_k=top_k)
        ids_B = draw(logprobs_BV, uniforms_B)
        return ids_B, logprobs_BV.gather(1, ids_B.unsqueeze(1)).squeeze(1)
    logits_BV = logits_BV.float()
    if temperature not in (0, 1):
        logits_BV = logits_BV / temperature
    if temperature != 0 and top_k is not None:
        logits_BV = _likeliest(logits_BV, top_k)
    probabilities_BV = torch.softmax(logits_BV, dim=-1)
    ids_B = logits_BV.argmax(dim=-1) if temperature == 0 else _draw_by_blocks(probabilities_BV, uniforms_B)
    return ids_B, probabilities_BV.gather(1, ids_B.unsqueeze(1)).squeeze(1).log()


def _draw_by_blocks(probabilities_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    lacking = -probabilities_BV.shape[1] % BLOCK
    padded_BV = functional.pad(probabilities_BV, (0, lacking)) if lacking else probabilities_BV
    blocks_BNM = padded_BV.view(len(padded_BV), -1, BLOCK)
    sums_BN = blocks_BNM.sum(dim=-1).double()
    ends_BN = sums_BN.cumsum(dim=-1)
    target_B1 = uniforms_B.unsqueeze(1) * ends_BN[:, -1:]
    block_B1 = _first_above(ends_BN, target_B1)
    before_B1 = ends_BN.gather(1, block_B1) - sums_BN.gather(1, block_B1)
    inside_BM = blocks_BNM.gather(1, block_B1.unsqueeze(2).expand(-1, 1, BLOCK)).squeeze(1)
    ends_BM = inside_BM.double().cumsum(dim=-1)
    return (block_B1 * BLOCK + _first_above(ends_BM, target_B1 - before_B1)).squeeze(1)


def _first_above(ends_BN: Tensor, target_B1: Tensor) -> Tensor:
    """Index of the first end above the target; if rounding leaves none, the last index with positive probability."""
    last_B1 = torch.searchsorted(ends_BN, ends_BN[:, -1:].contiguous())
    return torch.minimum(torch.searchsorted(ends_BN, target_B1, right=True), last_B1)


def sampling_logprobs(logits_BV: Tensor, *, temperature: float, top_p: float, top_k: int | None = None) -> Tensor:
    """Log-probabilities (nats, fp32) of the sampling distribution; -inf for tokens outside top-k and top-p.

    Top-k keeps k tokens (Fan et al., arXiv:1805.04833). Of these, top-p keeps the most likely, up to and including the
    one that reaches it (Holtzman et al., arXiv:1904.09751). At temperature 0 (greedy) they are the model's own.
    """
    scaled_BV = logits_BV.float() / (temperature or 1.0)
    if temperature != 0 and top_k is not None:
        scaled_BV = _likeliest(scaled_BV, top_k)
    logprobs_BV = torch.log_softmax(scaled_BV, dim=-1)
    if temperature == 0 or top_p >= 1:
        return logprobs_BV
    sorted_BV, order_BV = logprobs_BV.sort(dim=-1, descending=True, stable=True)
    probabilities_BV = sorted_BV.double().exp()
    mass_before_BV = probabilities_BV.cumsum(dim=-1) - probabilities_BV
    kept_BV = mass_before_BV < top_p
    kept_BV[:, 0] = True
    nucleus_BV = torch.zeros_like(kept_BV).scatter(1, order_BV, kept_BV)
    return torch.log_softmax(logprobs_BV.masked_fill(~nucleus_BV, float("-inf")), dim=-1)


def _likeliest(logits_BV: Tensor, count: int) -> Tensor:
    """The logits of the `count` most likely tokens, -inf for others; ties go to lower ids."""
    if count >= logits_BV.shape[1]:
        return logits_BV
    last_B1 = logits_BV.topk(count, dim=-1).values[:, -1:]
    is_above_BV, is_tied_BV = logits_BV > last_B1, logits_BV == last_B1
    room_B1 = count - is_above_BV.sum(dim=-1, keepdim=True)
    kept_BV = is_above_BV | (is_tied_BV & (is_tied_BV.cumsum(dim=-1) <= room_B1))
    return logits_BV.masked_fill(~kept_BV, float("-inf"))


def draw(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """Sample ids [B] from these log-probabilities by inverse transform of uniform numbers in [0, 1)."""
    ends_BV = logprobs_BV.double().exp().cumsum(dim=-1)
    return _first_above(ends_BV, uniforms_B.unsqueeze(1) * ends_BV[:, -1:]).squeeze(1)


def row_uniforms(count: int, *, seed: int, prompt: int, sample: int) -> Tensor:
    """The uniform numbers in [0, 1) for a row's first `count` tokens, [count] float64."""
    return torch.from_numpy(np.random.default_rng((seed, prompt, sample)).random(count))
