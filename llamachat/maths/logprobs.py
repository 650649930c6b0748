"""Log-probabilities of given tokens, entropies, and KL estimates from them; imports only torch.

Shapes: B sequences, R response positions, N tokens, D hidden, V vocabulary. The head runs on one chunk of tokens at a
time, which is recomputed in the backward pass, so [N, V] is never in memory; on a CPU, up to KEPT_LOGITS logits are
kept instead.
All sums are in fp32, whatever the model's dtype.
KL(policy || reference) is estimated from tokens sampled by the policy, in nats, at the sampling temperature. Both
estimators are unbiased there (J. Schulman, "Approximating KL Divergence", 2020); k1 and its sum over a response may be
negative.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamachat import maths

Head = Callable[[Tensor], Tensor]  # hidden states [n, D] -> logits [n, V]: `model.get_output_embeddings()`

# A CPU caches one compiled kernel for each shape: lengths are padded to a multiple.
SHAPE_MULTIPLE = 64
# On a CPU, up to this many logits are kept for the backward pass (64 MiB in fp32, three times as much with entropy).
# Recomputing them would take a third of the time of a small model's head.
KEPT_LOGITS = 2**24


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Each token's log-probability and the entropy of the distribution it was sampled from, in nats, fp32."""

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(
    hidden_ND: Tensor,
    token_ids_N: Tensor,
    *,
    head: Head,
    temperature: float = 1.0,
    with_entropy: bool = False,
    tokens_per_chunk: int | None = None,
) -> TokenLogprobs:
    """log softmax(head(hidden) / temperature) at the given ids, [N].

    Gradients flow to the hidden states and the head through both results. `temperature` must be the sampling
    temperature; with another one PPO's ratio would not start at 1.
    """
    assert temperature > 0, "at temperature 0 nothing is drawn, and no token has a probability"
    on_cpu = hidden_ND.device.type == "cpu"
    if tokens_per_chunk is None:
        tokens_per_chunk = maths.tokens_per_chunk(on_cpu=on_cpu)
    assert tokens_per_chunk > 0 and hidden_ND.shape[:1] == token_ids_N.shape
    count = len(token_ids_N)
    missing = -count % SHAPE_MULTIPLE
    hidden_ND = nn.functional.pad(hidden_ND, (0, 0, 0, missing))
    token_ids_N = nn.functional.pad(token_ids_N, (0, missing))

    def chunk(hidden_nD: Tensor, token_ids_n: Tensor) -> tuple[Tensor, ...]:
        logits_nV = head(hidden_nD).float()
        if temperature != 1:
            logits_nV = logits_nV / temperature
        if not with_entropy:
            return (-nn.functional.cross_entropy(logits_nV, token_ids_n, reduction="none"),)
        normalizer_n = logits_nV.logsumexp(dim=-1)
        logprobs_n = logits_nV.gather(1, token_ids_n.unsqueeze(1)).squeeze(1) - normalizer_n
        probabilities_nV = (logits_nV - normalizer_n.unsqueeze(1)).exp()
        # A token with logit -inf does not contribute: 0 * log 0 is 0.
        expected_logit_n = (probabilities_nV * logits_nV.clamp(min=torch.finfo(torch.float32).min)).sum(dim=-1)
        return logprobs_n, normalizer_n - expected_logit_n

    is_kept = not torch.is_grad_enabled() or (on_cpu and count * _vocabulary(head, hidden_ND) <= KEPT_LOGITS)
    parts = []
    for hidden_nD, token_ids_n in zip(
        hidden_ND.split(tokens_per_chunk), token_ids_N.split(tokens_per_chunk), strict=True
    ):
        if is_kept:
            parts.append(chunk(hidden_nD, token_ids_n))
        else:
            parts.append(checkpoint(chunk, hidden_nD, token_ids_n, use_reentrant=False))
    columns = [torch.cat(column)[:count] for column in zip(*parts, strict=True)]
    return TokenLogprobs(columns[0], columns[1] if with_entropy else None)


def _vocabulary(head: Head, hidden_ND: Tensor) -> int:
    with torch.no_grad():
        return head(hidden_ND[:0]).shape[-1]


def k1(policy_logprobs_BR: Tensor, reference_logprobs_BR: Tensor, *, response_mask_BR: Tensor) -> Tensor:
    """log policy - log reference at each response token, [B, R]; 0 elsewhere. PPO's penalty is based on it."""
    return _log_ratio(policy_logprobs_BR, reference_logprobs_BR, response_mask_BR)


def k3(policy_logprobs_BR: Tensor, reference_logprobs_BR: Tensor, *, response_mask_BR: Tensor) -> Tensor:
    """q - 1 - log q with q = reference / policy at each response token, [B, R]; else 0. Never negative, less noisy."""
    log_q_BR = -_log_ratio(policy_logprobs_BR, reference_logprobs_BR, response_mask_BR)
    return log_q_BR.expm1() - log_q_BR


def response_kl(kl_BR: Tensor, *, response_mask_BR: Tensor) -> Tensor:
    """KL of each response, [B], in nats per response: the sum over its tokens (Llama 2, Eq. 4)."""
    assert response_mask_BR.dtype == torch.bool and response_mask_BR.shape == kl_BR.shape
    return torch.where(response_mask_BR, kl_BR, 0.0).sum(dim=1)


def _log_ratio(policy_logprobs_BR: Tensor, reference_logprobs_BR: Tensor, response_mask_BR: Tensor) -> Tensor:
    assert policy_logprobs_BR.shape == reference_logprobs_BR.shape == response_mask_BR.shape
    assert response_mask_BR.dtype == torch.bool
    # Mask before the exponential: masked afterwards, the gradient in the padding could still be NaN.
    return torch.where(response_mask_BR, policy_logprobs_BR.float() - reference_logprobs_BR.float(), 0.0)
