"""The forward pass of a Llama model with our own weights: prefill prompts, then decode with the key-value cache.

Shapes: N prompts, P positions of a prompt (left-padded), B rows, T cached columns in view, H key-value heads, G query
heads per key-value head, D head size, E hidden size, V vocabulary. Only logits that a token is sampled from are
computed.

Rotary positions are tables with the model's own frequencies and scaling. With dynamic NTK the frequencies depend on the
sequence length. As in transformers, a prompt is rotated for its own length, every later token for the length up to it,
and cached keys keep their rotation; here this is done for each row separately.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from llamachat.memory.role_bytes import PLAIN_SCORES
from llamachat.models.loading import context_length, rope_parameters
from llamachat.rollout.cache import Cache, CacheShape, on_device, rounded_up
from llamachat.rollout.weights import Layer, Product, Weights

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

PROMPT_COLUMNS = 32  # prompts are padded to a multiple of this, so that few shapes and kernels occur
ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


class Network:
    """The trunk and its head, without state."""

    def __init__(self, trunk: "LlamaForCausalLM", weights: Weights) -> None:
        config: LlamaConfig = trunk.config
        self.weights = weights
        self.rotation = Rotation(trunk, weights.dtype)
        self.vocabulary = config.vocab_size
        self.device = trunk.device
        # The number of columns in a row's sums depends on its neighbours, and so would their last bits in fp32. In fp64
        # rounding removes the difference, so a row's result is the same in any batch. A GPU runs fp64 at 1/64 of the
        # rate and has no fused attention for it.
        is_exact = weights.dtype == torch.float32 and self.device.type == "cpu"
        self.attention_dtype = torch.float64 if is_exact else weights.dtype
        heads = config.num_key_value_heads or config.num_attention_heads
        self._group = config.num_attention_heads // heads
        self._epsilon = config.rms_norm_eps
        self._head_size = config.head_dim or config.hidden_size // config.num_attention_heads
        self.shape = CacheShape(config.num_hidden_layers, heads, self._head_size, self.attention_dtype)

    def prefill(self, prompts: Sequence[Sequence[int]], cache: Cache, slots: Sequence[Sequence[int]]) -> Tensor:
        """Prefill prompts and write each one's keys and values to its slots; return the next token's logits [N, V]."""
        longest = max(map(len, prompts))
        length = rounded_up(longest, PROMPT_COLUMNS)
        pads = [length - len(prompt) for prompt in prompts]
        ids_NP = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
        rotation = tuple(
            table.flatten(0, 1).unsqueeze(1) for table in self.rotation.of_prompts(list(map(len, prompts)), length)
        )
        mask_NPP = self._prompt_mask(pads, length)
        owners = [index for index, group in enumerate(slots) for _ in group]
        owners_B = on_device(torch.tensor(owners), self.device)
        slots_B = on_device(torch.tensor([slot for group in slots for slot in group]), self.device)
        x_BE = functional.embedding(on_device(ids_NP, self.device).flatten(), self.weights.embedding.weight)
        last = len(self.weights.layers) - 1
        for index, layer in enumerate(self.weights.layers):
            query, key, value = (
                part.unflatten(0, (len(prompts), length)).transpose(1, 2)
                for part in self._query_key_value(layer, x_BE, rotation)
            )
            cache.write_prompts(index, slots_B, *(part[:, :, -longest:][owners_B] for part in (key, value)))
            if index == last:  # only the output at the last token is needed
                query, mask_NPP = query[:, :, -1:], mask_NPP[:, -1:]
                x_BE = x_BE.view(len(prompts), length, -1)[:, -1]
            mixed = self._attend_prompts(query, key, value, mask_NPP)
            x_BE = self._rest(layer, x_BE, mixed.transpose(1, 2).reshape(len(x_BE), -1))
        return self._logits(x_BE)

    def step(self, ids_B: Tensor, positions_B: Tensor, cache: Cache, mask_B1T: Tensor) -> Tensor:
        """Write a token of each of the first rows to the cache; return the next token's logits [B, V]."""
        rows = len(ids_B)
        rotation = tuple(table.unsqueeze(1) for table in self.rotation.at(positions_B))
        x_BE = functional.embedding(ids_B, self.weights.embedding.weight)
        for index, layer in enumerate(self.weights.layers):
            query, key, value = self._query_key_value(layer, x_BE, rotation)
            cache.write(index, key, value)
            grouped = (query * self._head_size**-0.5).reshape(-1, self._group, self._head_size)
            scores = torch.bmm(grouped, cache.keys(index, rows).transpose(1, 2))
            scores.view(rows, -1, cache.columns).add_(mask_B1T)
            mixed = torch.bmm(scores.softmax(dim=-1), cache.values(index, rows))
            x_BE = self._rest(layer, x_BE, mixed.view(rows, -1))
        return self._logits(x_BE)

    def _attend_prompts(self, query: Tensor, key: Tensor, value: Tensor, mask_NPP: Tensor) -> Tensor:
        """Attention output [N, heads, Q, D] of the last Q positions of whole prompts."""
        count, _, queries, size = query.shape
        if self.device.type == "cpu" and count * queries * key.shape[2] * self._group <= PLAIN_SCORES:
            # Two to six times as fast as the fused kernel on a CPU in bf16, for prompts of 64 to 256 tokens.
            grouped = (query * size**-0.5).reshape(count, -1, self._group * queries, size)
            scores = torch.matmul(grouped, key.transpose(2, 3))
            scores.unflatten(2, (self._group, queries)).add_(mask_NPP[:, None, None])
            return torch.matmul(scores.softmax(dim=-1), value).view(count, -1, queries, size)
        if self._group > 1:
            key, value = (part.repeat_interleave(self._group, dim=1) for part in (key, value))
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask_NPP.unsqueeze(1), scale=size**-0.5
        )

    def _query_key_value(
        self, layer: Layer, x_BE: Tensor, rotation: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys after rotation, and values; heads [B, heads, D]."""
        heads = self.shape.heads
        normed_BE = functional.rms_norm(x_BE, (x_BE.shape[-1],), layer.attention_norm, self._epsilon)
        all_BHD = layer.query_key_value(normed_BE).unflatten(-1, (-1, self._head_size))
        turned_BHD = rotate(all_BHD[:, :-heads], *rotation)
        dtype = self.attention_dtype
        return turned_BHD[:, :-heads].to(dtype), turned_BHD[:, -heads:].to(dtype), all_BHD[:, -heads:].to(dtype)

    def _rest(self, layer: Layer, x_BE: Tensor, mixed_BE: Tensor) -> Tensor:
        """The rest of the block: from the attention output to the block's output."""
        x_BE = layer.attention_out.added_to(x_BE, mixed_BE.to(x_BE.dtype))
        gate_BF, up_BF = layer.gate_up(
            functional.rms_norm(x_BE, (x_BE.shape[-1],), layer.mlp_norm, self._epsilon)
        ).chunk(2, dim=-1)
        return layer.down.added_to(x_BE, functional.silu(gate_BF).mul_(up_BF))

    def _logits(self, x_BE: Tensor) -> Tensor:
        head: Product = self.weights.head
        return head(functional.rms_norm(x_BE, (x_BE.shape[-1],), self.weights.final_norm, self._epsilon))

    def _prompt_mask(self, pads: Sequence[int], length: int) -> Tensor:
        """The prompts' mask [N, P, P]: -inf for positions that a position does not see, else 0."""
        columns_P = torch.arange(length, device=self.device)
        is_later_PP = columns_P > columns_P.unsqueeze(1)
        is_pad_NP = columns_P < on_device(torch.tensor(pads), self.device).unsqueeze(1)
        # A pad sees itself: softmax over nothing would be NaN.
        is_itself_PP = torch.eye(length, dtype=torch.bool, device=self.device)
        is_hidden_NPP = (is_later_PP | is_pad_NP.unsqueeze(1)) & ~is_itself_PP
        mask_NPP = torch.zeros(is_hidden_NPP.shape, dtype=self.attention_dtype, device=self.device)
        return mask_NPP.masked_fill_(is_hidden_NPP, float("-inf"))


class Rotation:
    """Cosines and sines of all the model's positions, in its dtype; the first half of the sines is negated."""

    def __init__(self, model: "LlamaForCausalLM", dtype: torch.dtype) -> None:
        rotary: Any = model.model.rotary_emb  # its type does not declare its buffers
        self._config = model.config
        self._dtype = dtype
        self._factor = float(rotary.attention_scaling)
        self._frequencies_D2 = rotary.original_inv_freq.float()
        self.context = context_length(model.config)
        self._whole = self.context
        if rope_parameters(model.config)["rope_type"] == "dynamic":
            self._whole = int(model.config.max_position_embeddings)
        frequencies_TD2 = torch.stack(
            [
                self._frequencies_D2,
                *(self._frequencies_at(length) for length in range(self._whole + 1, self.context + 1)),
            ]
        )
        index_T = (torch.arange(self.context, device=frequencies_TD2.device) - self._whole + 1).clamp(min=0)
        self.cos_TD, self.sin_TD = self._tables(frequencies_TD2[index_T])

    def of_prompts(self, lengths: Sequence[int], columns: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, T, D] of prompts that are left-padded to this many columns."""
        columns_T = torch.arange(columns, device=self.cos_TD.device)
        pads_N = on_device(torch.tensor([columns - length for length in lengths]), self.cos_TD.device)
        positions_NT = (columns_T - pads_N.unsqueeze(1)).clamp(min=0)
        if max(lengths) <= self._whole:
            return self.cos_TD[positions_NT], self.sin_TD[positions_NT]
        tables = [
            self._tables(self._frequencies_at(length).expand(length, -1))
            if length > self._whole
            else (self.cos_TD, self.sin_TD)
            for length in lengths
        ]
        cos_NTD, sin_NTD = (
            torch.stack([table[which][row] for table, row in zip(tables, positions_NT, strict=True)])
            for which in (0, 1)
        )
        return cos_NTD, sin_NTD

    def at(self, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, D] of single tokens."""
        return self.cos_TD[positions_B], self.sin_TD[positions_B]

    def _frequencies_at(self, length: int) -> Tensor:
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        device = self._frequencies_D2.device
        return ROPE_INIT_FUNCTIONS["dynamic"](self._config, device, seq_len=torch.tensor(length, device=device))[0]

    def _tables(self, frequencies_TD2: Tensor) -> tuple[Tensor, Tensor]:
        positions_T1 = torch.arange(len(frequencies_TD2), device=frequencies_TD2.device, dtype=torch.float32)[:, None]
        angles_TD2 = positions_T1 * frequencies_TD2
        cos_TD2, sin_TD2 = angles_TD2.cos() * self._factor, angles_TD2.sin() * self._factor
        cos_TD, sin_TD = torch.cat((cos_TD2, cos_TD2), dim=-1), torch.cat((-sin_TD2, sin_TD2), dim=-1)
        return cos_TD.to(self._dtype), sin_TD.to(self._dtype)


def rotate(x_BHD: Tensor, cos_B1D: Tensor, sin_B1D: Tensor) -> Tensor:
    """Rotate queries or keys; the last axis has the pairs' first elements, then their second ones."""
    half = x_BHD.shape[-1] // 2
    return torch.addcmul(x_BHD * cos_B1D, x_BHD.roll(half, dims=-1), sin_B1D)
