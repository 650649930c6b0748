"""Final hidden states at chosen positions, without the rest of the last layer's work, on CPUs.

A loss on answers, or a score at the end of a row, reads few positions of the last layer, but transformers computes its
feed-forward network for all of them. In the bundled base that is a fifth of the forward and backward pass.
Shapes: B rows, T positions, N chosen positions, D hidden.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llamachat.data.packing import SHAPE_MULTIPLE


class LastLayer(LlamaDecoderLayer):
    """A Llama model's last layer, which computes its feed-forward network at the positions `kept` only, if given."""

    def forward(self, hidden_states: Tensor, *arguments: Any, kept: Tensor | None = None, **named: Any) -> Tensor:
        """The layer's output [B, T, D], or [1, N, D] at the `kept` indices [N] of the flattened rows."""
        if kept is None:
            return super().forward(hidden_states, *arguments, **named)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        kept_1ND = (hidden_states + attended).flatten(0, 1).index_select(0, kept).unsqueeze(0)
        return kept_1ND + self.mlp(self.post_attention_layernorm(kept_1ND))


def use_last_layer(model: nn.Module) -> None:
    """Make the last layer of a Llama model a `LastLayer`, in place; weights and their names do not change."""
    llama: Any = model
    layer = llama.get_decoder().layers[-1]
    if type(layer) is LlamaDecoderLayer:
        layer.__class__ = LastLayer


def final_states(trunk: nn.Module, places_N: Tensor, **inputs: Any) -> Tensor:
    """The trunk's final hidden states [N, D] at these indices of the flattened rows; `inputs` are its arguments."""
    llama: Any = trunk
    if not isinstance(llama.layers[-1], LastLayer):
        return llama(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[places_N]
    kept = pad(places_N, (0, -len(places_N) % SHAPE_MULTIPLE))
    return llama(**inputs, use_cache=False, kept=kept).last_hidden_state[0, : len(places_N)]
