"""A Llama model with a scalar head in place of its language-model head, and the scores it gives.

The class is transformers' own with one more way to call it, so that wrappers (PEFT, data parallel) go through `forward`
as they must. Saved, it is a plain `LlamaForSequenceClassification`. transformers computes a score in the model's dtype;
here the head is computed in fp32; in fp32 the two agree. Scores are read at the last tokens of sequences: in one packed
pass for training; for evaluation in padded groups, or, where the model attends by sequence (on a CPU), in packed passes
that compute what rows begin alike with once. Padded rows need no attention mask, since causal attention never looks to the
right, and without a mask it takes its fast path.
Shapes: B rows, T positions, N sequences, D hidden.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from llamachat.chat_format.tokenizer import FILLER_ID
from llamachat.data.packing import pack_responses
from llamachat.models.sequence_attention import attends_by_sequence

# Tokens of a forward pass when only scores are wanted, padding included. Ours: memory, not measured speed, sets them.
CPU_ROW_TOKENS, GPU_ROW_TOKENS = 2048, 16384
LEAST_SHARED = 8  # tokens that rows begin alike with, from which on they are computed once


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

    Rows of similar length, or rows that begin alike, share a forward pass of at most `row_tokens` tokens, the longest
    first: what does not fit in memory shows at once. In fp32 no score moves by more than 1e-5 with its neighbours.
    """
    device = next(model.parameters()).device
    if row_tokens is None:
        row_tokens = CPU_ROW_TOKENS if device.type == "cpu" else GPU_ROW_TOKENS
    scores_N = torch.zeros(len(rows), dtype=torch.float32)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            passes = _branching_passes if attends_by_sequence(model) else _padded_passes
            for group, batch in passes(rows, row_tokens):
                batch = {name: tensor.to(device) for name, tensor in batch.items()}
                scores_N[torch.tensor(group)] = last_token_scores(model, batch).cpu()
                if advance is not None:
                    advance(len(group))
    finally:
        model.train(was_training)
    return scores_N


def _padded_passes(rows: Sequence[Sequence[int]], row_tokens: int) -> Iterator[tuple[list[int], Mapping[str, Tensor]]]:
    """Indices by falling length with their batch, in groups that padded to their longest have at most `row_tokens` tokens."""
    for group in _filled([len(row) for row in rows], row_tokens, is_padded=True):
        width = len(rows[group[0]])
        ids_BT = torch.tensor([[*rows[index], *[FILLER_ID] * (width - len(rows[index]))] for index in group])
        lengths_B = torch.tensor([len(rows[index]) for index in group])
        yield group, {"input_ids": ids_BT, "ends": torch.arange(len(group)) * width + lengths_B - 1}


def _branching_passes(
    rows: Sequence[Sequence[int]], row_tokens: int
) -> Iterator[tuple[list[int], Mapping[str, Tensor]]]:
    """Indices with their batch of one packed row, in which rows that begin alike are branches of the first of them."""
    trees = _trees(rows, row_tokens)
    lengths = [sum(len(rows[index]) - shared for index, shared in tree) for tree in trees]
    for group in _filled(lengths, row_tokens, is_padded=False):
        parts = [part for place in group for part in trees[place]]
        own = [rows[index][shared:] for index, shared in parts]
        yield [index for index, _ in parts], pack_responses(own, [shared for _, shared in parts])


def _trees(rows: Sequence[Sequence[int]], row_tokens: int) -> list[list[tuple[int, int]]]:
    """Every index with the number of tokens that it shares with the first of its tree, which shares none.

    Together the tokens of a tree that are not shared are at most `row_tokens`, unless it is one row.
    """
    order = sorted(range(len(rows)), key=lambda index: tuple(rows[index]))  # rows that begin alike are neighbours
    trees: list[list[tuple[int, int]]] = []
    room = 0
    for place, index in enumerate(order):
        row = rows[index]
        shared = _alike(rows[trees[-1][0][0]], row) if trees else 0
        # A row that shares much more with the next one begins a tree for both.
        after = _alike(row, rows[order[place + 1]]) if place + 1 < len(order) else 0
        if trees and shared == len(rows[trees[-1][-1][0]]):
            shared -= 1  # without a jump of positions it would continue the row before it
        if shared < LEAST_SHARED or after >= 2 * shared or len(row) - shared > room:
            trees.append([])
            shared, room = 0, row_tokens
        trees[-1].append((index, shared))
        room -= len(row) - shared
    return trees


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that both begin with, without the last of the second."""
    most = min(len(one), len(other) - 1)
    return next((place for place in range(most) if one[place] != other[place]), most)


def _filled(lengths: Sequence[int], row_tokens: int, *, is_padded: bool) -> Iterator[list[int]]:
    """Indices by falling length, in groups that have at most `row_tokens` tokens, those up to the longest counted if padded."""
    group: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        assert lengths[index] > 0, "a dialog has tokens"
        more = lengths[group[0]] if group and is_padded else lengths[index]
        if group and tokens + more > row_tokens:
            yield group
            group, tokens = [], 0
        group.append(index)
        tokens += lengths[group[0]] if is_padded else lengths[index]
    if group:
        yield group
