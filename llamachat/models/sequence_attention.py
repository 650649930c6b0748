"""Attention over a packed row one sequence at a time, for CPUs: the scores between sequences are never computed.

The mask of a packed row throws away the scores between its sequences; without a fused kernel all of
them are computed and read again in the backward pass, which is most of a small model's time. The numbers are those of
transformers' eager attention, bit for bit in the forward pass.
Shapes: B rows, H heads, T positions, D a head's width.
"""

from typing import Any

import torch
from torch import Tensor, nn

NAME = "per_sequence"


def use_sequence_attention(model: nn.Module) -> None:
    """From here on the model attends so: packed rows ([1, T] with positions that begin anew) and rows padded on the right.

    Rows with an attention mask are attended to as by transformers' eager attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    llama: Any = model  # PEFT's wrapper and transformers' models lie behind nn.Module's __getattr__
    trunk = llama.get_base_model() if hasattr(llama, "get_base_model") else llama
    trunk.set_attn_implementation(NAME)


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
    lengths = _lengths(position_ids, query)
    parts = [
        _attend(q, k, v, None, scaling=scaling, dropout=_rate(module, dropout))
        for q, k, v in zip(
            query.split(lengths, dim=2), key_BHTD.split(lengths, dim=2), value_BHTD.split(lengths, dim=2), strict=True
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _rate(module: nn.Module, dropout: float) -> float:
    return dropout if module.training else 0.0


def _lengths(position_ids: Tensor | None, query_BHTD: Tensor) -> list[int]:
    """Lengths of the sequences of one packed row; several rows hold one each."""
    total = query_BHTD.shape[2]
    if position_ids is None or query_BHTD.shape[0] > 1:
        return [total]
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], total], strict=True)]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scaling: float, dropout: float) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * scaling
    if mask is None:
        asked, known = q.shape[2], k.shape[2]
        lowest = torch.finfo(q.dtype).min
        mask = torch.full((asked, known), lowest, dtype=q.dtype, device=q.device).triu(1 + known - asked)
    weights = torch.softmax(scores + mask, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(nn.functional.dropout(weights, p=dropout), v)
