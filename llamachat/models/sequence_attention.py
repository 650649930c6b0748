"""Attention over a packed row by sequence, for CPUs: no scores between sequences, except inside small blocks.

A packed row's mask discards the scores between sequences. Without a fused kernel they are still computed and read again
in the backward pass, which dominates a small model's time. The results equal those of transformers' eager attention
except for rounding. A sequence may branch: two answers to one prompt compute its keys and values once.
Shapes: B rows, H heads, T positions, D a head's width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from llamachat.memory.estimates import QUERY_BLOCK

# In 16 bits oneDNN compiles a kernel for each shape of a product, which takes five times as long as a small product
# itself, and caches the last thousand kernels. So the numbers of queries and keys are rounded up to a multiple.
SHAPE_MULTIPLE = 32
ROUNDED_BYTES = 2  # largest size of a number for which this is done
NAME, TOGETHER = "per_sequence", "per_sequence_together"


def use_sequence_attention(model: nn.Module, *, trains_together: bool = False) -> None:
    """Switch the model to this attention, for packed rows ([1, T]) and right-padded rows.

    With `trains_together` small sequences share their kernels in training mode, which is faster. Results then differ from
    those of evaluation mode in rounding, and the order of sums depends on a sequence's neighbours. Without it results are
    the same bits in both modes, with and without gradients.

    In a packed row, position 0 starts a sequence. Positions that jump back to p > 0 start a branch, which sees the
    sequence's first p positions and itself.

    Rows with an attention mask use transformers' eager attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    for name in (NAME, TOGETHER):
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, _mask)
    llama: Any = model  # nn.Module's __getattr__ hides PEFT's wrapper and transformers' models
    trunk = llama.get_base_model() if hasattr(llama, "get_base_model") else llama
    trunk.set_attn_implementation(TOGETHER if trains_together else NAME)


def attends_by_sequence(model: nn.Module) -> bool:
    """Whether `use_sequence_attention` was called on the model or its shared trunk."""
    llama: Any = model
    root = llama.get_base_model() if hasattr(llama, "get_base_model") else llama
    return getattr(root, "model", root).config._attn_implementation in (NAME, TOGETHER)


