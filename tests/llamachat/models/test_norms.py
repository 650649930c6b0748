"""The norm with a manual backward pass: transformers' result bit for bit, and the gradient of its formula in fp64."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llamachat.models.loading import load_base
from llamachat.models.norms import FastRMSNorm, use_fast_norms
from tests.tiny_llama import base_section, tiny_llama

ROWS, POSITIONS, D = 2, 70, 48
EPSILON = 1e-5


def norms(dtype: torch.dtype) -> tuple[LlamaRMSNorm, LlamaRMSNorm]:
    """transformers' norm, and the same switched to ours."""
    torch.manual_seed(0)
    weight_D = torch.rand(D) + 0.5
    theirs, ours = (LlamaRMSNorm(D, EPSILON) for _ in range(2))
    for norm in (theirs, ours):
        norm.weight.data = weight_D.to(dtype)
    use_fast_norms(torch.nn.Sequential(ours))
    return theirs, ours


def exact_gradients(input_BTD: Tensor, weight_D: Tensor, of_result_BTD: Tensor) -> tuple[Tensor, ...]:
    """Autograd through the formula in fp64."""
    wide_BTD, wide_D = input_BTD.detach().double().requires_grad_(), weight_D.detach().double().requires_grad_()
    result_BTD = wide_D * wide_BTD * torch.rsqrt(wide_BTD.pow(2).mean(-1, keepdim=True) + EPSILON)
    return torch.autograd.grad(result_BTD, (wide_BTD, wide_D), of_result_BTD.double())


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_result_is_that_of_transformers_and_the_gradient_that_of_the_formula(dtype: Any, off: float) -> None:
    theirs, ours = norms(dtype)
    assert type(ours) is FastRMSNorm and ours.state_dict().keys() == theirs.state_dict().keys()
    input_BTD = (3 * torch.randn(ROWS, POSITIONS, D)).to(dtype).requires_grad_()
    before = input_BTD.detach().clone()
    result_BTD, of_result_BTD = ours(input_BTD), torch.randn(ROWS, POSITIONS, D).to(dtype)
    assert torch.equal(result_BTD, theirs(input_BTD)) and result_BTD.dtype == dtype
    got = torch.autograd.grad(result_BTD, (input_BTD, ours.weight), of_result_BTD)
    for mine, exact in zip(got, exact_gradients(input_BTD, ours.weight, of_result_BTD), strict=True):
        assert mine.dtype == dtype
        assert float((mine - exact).norm() / exact.norm()) < off
    assert torch.equal(input_BTD, before)


def test_a_frozen_weight_lets_the_gradient_through_and_a_frozen_input_none() -> None:
    theirs, ours = norms(torch.float32)
    input_BTD = torch.randn(ROWS, POSITIONS, D, requires_grad=True)
    input_grad_BTD, weight_grad_D = torch.autograd.grad(theirs(input_BTD).sum(), (input_BTD, theirs.weight))
    ours.weight.requires_grad_(False)
    ours(input_BTD).sum().backward()
    assert ours.weight.grad is None
    torch.testing.assert_close(input_BTD.grad, input_grad_BTD)
    ours.weight.requires_grad_(True)
    ours(input_BTD.detach()).sum().backward()
    torch.testing.assert_close(ours.weight.grad, weight_grad_D)


def test_every_norm_of_a_base_that_is_loaded_on_a_cpu_is_ours(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    model = load_base(base_section(tmp_path))
    kinds = [type(module) for module in model.modules() if "RMSNorm" in type(module).__name__]
    assert kinds == [FastRMSNorm] * (2 * model.config.num_hidden_layers + 1)
