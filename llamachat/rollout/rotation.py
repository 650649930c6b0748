"""Rotary positions as tables, by the model's own frequencies and their scaling.

Shapes: T positions, D head size. One thing surprises: with dynamic NTK the frequencies depend on how long the
sequence is. As in transformers, a prompt is turned by those of its own length and every later token by those of the
length it makes; keys that are cached stay as they were turned. Here that holds for each row by itself.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llamachat.models.rope import context_length, rope_parameters

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

SUPPORTED = ("default", "linear", "dynamic", "llama3", "yarn")


class Rotation:
    """Cosines and sines of every position that the model has, in its dtype; the sines of the first half negated."""

    def __init__(self, model: "LlamaForCausalLM", dtype: torch.dtype) -> None:
        rotary: Any = model.model.rotary_emb  # its buffers are not in its types
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
        """Cosines and sines [N, T, D] of prompts that are padded on the left to so many columns."""
        columns_T = torch.arange(columns, device=self.cos_TD.device)
        pads_N = torch.tensor([columns - length for length in lengths], device=self.cos_TD.device)
        positions_NT = (columns_T - pads_N.unsqueeze(1)).clamp(min=0)
        if max(lengths) <= self._whole:
            return self.cos_TD[positions_NT], self.sin_TD[positions_NT]
        tables = [self._of_prompt(length) for length in lengths]
        cos_NTD, sin_NTD = (
            torch.stack([table[which][row] for table, row in zip(tables, positions_NT, strict=True)])
            for which in (0, 1)
        )
        return cos_NTD, sin_NTD

    def at(self, positions_B: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, D] of tokens that come one by one."""
        return self.cos_TD[positions_B], self.sin_TD[positions_B]

    def _of_prompt(self, length: int) -> tuple[Tensor, Tensor]:
        if length <= self._whole:
            return self.cos_TD, self.sin_TD
        return self._tables(self._frequencies_at(length).expand(length, -1))

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
    """Queries or keys turned by their positions; the last axis holds the pairs' first numbers, then their second."""
    half = x_BHD.shape[-1] // 2
    return torch.addcmul(x_BHD * cos_B1D, x_BHD.roll(half, dims=-1), sin_B1D)
