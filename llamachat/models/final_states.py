"""Final hidden states at chosen positions; on CPUs the last layer's feed-forward network runs only there.

A loss on answers, or a score at the end of a row, reads few positions, but transformers computes all of them. A
training step of the bundled base, which has four layers, takes up to an eighth less time, scoring a sixth.
Shapes: B rows, T positions, N chosen positions, D hidden.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from llamachat.data.packing import SHAPE_MULTIPLE


class TrimmedLayer(LlamaDecoderLayer):
    """A Llama model's last layer; its feed-forward network runs only at the positions `kept`, if given."""

    def forward(self, hidden_states: Tensor, *arguments: Any, kept: Tensor | None = None, **named: Any) -> Tensor:
        """The layer's output [B, T, D], or [1, N, D] at the `kept` indices [N] of the flattened rows."""
        if kept is None:
            return super().forward(hidden_states, *arguments, **named)
        assert not arguments, "LlamaModel passes keywords"
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **named)
        kept_1ND = (hidden_states + attended).flatten(0, 1).index_select(0, kept).unsqueeze(0)
        return kept_1ND + self.mlp(self.post_attention_layernorm(kept_1ND))


def trim_last_layer(model: nn.Module) -> None:
    """Make the last layer of a Llama model a `TrimmedLayer`, in place; weights and their names do not change."""
    llama: Any = model
    layer = llama.get_decoder().layers[-1]
    if type(layer) is LlamaDecoderLayer:
        layer.__class__ = TrimmedLayer


def final_states(trunk: nn.Module, places_N: Tensor, **inputs: Any) -> Tensor:
    """The trunk's final hidden states [N, D] at these indices of the flattened rows; `inputs` are its arguments."""
    llama: Any = trunk
    if not isinstance(llama.layers[-1], TrimmedLayer):
        return llama(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)[places_N]
    kept = pad(places_N, (0, -len(places_N) % SHAPE_MULTIPLE))
    states_1ND = llama(**inputs, use_cache=False, kept=kept).last_hidden_state
    assert states_1ND.shape[:2] == (1, len(kept)), "the last layer received the positions"
    return states_1ND[0, : len(places_N)]
