"""Kernels that exist for CUDA alone: bitsandbytes', TRL's, torch's attention over packed sequences.

Each is an operation `standin::name` with a kernel for the CPU and one for shapes, so that it is counted, recorded in
graphs and left out in shape mode as torch's own operations are.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import bitsandbytes
import torch
from torch import Tensor
from torch.nn.functional import linear

from tests.cuda_standin.torch_cuda import PROPERTIES

if TYPE_CHECKING:
    from tests.cuda_standin.device import Device

FUSED_ROWS = 1536  # bitsandbytes unpacks 4-bit weights for more rows, on any card
TAKEN_OVER = ("quantize_4bit", "dequantize_4bit", "dequantize_4bit.out", "quantize_blockwise", "dequantize_blockwise")
TAKEN_OVER += ("dequantize_blockwise.out",)
GEMM_4BIT = (
    "(Tensor A, Tensor B, int[] shapeB, Tensor absmax, int blocksize, str quant_type, Tensor? bias=None, "
    "Tensor? absmax_8bit=None, Tensor? absmax_code=None, Tensor? absmax_offset=None) -> Tensor"
)
ATTENTION = "(Tensor query, Tensor key, Tensor value, Tensor starts, float? scale) -> (Tensor, Tensor)"
ATTENTION_BACKWARD = (
    "(Tensor gradient, Tensor query, Tensor key, Tensor value, Tensor starts, float? scale) -> (Tensor, Tensor, Tensor)"
)

_library = torch.library.Library("standin", "DEF")
_aten = torch.library.Library("aten", "IMPL")
_kernel: Any = torch.library.register_kernel  # its types do not know that it is a decorator


def register(device: Device) -> None:
    """Give torch, bitsandbytes and TRL their kernels for the device."""
    _addmm_to_fp32()
    _rms_norm()
    _bitsandbytes(device)
    _sequence_attention()
    _trl(device)


def _define(name: str, schema: str, *, cpu: Callable[..., Any], shapes: Callable[..., Any]) -> Any:
    """The operation `standin::name`."""
    _library.define(name + schema)
    _library.impl(name, cpu, "CPU")
    _library.impl(name, shapes, "Meta")
    return getattr(torch.ops.standin, name)


def _addmm_to_fp32() -> None:
    """`torch.addmm` of 16-bit matrices with a result of 32 bits."""

    def cpu(out: Tensor, left: Tensor, right: Tensor) -> None:
        out.addmm_(left.float(), right.float())

    add = _define("addmm_fp32", "(Tensor(a!) out, Tensor left, Tensor right) -> ()", cpu=cpu, shapes=lambda *_: None)

    def addmm(
        self: Tensor, left: Tensor, right: Tensor, dtype: torch.dtype, *, beta: float = 1, alpha: float = 1, out: Tensor
    ) -> Tensor:
        assert dtype == torch.float32 and self is out and beta == alpha == 1
        add(out, left, right)
        return out

    _aten.impl("addmm.dtype_out", addmm, "CUDA")


def _bitsandbytes(device: Device) -> None:
    """4-bit weights. The product unpacks them first where there are many rows, as on a card."""
    operations = torch.ops.bitsandbytes
    for name in TAKEN_OVER:
        device.take_over(f"bitsandbytes::{name}")

    def shapes(rows: Tensor, weight: Tensor, shape: Sequence[int], *_: Any) -> Tensor:
        return rows.new_empty((*rows.shape[:-1], shape[0]))

    is_fused = _choice_of_bitsandbytes()
    fused = _define("gemm_4bit", GEMM_4BIT, cpu=operations.gemm_4bit.default, shapes=shapes)

    @_kernel("bitsandbytes::gemm_4bit", "cuda")
    def _(
        A: Tensor,
        B: Tensor,
        shapeB: Sequence[int],
        absmax: Tensor,
        blocksize: int,
        quant_type: str,
        bias: Tensor | None = None,
        absmax_8bit: Tensor | None = None,
        absmax_code: Tensor | None = None,
        absmax_offset: Tensor | None = None,
    ) -> Tensor:
        count = A.numel() // A.shape[-1]
        if count <= FUSED_ROWS and shapeB[1] % blocksize == 0 and is_fused(0, A.dtype, count, *shapeB):
            scales = (absmax_8bit, absmax_code, absmax_offset)
            return fused(A, B, shapeB, absmax, blocksize, quant_type, bias, *scales)
        if absmax_8bit is not None:
            assert absmax_offset is not None
            absmax = operations.dequantize_blockwise(absmax_8bit, absmax, absmax_code, 256, torch.float32)
            absmax = absmax.add_(absmax_offset)
        return linear(A, operations.dequantize_4bit(B, absmax, blocksize, quant_type, shapeB, A.dtype), bias)


def _choice_of_bitsandbytes() -> Callable[..., bool]:
    """Whether bitsandbytes multiplies packed weights for (device, dtype, rows, outputs, inputs), or unpacks them first.

    Its own function, which lies in a module that needs its CUDA library.
    """
    path = Path(bitsandbytes.__file__).parent / "backends" / "cuda" / "ops.py"
    name = "_gemm_4bit_use_custom_cuda"
    (function,) = (node for node in ast.parse(path.read_text()).body if getattr(node, "name", None) == name)
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    properties = ("multi_processor_count", "major", "minor")
    names: dict[str, Any] = {
        "torch": torch,
        "_GEMM_4BIT_CUSTOM_FLOOR_M": 4,
        "_gpu_dispatch_props": lambda index: tuple(PROPERTIES[name] for name in properties),
    }
    exec(compile(ast.Module([function], []), str(path), "exec"), names)
    return names[name]


def _rms_norm() -> None:
    """`torch.nn.functional.rms_norm`, which is one kernel on a card."""

    def cpu(x: Tensor, shape: Sequence[int], weight: Tensor | None, epsilon: float | None) -> Tensor:
        return torch.nn.functional.rms_norm(x, tuple(shape), weight, epsilon)

    def shapes(x: Tensor, *_: Any) -> Tensor:
        return torch.empty_like(x)

    schema = "(Tensor x, int[] shape, Tensor? weight, float? epsilon) -> Tensor"
    normalize = _define("rms_norm", schema, cpu=cpu, shapes=shapes)

    def fused(x: Tensor, shape: Sequence[int], weight: Tensor | None, epsilon: float | None) -> tuple[Tensor, Tensor]:
        scales = x.new_empty((*x.shape[: x.dim() - len(shape)], *(1 for _ in shape)), dtype=torch.float32)
        return normalize(x, shape, weight, epsilon), scales

    _aten.impl("_fused_rms_norm", fused, "CUDA")


def _sequence_attention() -> None:
    """`torch.nn.attention.varlen`: causal attention of each sequence of a row by itself."""
    try:
        import torch.nn.attention.varlen  # its operations exist once it is imported
    except ImportError:
        return

    def forward_shapes(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return torch.empty_like(query), query.new_empty(query.shape[1::-1], dtype=torch.float32)

    def backward_shapes(gradient: Tensor, *parts: Any) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(part) for part in parts[:3])

    forward_on = _define("sequence_attention", ATTENTION, cpu=_attend, shapes=forward_shapes)
    backward_on = _define(
        "sequence_attention_backward", ATTENTION_BACKWARD, cpu=_attend_backward, shapes=backward_shapes
    )

    @_kernel("torch_attn::_varlen_attn", "cuda")
    def _(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        is_causal: bool = False,
        scale: float | None = None,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert is_causal and query.dtype in (torch.bfloat16, torch.float16)
        out, log_sums = forward_on(query, key, value, cu_seq_q, scale)
        return out, log_sums, torch.zeros(2, dtype=torch.uint64, device=query.device)

    @_kernel("torch_attn::_varlen_attn_backward", "cuda")
    def _(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        is_causal: bool,
        rng_state: Tensor,
        scale: float | None = None,
        *_: Any,
        **__: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backward_on(grad_out, query, key, value, cu_seq_q, scale)


def _weights_of(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The attention weights of one sequence [heads, positions, positions]."""
    products = query @ key.transpose(1, 2) * scale
    return products.masked_fill(torch.ones_like(products, dtype=torch.bool).triu(1), float("-inf")).softmax(2)


