"""A Llama model with a scalar head instead of its language-model head, and the packed forward pass of training.

The class is transformers' own with one more way to be called, so that wrappers (PEFT, data parallel) go through
`forward` as they must. Saved, it is a plain `LlamaForSequenceClassification`.
Shapes: B rows, T positions, N sequences, D hidden. One thing surprises: transformers computes a score in the model's
dtype, here the head is computed in fp32; in fp32 the two agree.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class ScoringLlama(LlamaForSequenceClassification):
    """One score a sequence, read at the last token of each."""

    def forward(
        self,
        input_ids: Any = None,  # a tensor; transformers' decorators hide the types of what is overridden
        attention_mask: Any = None,
        position_ids: Any = None,
        *arguments: Any,
        ends: Tensor | None = None,
        **named: Any,
    ) -> Any:
        """As in transformers; with `ends` the scores [N] at these positions of the flattened rows, as `logits`."""
        if ends is None:
            return super().forward(input_ids, attention_mask, position_ids, *arguments, **named)
        hidden_BTD = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        scores_N = read_out(cast(Any, self.score), hidden_BTD.flatten(0, 1)[ends])
        return SequenceClassifierOutputWithPast(logits=cast(Any, scores_N))


def read_out(head: nn.Module, hidden: Tensor) -> Tensor:
    """One number [..] in fp32 of each hidden state [.., D], by a linear head of one output."""
    weight_1D, bias_1 = cast(Tensor, head.weight), cast(Tensor | None, getattr(head, "bias", None))
    with torch.autocast(hidden.device.type, enabled=False):
        bias_1 = None if bias_1 is None else bias_1.float()
        return torch.nn.functional.linear(hidden.float(), weight_1D.float(), bias_1).squeeze(-1)
