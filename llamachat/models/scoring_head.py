"""A Llama model with a scalar head instead of its language-model head, and scoring with it.

The class extends transformers' own with one more way to call it, so that wrappers (PEFT, data parallel) go through
`forward` as they must. It is saved as a plain `LlamaForSequenceClassification`. transformers computes scores in the
model's dtype; here the head runs in fp32 (in an fp32 model the two agree). Scores are read at the last tokens of
sequences: in one packed pass in training; in evaluation in padded groups or, with attention by sequence (on CPUs),
in packed passes that compute common prefixes once. Padded rows need no attention mask, since causal attention never
looks to the right; without a mask the fast path is used.
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
from llamachat.models.final_states import final_states
from llamachat.models.sequence_attention import attends_by_sequence

# Tokens per forward pass for scoring, padding included. Ours, limited by memory, not tuned for speed.
CPU_ROW_TOKENS, GPU_ROW_TOKENS = 2048, 16384
LEAST_SHARED = 8  # minimum common prefix, in tokens, that is computed once


class ScoringLlama(LlamaForSequenceClassification):
    """One score per sequence, read at its last token."""

    def forward(
        self,
        input_ids: Any = None,  # a tensor; transformers' decorators hide the overridden types
        attention_mask: Any = None,
        position_ids: Any = None,
        *arguments: Any,
        ends: Tensor | None = None,
        states_at: Tensor | None = None,
        **named: Any,
    ) -> Any:
        """As in transformers; with `ends`, `logits` are the scores [N] at these positions of the flattened rows.

        With `states_at`, `hidden_states` are the hidden states [.., D] at those positions.
        """
        if ends is None:
            return super().forward(input_ids, attention_mask, position_ids, *arguments, **named)
        places = ends if states_at is None else torch.cat((ends, states_at))
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        hidden = final_states(self.model, places, **inputs)
        scores_N = read_out(cast(Any, self.score), hidden[: len(ends)])
        states = None if states_at is None else hidden[len(ends) :]
        return SequenceClassifierOutputWithPast(logits=cast(Any, scores_N), hidden_states=cast(Any, states))


def read_out(head: nn.Module, hidden: Tensor) -> Tensor:
    """One fp32 number [..] for each hidden state [.., D], from a linear head with one output."""
    weight_1D, bias_1 = cast(Tensor, head.weight), cast(Tensor | None, getattr(head, "bias", None))
    with torch.autocast(hidden.device.type, enabled=False):
        bias_1 = None if bias_1 is None else bias_1.float()
        return torch.nn.functional.linear(hidden.float(), weight_1D.float(), bias_1).squeeze(-1)


def last_token_scores(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Scores [N] in fp32 of the sequences in packed rows or right-padded rows.

    `batch` has input_ids, `ends` (indices of the last tokens in the flattened rows) and, if rows contain several
    sequences, position_ids that restart at 0 for each. Without a mask, one row is packed, several are padded: a
    sequence never sees the tokens after its end.
    """
    return scores_and_states(model, batch)[0]


def scores_and_states(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Scores [N] of such rows, and the hidden states [.., D] at `states_at`, if `batch` has it."""
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
    """Scores [N], fp32 on the CPU, of token rows in their order; the model keeps its mode.

    Rows of similar length, or with common prefixes, share a forward pass of at most `row_tokens` tokens, the longest
    first, so that running out of memory shows at once. In fp32, neighbours change no score by more than 1e-5.
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
    """Yield groups of indices by decreasing length with their batch, each with at most `row_tokens` padded tokens."""
    for group in _filled([len(row) for row in rows], row_tokens, is_padded=True):
        width = len(rows[group[0]])
        ids_BT = torch.tensor([[*rows[index], *[FILLER_ID] * (width - len(rows[index]))] for index in group])
        lengths_B = torch.tensor([len(rows[index]) for index in group])
        yield group, {"input_ids": ids_BT, "ends": torch.arange(len(group)) * width + lengths_B - 1}


def _branching_passes(
    rows: Sequence[Sequence[int]], row_tokens: int
) -> Iterator[tuple[list[int], Mapping[str, Tensor]]]:
    """Yield groups of indices with a packed row in which rows with a common prefix are branches of the first."""
    trees = _trees(rows, row_tokens)
    lengths = [sum(len(rows[index]) - shared for index, shared in tree) for tree in trees]
    for group in _filled(lengths, row_tokens, is_padded=False):
        parts = [part for place in group for part in trees[place]]
        own = [rows[index][shared:] for index, shared in parts]
        yield [index for index, _ in parts], pack_responses(own, [shared for _, shared in parts])


def _trees(rows: Sequence[Sequence[int]], row_tokens: int) -> list[list[tuple[int, int]]]:
    """Group the indices into trees, each with the length of the prefix shared with the tree's first row (0 for it).

    The unshared tokens of a tree are at most `row_tokens`, unless it is a single row.
    """
    order = sorted(range(len(rows)), key=lambda index: tuple(rows[index]))  # rows with common prefixes are adjacent
    trees: list[list[tuple[int, int]]] = []
    room = 0
    for place, index in enumerate(order):
        row = rows[index]
        shared = _alike(rows[trees[-1][0][0]], row) if trees else 0
        # A row that shares much more with the next one starts a new tree.
        after = _alike(row, rows[order[place + 1]]) if place + 1 < len(order) else 0
        if trees and shared == len(rows[trees[-1][-1][0]]):
            shared -= 1  # without a jump in positions it would continue the previous row
        if shared < LEAST_SHARED or after >= 2 * shared or len(row) - shared > room:
            trees.append([])
            shared, room = 0, row_tokens
        trees[-1].append((index, shared))
        room -= len(row) - shared
    return trees


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common prefix, excluding the last token of the second row."""
    most = min(len(one), len(other) - 1)
    return next((place for place in range(most) if one[place] != other[place]), most)


def _filled(lengths: Sequence[int], row_tokens: int, *, is_padded: bool) -> Iterator[list[int]]:
    """Yield groups of indices by decreasing length, at most `row_tokens` tokens each (including padding if padded)."""
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
