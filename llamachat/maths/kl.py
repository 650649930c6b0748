"""Estimates of KL(policy || reference) from tokens that the policy sampled; imports torch alone.

Shapes: B sequences, R response positions. Log-probabilities are in nats, of the same sampled tokens under both models and
at the temperature they were sampled with. Both estimates are unbiased there (J. Schulman, "Approximating KL
Divergence", 2020). One thing surprises: a k1 may be negative, and so may its sum over a response; that is no fault.
"""

import torch
from torch import Tensor


def k1(policy_logprobs_BR: Tensor, reference_logprobs_BR: Tensor, *, response_mask_BR: Tensor) -> Tensor:
    """log policy - log reference at each response token, [B, R]; 0 elsewhere. PPO's penalty is made of it."""
    return _log_ratio(policy_logprobs_BR, reference_logprobs_BR, response_mask_BR)


def k3(policy_logprobs_BR: Tensor, reference_logprobs_BR: Tensor, *, response_mask_BR: Tensor) -> Tensor:
    """q - 1 - log q with q = reference / policy at each response token, [B, R]; 0 elsewhere. Never negative, less noisy."""
    log_q_BR = -_log_ratio(policy_logprobs_BR, reference_logprobs_BR, response_mask_BR)
    return log_q_BR.expm1() - log_q_BR


def response_kl(kl_BR: Tensor, *, response_mask_BR: Tensor) -> Tensor:
    """KL of each whole response, [B], in nats a response: the sum over its tokens (Llama 2, Eq. 4)."""
    assert response_mask_BR.dtype == torch.bool and response_mask_BR.shape == kl_BR.shape
    return torch.where(response_mask_BR, kl_BR, 0.0).sum(dim=1)


def _log_ratio(policy_logprobs_BR: Tensor, reference_logprobs_BR: Tensor, response_mask_BR: Tensor) -> Tensor:
    assert policy_logprobs_BR.shape == reference_logprobs_BR.shape == response_mask_BR.shape
    assert response_mask_BR.dtype == torch.bool
    # Zeros go in before the exponential: afterwards its gradient in the padding could still be not a number.
    return torch.where(response_mask_BR, policy_logprobs_BR.float() - reference_logprobs_BR.float(), 0.0)