def _sequences(tensors: Sequence[Tensor], starts: Tensor, heads: int) -> Iterator[list[Tensor]]:
    """The tensors' parts of each sequence, [heads, positions, size] in fp32; heads that share keys have copies."""
    for start, end in pairwise(starts.tolist()):
        yield [
            tensor[start:end].transpose(0, 1).float().repeat_interleave(heads // tensor.shape[1], 0)
            for tensor in tensors
        ]


def _attend(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None) -> tuple[Tensor, ...]:
    factor = query.shape[2] ** -0.5 if scale is None else scale
    parts = [
        (_weights_of(q, k, factor) @ v).transpose(0, 1)
        for q, k, v in _sequences((query, key, value), starts, query.shape[1])
    ]
    return torch.cat(parts).to(query.dtype), query.new_zeros(query.shape[1::-1], dtype=torch.float32)


def _attend_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float | None
) -> tuple[Tensor, ...]:
    factor = query.shape[2] ** -0.5 if scale is None else scale
    gradients: list[tuple[Tensor, ...]] = []
    for out, q, k, v in _sequences((gradient, query, key, value), starts, query.shape[1]):
        weights = _weights_of(q, k, factor)
        products = out @ v.transpose(1, 2)
        products = weights * (products - (products * weights).sum(2, keepdim=True)) * factor
        gradients.append((products @ k, products.transpose(1, 2) @ q, weights.transpose(1, 2) @ out))
    joined = (torch.cat([part.transpose(0, 1) for part in parts]) for parts in zip(*gradients, strict=True))
    return tuple(
        part.unflatten(1, (tensor.shape[1], -1)).sum(2).to(tensor.dtype)
        for part, tensor in zip(joined, (query, key, value), strict=True)
    )


def _trl(device: Device) -> None:
    """TRL's loss, whose Triton kernels need a card: the same in torch, or none in shape mode."""
    import trl.kernels.chunked_logprob as kernels
    import trl.trainer.utils as utils

    class Launched:
        def __init__(self, name: str, plain: Callable[..., None]) -> None:
            self.name, self.plain = name, plain

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return self.run

        def run(self, tile: Tensor, *rest: Any, **options: Any) -> None:
            if not device.is_shape_mode:
                self.plain(tile, *rest, **options)
                return
            device.count_kernel(f"trl::{self.name}", moved=2.0 * tile.nbytes)
            if self.name == "forward":  # as of logits that are all 0: the loss is a number
                largest, sums = rest[2], rest[3]
                largest.zero_()
                sums.fill_(32000.0)

    kernels._use_triton = utils._use_triton = lambda place: place.type == "cuda"
    kernels._forward_kernel = Launched("forward", kernels._forward_tile)
    kernels._backward_kernel = Launched("backward", kernels._backward_tile)
    kernels.triton = SimpleNamespace(cdiv=lambda number, size: -(-number // size))
