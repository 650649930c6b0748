"""The decoder's weights: its own copy, with stacked projections and merged adapters. If there is no room for a copy, it
stacks 4-bit projections on a GPU and keeps the adapters as small products; for any other model it calls the model's
modules.

The trunk is never written. A merged weight is W + scaling * B A in fp32, then cast (Hu et al., arXiv:2106.09685,
Eq. 3); a 4-bit base is dequantized first. Frozen weights without adapters that need no stacking (embeddings, the head)
are shared with the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from llamachat.models.nf4 import compute_dtype

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from llamachat.models.loading import LanguageModel

# In fp32, rows are multiplied in groups of this size: the library's order of summation depends on their number, so
# a row's result would depend on its batch. On a CPU this is free.
ROWS_AT_ONCE = 16


class Product(Protocol):
    """A linear map applied to rows."""

    def __call__(self, x_BD: Tensor) -> Tensor: ...

    def added_to(self, residual_BD: Tensor, x_BD: Tensor) -> Tensor:
        """Add the product to the residual."""
        ...


@dataclass(slots=True)
class Dense:
    """A matrix, possibly stacked from several projections of the same input."""

    weight: Tensor
    bias: Tensor | None
    is_shared: bool  # shared with the model and never written

    def __call__(self, x_BD: Tensor) -> Tensor:
        if x_BD.dtype != torch.float32:
            return functional.linear(x_BD, self.weight, self.bias)
        padded_BD = functional.pad(x_BD, (0, 0, 0, -len(x_BD) % ROWS_AT_ONCE))
        parts = padded_BD.view(-1, ROWS_AT_ONCE, x_BD.shape[1])
        product_BD = torch.bmm(parts, self.weight.t().expand(len(parts), -1, -1)).flatten(0, 1)[: len(x_BD)]
        return product_BD if self.bias is None else product_BD + self.bias

    def added_to(self, residual_BD: Tensor, x_BD: Tensor) -> Tensor:
        if self.bias is None and x_BD.dtype != torch.float32:
            return torch.addmm(residual_BD, x_BD, self.weight.t())
        return residual_BD + self(x_BD)


@dataclass(frozen=True, slots=True)
class Through:
    """The model's own modules with their adapters: slower, but without a copy."""

    modules: Sequence[nn.Module]

    def __call__(self, x_BD: Tensor) -> Tensor:
        outputs = [module(x_BD) for module in self.modules]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def added_to(self, residual_BD: Tensor, x_BD: Tensor) -> Tensor:
        return residual_BD + self(x_BD)


@dataclass(slots=True)
class Packed:
    """4-bit matrices of one input, stacked in the model's own memory, with their adapters as two products.

    bitsandbytes multiplies a few rows by packed weights directly, and unpacks the whole stack once for many rows. The
    adapters' first matrices are stacked; their second ones form a block diagonal, multiplied by their scaling.
    """

    codes: Tensor  # packed weights [bytes, 1]
    scales: Tensor  # one per block, fp32, since several matrices have no common offset
    shape: tuple[int, int]
    block: int
    kind: str
    bias: Tensor | None
    down_RD: Tensor | None  # None without adapters
    up_OR: Tensor | None

    def __call__(self, x_BD: Tensor) -> Tensor:
        product_BO = torch.ops.bitsandbytes.gemm_4bit(
            x_BD, self.codes, self.shape, self.scales, self.block, self.kind, bias=self.bias
        )
        if self.down_RD is None or self.up_OR is None:
            return product_BO
        return product_BO.addmm_(functional.linear(x_BD, self.down_RD), self.up_OR.t())

    def added_to(self, residual_BD: Tensor, x_BD: Tensor) -> Tensor:
        return self(x_BD).add_(residual_BD)


@dataclass(frozen=True, slots=True)
class Layer:
    """One block."""

    attention_norm: Tensor
    query_key_value: Product
    attention_out: Product
    mlp_norm: Tensor
    gate_up: Product
    down: Product


