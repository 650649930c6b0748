"""Attention over a packed row on a GPU with torch's variable-length flash attention, which needs no mask.

`sdpa` computes all scores of a packed row under a [T, T] mask, which each layer saves for backward. This neither
computes nor masks the scores between sequences. Rows that are not packed use `sdpa`.
Shapes: B rows, H heads, T positions, D a head's width, S sequences of a row.
"""

from inspect import signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import LlamaConfig

NAME = "varlen"
CAPABILITY = (8, 0)  # minimum compute capability for flash attention
_last: tuple[Tensor, tuple[Tensor, int]] | None = None  # position ids, and the sequences computed from them


def can_use_varlen_attention(config: "LlamaConfig", dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel supports this model on this device."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(device) >= CAPABILITY
        and width % 8 == 0
        and width <= 256
        and {"window_size", "enable_gqa"} <= signature(varlen_attn).parameters.keys()
    )


def use_varlen_attention(model: nn.Module) -> None:
    """Switch the model to this attention: position 0 starts a sequence of a packed row ([1, T], no attention mask)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    trunk: Any = model
    trunk.set_attn_implementation(NAME)


def _mask(*, q_length: int, kv_length: int, attention_mask: Tensor | None = None, **named: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    if attention_mask is None and q_length == kv_length:
        return None
    return sdpa_mask(q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, **named)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    **named: Any,
) -> tuple[Tensor, None]:
    """A layer's attention function, with transformers' signature: [B, H, T, D] in, [B, T, H, D] out."""
    is_row = query.shape[0] == 1 and key.shape[2] == query.shape[2] > 1
    if attention_mask is not None or position_ids is None or not is_row:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **named
        )
    from torch.nn.attention.varlen import varlen_attn

    starts_S, longest = _sequences(position_ids)
    query_THD, key_THD, value_THD = (part[0].transpose(0, 1) for part in (query, key, value))
    attended_THD: Any = varlen_attn(
        query_THD,
        key_THD,
        value_THD,
        starts_S,
        starts_S,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=query_THD.shape[1] != key_THD.shape[1],
    )
    return attended_THD.unsqueeze(0), None


def _sequences(position_ids_1T: Tensor) -> tuple[Tensor, int]:
    """Where the sequences of a row start and the last one ends [S + 1], and the maximum length.

    Computed once for all layers of a forward pass and its recomputation, since it makes the host wait.
    """
    global _last
    if _last is None or _last[0] is not position_ids_1T:
        positions = position_ids_1T[0].tolist()
        starts = [*(place for place, position in enumerate(positions) if position == 0), len(positions)]
        lengths = [end - start for start, end in pairwise(starts)]
        assert positions == [place for length in lengths for place in range(length)], "a row of whole sequences"
        starts_S = torch.tensor(starts, dtype=torch.int32).pin_memory().to(position_ids_1T.device, non_blocking=True)
        _last = (position_ids_1T, (starts_S, max(lengths)))
    return _last[1]
