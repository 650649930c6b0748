"""Log-probabilities in chunks: hand numbers, all logits at once, gradients, and what is kept for the backward pass."""

import math

import pytest
import torch
from torch import Tensor, nn, tensor
from torch.testing import assert_close

from llamachat.maths import logprobs
from llamachat.maths.logprobs import token_logprobs

D, V = 8, 321


def whole_logprobs(hidden_ND: Tensor, ids_N: Tensor, head: nn.Module, temperature: float) -> tuple[Tensor, Tensor]:
    """All logits at once, in fp32: the slow way."""
    all_NV = torch.log_softmax(head(hidden_ND).float() / temperature, dim=-1)
    return all_NV[torch.arange(len(ids_N)), ids_N], -(all_NV.exp() * all_NV).sum(-1)


def problem(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, nn.Linear]:
    torch.manual_seed(count)
    hidden_ND = torch.randn(count, D, dtype=dtype, requires_grad=True)
    return hidden_ND, torch.randint(V, (count,)), nn.Linear(D, V, bias=False, dtype=dtype)


def test_two_tokens_by_hand() -> None:
    # Logits are the hidden state itself: (0, log 3) / temperature 1 is (1/4, 3/4).
    result = token_logprobs(
        tensor([[0.0, math.log(3)]] * 2), tensor([0, 1]), head=lambda hidden: hidden, with_entropy=True
    )
    assert_close(result.logprobs, tensor([0.25, 0.75]).log())
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert result.entropy is not None
    assert_close(result.entropy, tensor([entropy, entropy]))


def test_temperature_by_hand() -> None:
    # (0, log 9) / 2 = (0, log 3): again (1/4, 3/4).
    result = token_logprobs(tensor([[0.0, math.log(9)]]), tensor([1]), head=lambda hidden: hidden, temperature=2.0)
    assert_close(result.logprobs, tensor([0.75]).log())
    assert result.entropy is None


def test_a_token_that_the_head_rules_out_leaves_the_entropy_finite() -> None:
    result = token_logprobs(tensor([[0.0, 0.0, -math.inf]]), tensor([0]), head=lambda hidden: hidden, with_entropy=True)
    assert result.entropy is not None
    assert_close(result.logprobs, tensor([0.5]).log())
    assert_close(result.entropy, tensor([math.log(2)]))


@pytest.mark.parametrize(
    ("count", "tokens_per_chunk"), [(0, 64), (1, 1), (1, 64), (63, 4096), (64, 64), (65, 64), (200, 64), (200, 100)]
)
@pytest.mark.parametrize("kept", [0, logprobs.KEPT_LOGITS])
def test_chunks_give_the_numbers_and_gradients_of_all_at_once(
    count: int, tokens_per_chunk: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", kept)
    hidden_ND, ids_N, head = problem(count)
    weights_N, more_N = torch.randn(count), torch.randn(count)
    gradients = []
    for whole in (True, False):
        if whole:
            logprobs_N, entropy_N = whole_logprobs(hidden_ND, ids_N, head, 0.7)
        else:
            result = token_logprobs(
                hidden_ND, ids_N, head=head, temperature=0.7, with_entropy=True, tokens_per_chunk=tokens_per_chunk
            )
            logprobs_N, entropy_N = result.logprobs, result.entropy
            assert entropy_N is not None
        (logprobs_N @ weights_N + entropy_N @ more_N).backward()
        assert hidden_ND.grad is not None and head.weight.grad is not None
        gradients.append((logprobs_N.detach(), entropy_N.detach(), hidden_ND.grad, head.weight.grad))
        hidden_ND.grad = head.weight.grad = None
    for expected, got in zip(*gradients, strict=True):
        assert_close(got, expected, rtol=1e-5, atol=2e-6)


def test_without_gradients_the_numbers_are_the_same() -> None:
    hidden_ND, ids_N, head = problem(100)
    with_gradient = token_logprobs(hidden_ND, ids_N, head=head, tokens_per_chunk=64).logprobs
    with torch.no_grad():
        without = token_logprobs(hidden_ND, ids_N, head=head, tokens_per_chunk=64).logprobs
    assert not without.requires_grad
    assert torch.equal(with_gradient, without)


def test_a_model_in_half_precision_is_summed_in_full() -> None:
    hidden_ND, ids_N, head = problem(70, torch.bfloat16)
    result = token_logprobs(hidden_ND, ids_N, head=head, with_entropy=True)
    expected, entropy = whole_logprobs(hidden_ND, ids_N, head, 1.0)
    assert result.entropy is not None
    assert result.logprobs.dtype == result.entropy.dtype == torch.float32
    assert_close(result.logprobs, expected, rtol=1e-5, atol=1e-5)
    assert_close(result.entropy, entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("most", [0, logprobs.KEPT_LOGITS])
def test_large_logits_are_not_kept_and_small_ones_are_not_made_again(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", most)
    hidden_ND, ids_N, head = problem(256)
    kept: list[int] = []
    chunks: list[int] = []

    def watched(hidden_nD: Tensor) -> Tensor:
        if len(hidden_nD):  # without rows it is only asked for the size of the vocabulary
            chunks.append(len(hidden_nD))
        return head(hidden_nD)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        result = token_logprobs(hidden_ND, ids_N, head=watched, with_entropy=True, tokens_per_chunk=64)
    assert chunks == [64] * 4, "at most a chunk exists at once"
    assert (max(kept, default=0) <= 256 * D) == (most == 0), "hidden states, never 64 rows of logits"
    result.logprobs.sum().backward()
    assert chunks == [64] * (8 if most == 0 else 4)


def test_a_frozen_head_lets_the_gradient_through() -> None:
    hidden_ND, ids_N, head = problem(10)
    head.requires_grad_(False)
    token_logprobs(hidden_ND, ids_N, head=head).logprobs.sum().backward()
    assert head.weight.grad is None
    assert hidden_ND.grad is not None and (hidden_ND.grad.abs().sum(dim=1) > 0).all()


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(AssertionError, match="temperature 0"):
        token_logprobs(torch.zeros(1, D), tensor([1]), head=nn.Linear(D, V), temperature=0.0)
