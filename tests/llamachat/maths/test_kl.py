"""KL estimates: hand numbers, the true KL of a small vocabulary, and padding."""

import math

import torch
from torch import tensor
from torch.testing import assert_close

from llamachat.maths.logprobs import k1, k3, response_kl

NOTHING = float("nan")
# Policy and reference give the sampled tokens these probabilities; the second response has one token.
POLICY_BR = tensor([[0.5, 0.8], [0.25, NOTHING]]).log()
REFERENCE_BR = tensor([[0.25, 0.8], [0.5, -math.inf]]).log()
MASK_BR = tensor([[True, True], [True, False]])


def test_k1_by_hand() -> None:
    # log(0.5 / 0.25) = log 2;  log 1 = 0;  log(0.25 / 0.5) = -log 2
    kl_BR = k1(POLICY_BR, REFERENCE_BR, response_mask_BR=MASK_BR)
    assert_close(kl_BR, tensor([[math.log(2), 0.0], [-math.log(2), 0.0]]))
    assert_close(response_kl(kl_BR, response_mask_BR=MASK_BR), tensor([math.log(2), -math.log(2)]))


def test_k3_by_hand() -> None:
    # q = reference / policy:  1/2 - 1 + log 2;  0;  2 - 1 - log 2
    kl_BR = k3(POLICY_BR, REFERENCE_BR, response_mask_BR=MASK_BR)
    assert_close(kl_BR, tensor([[math.log(2) - 0.5, 0.0], [1 - math.log(2), 0.0]]))


def test_the_expected_estimate_is_the_true_divergence() -> None:
    """Every token of the vocabulary, weighted by its probability under the policy: no sampling, no noise."""
    torch.manual_seed(0)
    policy_V, reference_V = (torch.randn(50, dtype=torch.float32).log_softmax(0) for _ in range(2))
    true_kl = float((policy_V.double().exp() * (policy_V.double() - reference_V.double())).sum())
    everything_1V = torch.ones(1, 50, dtype=torch.bool)
    for estimate in (k1, k3):
        values_1V = estimate(policy_V[None], reference_V[None], response_mask_BR=everything_1V)
        assert_close(float((policy_V.exp() * values_1V).sum()), true_kl, rtol=1e-5, atol=1e-6)
    assert (k3(policy_V[None], reference_V[None], response_mask_BR=everything_1V) >= 0).all()


def test_padding_that_is_no_number_has_a_gradient_of_zero() -> None:
    for estimate in (k1, k3):
        policy_BR = POLICY_BR.clone().requires_grad_()
        estimate(policy_BR, REFERENCE_BR, response_mask_BR=MASK_BR).sum().backward()
        assert policy_BR.grad is not None
        assert policy_BR.grad.isfinite().all()
        assert policy_BR.grad[1, 1] == 0
