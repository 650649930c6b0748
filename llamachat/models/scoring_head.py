"""A Llama model with a scalar head in place of its language-model head, and the scores it gives.

The class is transformers' own with one more way to call it, so that wrappers (PEFT, data parallel) go through `forward`
as they must. Saved, it is a plain `LlamaForSequenceClassification`. transformers computes a score in the model's dtype;
here the head is computed in fp32; in fp32 the two agree. Scores are read at the last tokens of sequences: in one packed
pass for training, in padded groups for evaluation. Padded rows need no attention mask, since causal attention never
looks to the right, and without a mask it takes its fast path.
Shapes: B rows, T positions, N sequences, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from llamachat.chat_format.tokenizer import FILLER_ID

# Tokens of a forward pass when only scores are wanted, padding included. Ours: memory, not measured speed, sets them.
CPU_ROW_TOKENS, GPU_ROW_TOKENS = 2048, 16384


class ScoringLlama(LlamaForSequenceClassification):
    """One score a sequence, read at the last token of each."""

    def forward(
        self,
        input_ids: Any = None,  # a tensor; transformers' decorators hide the types of what is overridden
        attention_mask: Any = None,
        position_ids: Any = None,
        *arguments: Any,
        ends: Tensor | None = None,
        states_at: Tensor | None = None,
        **named: Any,
    ) -> Any:
        """As in transformers; with `ends` the scores [N] at these positions of the flattened rows, as `logits`.

        With `states_at` also the hidden states [.., D] at those positions, as `hidden_states`.
        """
        if ends is None:
            return super().forward(input_ids, attention_mask, position_ids, *arguments, **named)
        hidden_BTD = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).last_hidden_state
        hidden_TD = hidden_BTD.flatten(0, 1)
        scores_N = read_out(cast(Any, self.score), hidden_TD[ends])
        states = None if states_at is None else hidden_TD[states_at]
        return SequenceClassifierOutputWithPast(logits=cast(Any, scores_N), hidden_states=cast(Any, states))


def read_out(head: nn.Module, hidden: Tensor) -> Tensor:
    """One number [..] in fp32 of each hidden state [.., D], by a linear head of one output."""
    weight_1D, bias_1 = cast(Tensor, head.weight), cast(Tensor | None, getattr(head, "bias", None))
    with torch.autocast(hidden.device.type, enabled=False):
        bias_1 = None if bias_1 is None else bias_1.float()
        return torch.nn.functional.linear(hidden.float(), weight_1D.float(), bias_1).squeeze(-1)


def last_token_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Scores [N] in fp32 of the sequences of packed rows, or of rows padded on the right.

    `batch` has input_ids, the positions' indices `ends` of the last tokens in the flattened rows, and, where rows hold
    several sequences, position_ids that restart at 0 with each. Without an attention mask, one row is packed, several are
    padded: what lies behind a sequence's end is never seen from there.
    """
    return scores_and_states(model, batch)[0]


def scores_and_states(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Scores [N] of such rows, and the hidden states [.., D] at `states_at` where `batch` has it."""
    names = ("input_ids", "position_ids", "ends", "states_at")
    output = model(**{name: batch[name] for name in names if name in batch})
    return output.logits, output.hidden_states


def score_rows(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    row_tokens: int | None = None,
    advance: Callable[[int], object] | None = None,
) -> Tensor:
    """Scores [N], fp32 on the CPU, of token rows in their order; the model is left in the mode it was in.

    Rows of similar length share a forward pass of at most `row_tokens` tokens, the longest first: what does not fit in
    memory shows at once. In fp32 no score moves by more than 1e-5 with its neighbours.
    """
    device = next(model.parameters()).device
    if row_tokens is None:
        row_tokens = CPU_ROW_TOKENS if device.type == "cpu" else GPU_ROW_TOKENS
    scores_N = torch.zeros(len(rows), dtype=torch.float32)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for group in _groups([len(row) for row in rows], row_tokens):
                scores_B = last_token_scores(model, _padded([rows[index] for index in group], device))
                scores_N[torch.tensor(group)] = scores_B.cpu()
                if advance is not None:
                    advance(len(group))
    finally:
        model.train(was_training)
    return scores_N


def _groups(lengths: Sequence[int], row_tokens: int) -> Iterator[list[int]]:
    """Indices by falling length, in groups that padded to their longest have at most `row_tokens` tokens."""
    group: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        assert lengths[index] > 0, "a dialog has tokens"
        if group and (len(group) + 1) * lengths[group[0]] > row_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids_BT = torch.tensor([[*row, *[FILLER_ID] * (width - len(row))] for row in rows], device=device)
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    return {"input_ids": ids_BT, "ends": torch.arange(len(rows), device=device) * width + lengths_B - 1}