class Weights:
    """All weights of the network, as of the last `refresh`."""

    @torch.no_grad()
    def __init__(self, model: "LanguageModel", *, is_merged: bool) -> None:
        trunk = without_wrapper(model)
        self.dtype = compute_dtype(trunk) or trunk.dtype
        self._norms = [norm.to(self.dtype, copy=True) for norm in _norms(trunk)]
        self._products: list[Product] = [
            _stack(modules, self.dtype) if is_merged else _unmerged(modules, self.dtype)
            for modules in _projections(trunk)
        ]
        self.is_4bit = any(isinstance(product, Packed) for product in self._products)
        # The model's own modules may run Python code that a recording would not replay.
        self.can_be_recorded = not any(isinstance(product, Through) for product in self._products)
        embedding, head = _ends(trunk)
        self.embedding = _shared(embedding, self.dtype) or _copied(embedding, self.dtype)
        self.is_tied = head.weight is embedding.weight
        self.head = self.embedding if self.is_tied else _stack([head], self.dtype)
        self.final_norm = self._norms[-1]
        self.layers = [
            Layer(norms[0], products[0], products[1], norms[1], products[2], products[3])
            for norms, products in (
                (self._norms[2 * block :], self._products[4 * block :]) for block in range(len(self._norms) // 2)
            )
        ]

    @torch.no_grad()
    def refresh(self, model: "LanguageModel") -> bool:
        """Copy the model's current weights, in place for captured graphs; return whether any address changed."""
        trunk = without_wrapper(model)
        for own, norm in zip(self._norms, _norms(trunk), strict=True):
            own.copy_(norm)
        moved = [
            isinstance(product, Dense | Packed) and _fill(product, modules)
            for product, modules in zip(self._products, _projections(trunk), strict=True)
        ]
        embedding, head = _ends(trunk)
        moved.append(_fill(self.embedding, [embedding]))
        if not self.is_tied:
            moved.append(_fill(self.head, [head]))
        return any(moved)


def without_wrapper(model: "LanguageModel") -> "LlamaForCausalLM":
    """The underlying model, with its adapter layers in place."""
    # Checks for a method instead of the class: importing PEFT takes seconds, and a fully tuned model does not need it.
    unwrap = getattr(model, "get_base_model", None)
    return cast("LlamaForCausalLM", model if unwrap is None else unwrap())


def merged_copy_bytes(model: "LanguageModel") -> int:
    """Bytes of a merged copy of the projections."""
    trunk = without_wrapper(model)
    width = (compute_dtype(trunk) or trunk.dtype).itemsize
    projections = (base_layer(module) for modules in _projections(trunk) for module in modules)
    return sum(layer.in_features * layer.out_features * width for layer in projections)


def base_layer(module: nn.Module) -> Any:
    """The projection under an adapter, or the projection itself."""
    unwrap = getattr(module, "get_base_layer", None)
    return module if unwrap is None else unwrap()


def merged_weight(module: nn.Module) -> Tensor:
    """The module's current effective weight; fp32 if an adapter is active."""
    weight, deltas = plain_weight(base_layer(module)), _deltas(module)
    if not deltas:
        return weight
    merged = weight.to(torch.float32, copy=True)
    for down_RD, up_OR, scaling in deltas:
        merged.addmm_(up_OR.float(), down_RD.float(), alpha=scaling)
    return merged


def _deltas(module: nn.Module) -> list[tuple[Tensor, Tensor, float]]:
    """A, B and scaling of the module's active adapters that are not already merged."""
    lora: Any = module
    if not hasattr(lora, "lora_A") or lora.disable_adapters:
        return []
    names = [name for name in lora.active_adapters if name in lora.lora_A and name not in lora.merged_adapters]
    return [(lora.lora_A[name].weight, lora.lora_B[name].weight, lora.scaling[name]) for name in names]


def plain_weight(layer: Any) -> Tensor:
    """The weight of a projection, dequantized if it is in 4 bits."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state)


def _stack(modules: Sequence[nn.Module], dtype: torch.dtype) -> Dense:
    shared = _shared(modules[0], dtype) if len(modules) == 1 else None
    if shared is not None:
        return shared
    layers = [base_layer(module) for module in modules]
    rows, device = sum(layer.out_features for layer in layers), layers[0].weight.device
    has_bias = any(layer.bias is not None for layer in layers)
    dense = Dense(
        weight=torch.empty((rows, layers[0].in_features), dtype=dtype, device=device),
        bias=torch.zeros(rows, dtype=dtype, device=device) if has_bias else None,
        is_shared=False,
    )
    _fill(dense, modules)
    return dense


def _unmerged(modules: Sequence[nn.Module], dtype: torch.dtype) -> Product:
    """Combine packed projections of one input on a GPU into one product; use any others through their modules."""
    layers = [base_layer(module) for module in modules]
    states = [getattr(layer.weight, "quant_state", None) for layer in layers]
    formats = {state and (state.quant_type, state.blocksize) for state in states}
    kind, block = formats.pop() or ("", 1)
    # A block of a stack must belong to one row of one matrix.
    if not kind or formats or layers[0].in_features % block or layers[0].weight.device.type != "cuda":
        return Through(modules)
    codes = _stacked_in_place([layer.weight for layer in layers])
    shape = (sum(layer.out_features for layer in layers), layers[0].in_features)
    bias = None
    if any(layer.bias is not None for layer in layers):
        biases = [codes.new_zeros(layer.out_features) if layer.bias is None else layer.bias for layer in layers]
        bias = torch.cat([part.detach().to(dtype) for part in biases])
    ranks = sum(len(down_RD) for module in modules for down_RD, _, _ in _deltas(module))
    packed = Packed(
        codes=codes,
        scales=torch.cat([_scales(state) for state in states]),
        shape=shape,
        block=block,
        kind=kind,
        bias=bias,
        down_RD=codes.new_zeros((ranks, shape[1]), dtype=dtype) if ranks else None,
        up_OR=codes.new_zeros((shape[0], ranks), dtype=dtype) if ranks else None,
    )
    _fill(packed, modules)
    return packed


def _stacked_in_place(weights: Sequence[Any]) -> Tensor:
    """Stack packed weights into one tensor and make the matrices views of it, so that no copy remains."""
    parts = [weight.data for weight in weights]
    ends = [part.data_ptr() + part.numel() for part in parts]
    sizes = [part.numel() for part in parts]
    storages = {part.untyped_storage().data_ptr() for part in parts}
    if len(storages) == 1 and ends[:-1] == [part.data_ptr() for part in parts[1:]]:  # by an earlier decoder
        return parts[0].as_strided((sum(sizes), 1), (1, 1))
    stack = torch.cat([part.view(-1, 1) for part in parts])
    for weight, part in zip(weights, stack.split(sizes), strict=True):
        weight.data = part
    return stack


def _scales(state: Any) -> Tensor:
    """The constants of a matrix's blocks, in fp32."""
    if not state.nested:
        return state.absmax.float()
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def _shared(module: nn.Module, dtype: torch.dtype) -> Dense | None:
    """The module's own weight, if it is plain and frozen; else None."""
    weight: Any = getattr(module, "weight", None)
    is_plain = type(module) in (nn.Linear, nn.Embedding) and weight.dtype == dtype and not weight.requires_grad
    return Dense(weight.detach(), getattr(module, "bias", None), is_shared=True) if is_plain else None


def _copied(module: nn.Module, dtype: torch.dtype) -> Dense:
    bias = getattr(base_layer(module), "bias", None)
    weight = merged_weight(module).to(dtype, copy=True)
    return Dense(weight, None if bias is None else bias.detach().to(dtype, copy=True), is_shared=False)


def _fill(product: Dense | Packed, modules: Sequence[nn.Module]) -> bool:
    """Copy the modules' current weights; return whether the product now reads other memory."""
    if isinstance(product, Packed):
        return _fill_packed(product, modules)
    if product.is_shared:
        is_other = base_layer(modules[0]).weight.data_ptr() != product.weight.data_ptr()  # a different model's
        if is_other:
            own = _copied(modules[0], product.weight.dtype)
            product.weight, product.bias, product.is_shared = own.weight, own.bias, False
        return is_other
    start = 0
    for module in modules:
        layer, weight = base_layer(module), merged_weight(module)
        rows = slice(start, start + weight.shape[0])
        start = rows.stop
        product.weight[rows].copy_(weight)
        del weight  # large in fp32: free it before the next one is computed
        bias = getattr(layer, "bias", None)
        if product.bias is not None and bias is not None:
            product.bias[rows].copy_(bias)
    return False


def _fill_packed(packed: Packed, modules: Sequence[nn.Module]) -> bool:
    layers = [base_layer(module) for module in modules]
    is_other = layers[0].weight.data_ptr() != packed.codes.data_ptr()
    if is_other:
        packed.codes = _stacked_in_place([layer.weight for layer in layers])
        packed.scales = torch.cat([_scales(layer.weight.quant_state) for layer in layers])
    rank = row = 0
    for module, layer in zip(modules, layers, strict=True):
        outputs = slice(row, row + layer.out_features)
        row = outputs.stop
        for down_RD, up_OR, scaling in _deltas(module):
            assert packed.down_RD is not None and packed.up_OR is not None, "adapters are those of construction"
            ranks = slice(rank, rank + len(down_RD))
            rank = ranks.stop
            packed.down_RD[ranks].copy_(down_RD)
            packed.up_OR[outputs, ranks].copy_(up_OR.float() * scaling)
    return is_other


def _projections(trunk: "LlamaForCausalLM") -> list[list[nn.Module]]:
    """The projections of every block, grouped by input: four lists per block."""
    groups: list[list[nn.Module]] = []
    for block in cast(Any, trunk.model.layers):
        attention, mlp = block.self_attn, block.mlp
        groups += [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
        groups += [[mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
    return groups


def _ends(trunk: "LlamaForCausalLM") -> tuple[nn.Module, nn.Module]:
    """Embeddings and head."""
    return cast(nn.Module, trunk.get_input_embeddings()), cast(nn.Module, trunk.get_output_embeddings())


def _norms(trunk: "LlamaForCausalLM") -> list[Tensor]:
    """Two norms of every block, and the last one."""
    blocks: Any = trunk.model.layers
    weights = [norm.weight for block in blocks for norm in (block.input_layernorm, block.post_attention_layernorm)]
    return [weight.detach() for weight in (*weights, trunk.model.norm.weight)]