def _mask(*arguments: Any, attention_mask: Tensor | None = None, **named: Any) -> Tensor | None:
    from transformers.masking_utils import eager_mask

    if attention_mask is None:
        return None
    return eager_mask(*arguments, attention_mask=attention_mask, **named)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """A layer's attention function, with transformers' signature: [B, H, T, D] in, [B, T, H, D] out."""
    rate = dropout if module.training else 0.0
    if attention_mask is not None or rate or key.shape[2] != query.shape[2]:  # the last: earlier keys are in a cache
        from transformers.models.llama.modeling_llama import eager_attention_forward

        if attention_mask is None:
            attention_mask = _mask_of(query, key, position_ids)
        result, _ = eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout, **named)
        return result, None
    layer: Any = module
    is_joined = module.training and layer.config._attn_implementation == TOGETHER
    pieces = _pieces(position_ids, query, groups=query.shape[1] // key.shape[1], is_joined=is_joined)
    rows = (_one_row(*row, pieces, scaling, saves_weights=is_joined) for row in zip(query, key, value, strict=True))
    return torch.stack(list(rows)), None


def _mask_of(query: Tensor, key: Tensor, position_ids: Tensor | None) -> Tensor:
    """The additive mask [Q, K], from pieces, or for queries whose own keys are the last ones."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    lowest = torch.full((num_queries, num_keys), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    if num_keys > num_queries:
        return lowest.triu(1 + num_keys - num_queries)
    future = lowest.triu(1)
    for piece in _pieces(position_ids, query, groups=1, is_joined=False):
        for keys in piece.keys:
            lowest[piece.start : piece.end, keys] = future[piece.start : piece.end, keys]
    return lowest


def _one_row(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    pieces: list["_Piece"],
    scaling: float,
    *,
    saves_weights: bool,
) -> Tensor:
    """Attention output [T, H, D] of one row; groups of the H heads share one of K key-value heads."""
    num_heads, total, width = query_HTD.shape
    query_KTGD = query_HTD.reshape(len(key_KTD), -1, total, width).transpose(1, 2)
    extra = SHAPE_MULTIPLE - 1  # the last piece may extend this far past the row
    key_KTD, value_KTD = (pad(tensor, (0, 0, 0, extra)) for tensor in (key_KTD, value_KTD))
    query_KTGD = pad(query_KTGD, (0, 0, 0, 0, 0, extra))
    result = _Attention.apply(query_KTGD, key_KTD, value_KTD, pieces, scaling, saves_weights)
    return result[:, :total].transpose(0, 1).reshape(total, num_heads, width)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Queries at positions `start` to `end` of a packed row, and the keys that they may see.

    In 16 bits the numbers of queries and keys are rounded up: results of the extra queries are discarded, and the extra
    keys are hidden.
    """

    start: int
    end: int
    queries: slice  # from `start`, their number rounded up
    keys: tuple[slice, ...]
    mask_QGS: Tensor  # added to the scores: -inf for keys that a query does not see

    @property
    def count(self) -> int:
        """The number of queries whose results are used."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class _Part:
    """A sequence, or a branch that sees the first `shared` positions of the sequence at `trunk`."""

    start: int
    end: int
    trunk: int
    shared: int


# By position ids, which all layers of a pass share; then by dtype, G, and whether small sequences are joined.
_PIECES: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _pieces(position_ids: Tensor | None, query_BHTD: Tensor, *, groups: int, is_joined: bool) -> list[_Piece]:
    """The sequences and branches of one packed row; several rows have one sequence each."""
    dtype, device = query_BHTD.dtype, query_BHTD.device
    if position_ids is None or len(query_BHTD) > 1:
        return _cut(torch.arange(query_BHTD.shape[2]), _Cutter(dtype, device, groups), is_joined=False)
    if position_ids not in _PIECES:
        _PIECES[position_ids] = {}
    known: dict[tuple[torch.dtype, int, bool], list[_Piece]] = _PIECES[position_ids]
    kind = (dtype, groups, is_joined)
    if kind not in known:
        known[kind] = _cut(position_ids[0], _Cutter(dtype, device, groups), is_joined=is_joined)
    return known[kind]


def _cut(positions_T: Tensor, cutter: "_Cutter", *, is_joined: bool) -> list[_Piece]:
    """Split a row into pieces: one for each branch and block of queries.

    Joined, small sequences share a piece of up to `QUERY_BLOCK` positions, since each piece costs a dozen kernels.
    """
    total = len(positions_T)
    starts = [0, *((positions_T[1:] != positions_T[:-1] + 1).nonzero().flatten() + 1).tolist()]
    trees: list[list[_Part]] = []
    for start, end, shared in zip(starts, [*starts[1:], total], positions_T[starts].tolist(), strict=True):
        if shared == 0:
            trees.append([])
        trees[-1].append(_Part(start, end, trees[-1][0].start if shared else start, shared))
    pieces: list[_Piece] = []
    together: list[_Part] = []
    for tree in [*trees, []]:
        if together and (not tree or tree[-1].end - together[0].start > QUERY_BLOCK):
            pieces.append(cutter.of_sequences(together))
            together = []
        if tree and (not is_joined or tree[-1].end - tree[0].start > QUERY_BLOCK):
            pieces += [piece for part in tree for piece in cutter.of_blocks(part)]
        else:
            together += tree
    return pieces


class _Cutter:
    """Makes pieces with their masks."""

    def __init__(self, dtype: torch.dtype, device: torch.device, groups: int) -> None:
        shape = (QUERY_BLOCK, QUERY_BLOCK + SHAPE_MULTIPLE)
        self._groups = groups
        self._multiple = SHAPE_MULTIPLE if dtype.itemsize <= ROUNDED_BYTES else 1
        self._future_T1S = torch.full(shape, -torch.inf, dtype=dtype, device=device).triu_(1).unsqueeze(1)

    def of_sequences(self, parts: list[_Part]) -> _Piece:
        """One piece from whole sequences with their branches."""
        start, end = parts[0].start, parts[-1].end
        mask_QGS = self._zeros(end - start, end - start)
        mask_QGS[: end - start] = -torch.inf
        for part in parts:
            first, last, trunk = part.start - start, part.end - start, part.trunk - start
            mask_QGS[first:last, :, first:last] = self._future_T1S[: last - first, :, : last - first]
            mask_QGS[first:last, :, trunk : trunk + part.shared] = 0
        return self._piece(start, end, (slice(start, start + mask_QGS.shape[2]),), mask_QGS)

    def of_blocks(self, part: _Part) -> Iterator[_Piece]:
        """One piece for each block of a sequence's or branch's queries."""
        for start in range(part.start, part.end, QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, part.end)
            own = part.shared + start - part.start  # the first key that is one of these queries
            mask_QGS = self._zeros(end - start, own + end - start)
            seen = mask_QGS.shape[2]
            mask_QGS[: end - start, :, own:] = self._future_T1S[: end - start, :, : seen - own]
            keys = (slice(part.start, part.start + seen - part.shared),)
            if part.shared:
                keys = (slice(part.trunk, part.trunk + part.shared), *keys)
            yield self._piece(start, end, keys, mask_QGS)

    def _zeros(self, queries: int, keys: int) -> Tensor:
        queries, keys = (count + -count % self._multiple for count in (queries, keys))
        return self._future_T1S.new_zeros(queries, self._groups, keys)

    def _piece(self, start: int, end: int, keys: tuple[slice, ...], mask_QGS: Tensor) -> _Piece:
        return _Piece(start, end, slice(start, start + len(mask_QGS)), keys, mask_QGS)


class _Attention(torch.autograd.Function):
    """Softmax attention over the pieces of one row, with a manual backward pass.

    With `saves_weights` the forward pass uses plain products and saves the softmax weights. Without it, torch's fused
    kernel takes about half the time, and the backward pass computes the weights again: on short sequences the kernel's
    own backward pass takes twice as long. Shapes: K key-value heads, T positions, G query heads per key-value head, D a
    head's width, Q queries of a piece, S its keys.
    """

    @staticmethod
    def forward(
        ctx: Any, query_KTGD: Tensor, key_KTD: Tensor, value_KTD: Tensor, pieces: Any, scaling: Any, saves_weights: Any
    ) -> Tensor:
        result_KTGD = torch.empty_like(query_KTGD)
        heads, _, groups, width = query_KTGD.shape
        saved_weights = []
        for piece in pieces:
            key, value = _seen(key_KTD, piece), _seen(value_KTD, piece)
            if saves_weights:
                weights = _weights(query_KTGD[:, piece.queries].flatten(1, 2), key, piece, scaling)
                saved_weights.append(weights)
                result_KQGD = torch.bmm(weights, value).view(heads, -1, groups, width)
            else:
                query_KGQD = query_KTGD[:, piece.queries].transpose(1, 2)
                key, value = (tensor.unsqueeze(1).expand(-1, groups, -1, -1) for tensor in (key, value))
                mask_QS = piece.mask_QGS[:, 0]
                result_KGQD = scaled_dot_product_attention(query_KGQD, key, value, attn_mask=mask_QS, scale=scaling)
                result_KQGD = result_KGQD.transpose(1, 2)
            result_KTGD[:, piece.start : piece.end] = result_KQGD[:, : piece.count]
        ctx.pieces, ctx.scaling = pieces, scaling
        ctx.save_for_backward(query_KTGD, key_KTD, value_KTD, *saved_weights)
        return result_KTGD

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_KTGD, key_KTD, value_KTD, *saved_weights = ctx.saved_tensors
        result_KTGD = gradients[0].contiguous()
        of_query = torch.empty_like(query_KTGD)
        # Several pieces contribute to the keys and values of a shared prefix.
        of_key, of_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key_KTD, value_KTD))
        for piece, saved in zip_longest(ctx.pieces, saved_weights):
            # Copied once here, instead of by every product.
            query, result = (x[:, piece.queries].flatten(1, 2).contiguous() for x in (query_KTGD, result_KTGD))
            key, value = (_seen(x, piece).contiguous() for x in (key_KTD, value_KTD))
            weights = _weights(query, key, piece, ctx.scaling) if saved is None else saved
            of_weights = torch.bmm(result, value.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_piece = torch.bmm(of_scores, key)
            of_query[:, piece.start : piece.end] = of_piece.view_as(of_query[:, piece.queries])[:, : piece.count]
            _add(of_key, torch.bmm(of_scores.transpose(1, 2), query), piece)
            _add(of_value, torch.bmm(weights.transpose(1, 2), result), piece)
        of_query, of_key = of_query.mul_(ctx.scaling), of_key.mul_(ctx.scaling)
        return of_query, of_key.to(key_KTD.dtype), of_value.to(value_KTD.dtype), None, None, None


def _weights(query: Tensor, key: Tensor, piece: _Piece, scaling: float) -> Tensor:
    """Softmax weights [K, Q * G, S] of queries [K, Q * G, D] and keys [K, S, D]; 0 for queries that are discarded, which
    have no gradient."""
    queries, groups, _ = piece.mask_QGS.shape
    mask = piece.mask_QGS.flatten(0, 1).expand(len(query), -1, -1)
    weights = torch.softmax(torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scaling), dim=-1)
    if piece.count < queries:
        weights[:, piece.count * groups :] = 0
    return weights


def _seen(tensor_KTD: Tensor, piece: _Piece) -> Tensor:
    parts = [tensor_KTD[:, part] for part in piece.keys]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add(total_KTD: Tensor, piece_KTD: Tensor, piece: _Piece) -> None:
    lengths = [part.stop - part.start for part in piece.keys]
    for part, more in zip(piece.keys, piece_KTD.split(lengths, dim=1), strict=True):
        total_KTD[:, part] += more
