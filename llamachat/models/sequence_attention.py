"""Attention over a packed row one sequence at a time, for CPUs: the scores between sequences are never computed.

The mask of a packed row throws away the scores between its sequences; without a fused kernel all of
them are computed and read again in the backward pass, which is most of a small model's time. The numbers are those of
transformers' eager attention, bit for bit in the forward pass. A sequence may also branch: two answers to one prompt need
its keys and values once.
Shapes: B rows, H heads, T positions, D a head's width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NAME = "per_sequence"


def use_sequence_attention(model: nn.Module) -> None:
    """From here on the model attends so: packed rows ([1, T]) and rows padded on the right.

    In a packed row position 0 begins a sequence. Positions that jump back to p > 0 begin a branch of it, which sees its first
    p positions and itself.

    Rows with an attention mask are attended to as by transformers' eager attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    llama: Any = model  # PEFT's wrapper and transformers' models lie behind nn.Module's __getattr__
    trunk = llama.get_base_model() if hasattr(llama, "get_base_model") else llama
    trunk.set_attn_implementation(NAME)


def attends_by_sequence(model: nn.Module) -> bool:
    """Whether `use_sequence_attention` was called on the model, or on the trunk that it shares."""
    llama: Any = model
    root = llama.get_base_model() if hasattr(llama, "get_base_model") else llama
    return getattr(root, "model", root).config._attn_implementation == NAME


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
    """The attention function of a layer, as transformers calls it: [B, H, T, D] in, [B, T, H, D] out."""
    del named
    groups = query.shape[1] // key.shape[1]
    key_BHTD, value_BHTD = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if attention_mask is not None or key.shape[2] != query.shape[2]:  # with a cache, the keys before are one sequence's
        result = _attend(query, key_BHTD, value_BHTD, attention_mask, scaling=scaling, dropout=_rate(module, dropout))
        return result.transpose(1, 2).contiguous(), None
    pieces = _pieces(position_ids, query)
    lengths = [piece.end - piece.start for piece in pieces]
    split = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key_BHTD, value_BHTD)), strict=True)
    parts = []
    for piece, (q, k, v) in zip(pieces, split, strict=True):
        if piece.shared:
            shared = slice(piece.trunk, piece.trunk + piece.shared)
            k = torch.cat([key_BHTD[:, :, shared], k], dim=2)
            v = torch.cat([value_BHTD[:, :, shared], v], dim=2)
        parts.append(_attend(q, k, v, None, scaling=scaling, dropout=_rate(module, dropout)))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _rate(module: nn.Module, dropout: float) -> float:
    return dropout if module.training else 0.0


@dataclass(frozen=True, slots=True)
class _Piece:
    """Positions `start` to `end` of a packed row; a branch also sees the first `shared` positions from `trunk` on."""

    start: int
    end: int
    trunk: int
    shared: int


def _pieces(position_ids: Tensor | None, query_BHTD: Tensor) -> list[_Piece]:
    """The sequences and branches of one packed row; several rows hold one sequence each."""
    total = query_BHTD.shape[2]
    if position_ids is None or query_BHTD.shape[0] > 1:
        return [_Piece(0, total, 0, 0)]
    positions_T = position_ids[0]
    starts = [0, *((positions_T[1:] != positions_T[:-1] + 1).nonzero().flatten() + 1).tolist()]
    pieces: list[_Piece] = []
    trunk = 0
    for start, end, shared in zip(starts, [*starts[1:], total], positions_T[starts].tolist(), strict=True):
        trunk = start if shared == 0 else trunk
        pieces.append(_Piece(start, end, trunk, shared))
    return pieces


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, dropout: float) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * scaling
    if mask is None:
        num_queries, num_keys = q.shape[2], k.shape[2]
        lowest = torch.finfo(q.dtype).min
        mask = torch.full((num_queries, num_keys), lowest, dtype=q.dtype, device=q.device).triu(
            1 + num_keys - num_queries
        )
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(nn.functional.dropout(weights, p=dropout), v)
