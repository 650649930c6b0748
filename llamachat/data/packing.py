"""From tokenized dialogs to optimizer steps, rows and tensors: order, packing, padding.

An optimizer step is a fixed set of examples, packed or not, so packing changes the speed but not the result. All steps
have the same number of rows, as required by trainers with fixed gradient accumulation; steps that need fewer rows are
padded with empty ones.
Shapes: B rows of a micro-batch, T positions, 1 a packed row.
A packed row has no attention mask. Position ids that restart at 0 separate its examples; a mask of ones would let them
attend to each other.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import ceil
from random import Random

import torch
from torch import Tensor

from llamachat.chat_format import TokenizedExample
from llamachat.chat_format.tokenizer import FILLER_ID

# A CPU caches one compiled kernel for each shape: padding lengths to a multiple limits their number and is faster.
SHAPE_MULTIPLE = 64
IGNORED = -100  # the label that the losses of torch and transformers ignore

Row = tuple[int, ...]  # indices of the row's examples; () for an empty row that pads a step


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """All rows of a training run in order; step s consists of `rows[s * rows_per_step : (s + 1) * rows_per_step]`."""

    rows: list[Row]
    num_steps: int
    rows_per_step: int
    rows_per_microbatch: int
    world_size: int
    tokens_per_step: tuple[int, ...]  # total of the step's examples, without padding

    @property
    def microbatches_per_step(self) -> int:
        """Gradient accumulation steps of each process."""
        return self.rows_per_step // (self.rows_per_microbatch * self.world_size)

    def step_rows(self, step: int) -> list[Row]:
        """The rows of one step, counting from 0."""
        return self.rows[step * self.rows_per_step : (step + 1) * self.rows_per_step]

    def tokens(self, first_step: int, end_step: int) -> int:
        """The number of tokens in the steps from `first_step` up to but excluding `end_step`."""
        return sum(self.tokens_per_step[first_step:end_step])


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack examples into rows of `capacity` tokens with best-fit decreasing; ties go to the earlier example.

    An example longer than `capacity` gets its own row.
    """
    assert all(length > 0 for length in lengths), "an example has tokens"
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin), sorted: the first that is large enough is the best fit
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            number, left = len(bins), max(capacity, length)
            bins.append([])
        else:
            left, number = rooms.pop(place)
        bins[number].append(index)
        insort(rooms, (left - length, number))
    return bins


def pack_evenly(lengths: Sequence[int], capacity: int, *, shares: int) -> list[list[int]]:
    """Pack examples into rows for `shares` workers: the same number each, of similar length, fullest first.

    With one worker, the rows are those of `pack`. An example longer than `capacity` gets its own row.
    """
    rows, number = pack(lengths, capacity), 0
    room = max([capacity, *lengths])
    while rows and shares > 1 and (number == 0 or max(_tokens(lengths, row) for row in rows) > room):
        number += shares * (1 if number else ceil(len(rows) / shares))
        rows = _spread(lengths, min(number, len(lengths)))
    return sorted(rows, key=lambda row: -_tokens(lengths, row))


def _spread(lengths: Sequence[int], number: int) -> list[list[int]]:
    """Distribute the examples over `number` rows, each time the longest remaining to the emptiest row."""
    rows: list[list[int]] = [[] for _ in range(number)]
    filled = [(0, place) for place in range(number)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        tokens, place = heappop(filled)
        rows[place].append(index)
        heappush(filled, (tokens + lengths[index], place))
    return rows


def _tokens(lengths: Sequence[int], row: Sequence[int]) -> int:
    return sum(lengths[index] for index in row)


def plan_steps(
    lengths: Sequence[int],
    *,
    examples_per_step: int,
    epochs: float,
    seed: int,
    capacity: int,
    packing: bool,
    rows_per_microbatch: int = 1,
    world_size: int = 1,
) -> StepPlan:
    """Plan the rows of all steps: shuffle each epoch, split it into steps of `examples_per_step`, lay out rows.

    The last step may have fewer examples. A partial epoch takes the first examples of its order.
    """
    assert lengths and examples_per_step > 0 and epochs > 0, "the recipe is checked before"
    order = epoch_order(len(lengths), epochs, seed)
    groups = [order[start : start + examples_per_step] for start in range(0, len(order), examples_per_step)]
    return lay_out(
        groups,
        lengths,
        capacity=capacity,
        packing=packing,
        rows_per_microbatch=rows_per_microbatch,
        world_size=world_size,
    )


def lay_out(
    groups: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    capacity: int,
    packing: bool = True,
    rows_per_microbatch: int = 1,
    world_size: int = 1,
) -> StepPlan:
    """Lay out rows for optimizer steps, one for each group of examples."""
    assert world_size > 0 and (rows_per_microbatch == 1 or not packing), "a packed micro-batch is one row"
    layouts: list[list[Row]] = []
    for group in groups:
        if packing:
            rows = _rows([lengths[index] for index in group], capacity, world_size)
            layouts.append([tuple(group[place] for place in row) for row in rows])
        else:
            # Similar lengths share a micro-batch. The longest come first, so that running out of memory shows at once.
            layouts.append([(index,) for index in sorted(group, key=lambda index: (-lengths[index], index))])
    unit = rows_per_microbatch * world_size
    rows_per_step = -(-max(map(len, layouts)) // unit) * unit
    return StepPlan(
        rows=[row for layout in layouts for row in (*layout, *[()] * (rows_per_step - len(layout)))],
        num_steps=len(layouts),
        rows_per_step=rows_per_step,
        rows_per_microbatch=rows_per_microbatch,
        world_size=world_size,
        tokens_per_step=tuple(sum(lengths[index] for row in layout for index in row) for layout in layouts),
    )


def _rows(lengths: Sequence[int], capacity: int, world_size: int) -> list[list[int]]:
    """Rows of similar length for several processes, unless that would need another micro-batch."""
    rows = pack(lengths, capacity)
    even = pack_evenly(lengths, capacity, shares=world_size)
    return even if len(even) <= -(-len(rows) // world_size) * world_size else rows


def epoch_order(count: int, epochs: float, seed: int | str) -> list[int]:
    """Indices of `count` examples for `epochs`, reshuffled each epoch; a partial epoch takes the first of its order."""
    total = max(1, int(count * epochs + 0.5))
    order: list[int] = []
    epoch = 0
    while len(order) < total:
        # Sort by random() instead of shuffle(): only random() is guaranteed to be the same in every Python version.
        numbers = Random(f"order {seed} {epoch}")
        order += sorted(range(count), key=[numbers.random() for _ in range(count)].__getitem__)
        epoch += 1
    return order[:total]


def collate_packed(examples: Sequence[TokenizedExample], *, multiple_of: int = 1) -> dict[str, Tensor]:
    """Collate one row of isolated examples: input_ids, labels, position_ids, each [1, T]; one pad if there are none.

    An example's first token is never a label, since the token before it belongs to another example. Padding to a
    multiple of tokens is added as one more example without targets.
    """
    parts = [(_ids(example), _labels(example)) for example in examples] or [_nothing(1)]
    missing = -sum(len(ids) for ids, _ in parts) % multiple_of
    parts += [_nothing(missing)] if missing else []
    return {
        "input_ids": torch.cat([ids for ids, _ in parts]).unsqueeze(0),
        "labels": torch.cat([labels for _, labels in parts]).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in parts]).unsqueeze(0),
    }


def collate_padded(
    examples: Sequence[TokenizedExample], *, rows: int | None = None, multiple_of: int = 1
) -> dict[str, Tensor]:
    """Collate one example per row, right-padded: input_ids, labels, attention_mask, position_ids, each [B, T].

    The mask is computed from lengths, because text may contain the pad token. With `rows`, empty rows are added up to
    that number; each attends to one pad, since attention over nothing gives NaN.
    """
    assert rows is None or len(examples) <= rows, "a micro-batch has room for its examples"
    parts = [(_ids(example), _labels(example)) for example in examples]
    parts += [_nothing(1) for _ in range((rows or 0) - len(parts))]
    lengths_B = torch.tensor([len(ids) for ids, _ in parts])
    width = -(-int(lengths_B.max()) // multiple_of) * multiple_of
    positions_T = torch.arange(width)
    return {
        "input_ids": _pad([ids for ids, _ in parts], FILLER_ID, width),
        "labels": _pad([labels for _, labels in parts], IGNORED, width),
        "attention_mask": (positions_T < lengths_B.unsqueeze(1)).long(),
        # Positions continue over the padding: restarting at 0 would mark a second packed example.
        "position_ids": positions_T.expand(len(parts), -1).contiguous(),
    }


def pack_responses(
    responses: Sequence[Sequence[int]], shared: Sequence[int] = (), *, multiple_of: int = SHAPE_MULTIPLE
) -> dict[str, Tensor]:
    """Collate one row of isolated responses: input_ids and position_ids [1, T], and the last indices `ends` [N].

    The positions of a response start at its number of `shared` tokens: those of the last response that shares none.
    Padding to a multiple of tokens is added as one more response, which is not scored; without responses, the row
    consists of padding.
    """
    lengths = [len(ids) for ids in responses]
    total = sum(lengths)
    missing = -total % multiple_of if total else multiple_of
    ids = [token for response in responses for token in response] + [FILLER_ID] * missing
    firsts = [*(shared or [0] * len(lengths)), 0]
    spans = zip(firsts, [*lengths, missing], strict=True)
    positions = [position for first, length in spans for position in range(first, first + length)]
    return {
        "input_ids": torch.tensor([ids], dtype=torch.long),
        "position_ids": torch.tensor([positions], dtype=torch.long),
        "ends": torch.tensor(lengths, dtype=torch.long).cumsum(0) - 1,
    }


def _ids(example: TokenizedExample) -> Tensor:
    return torch.tensor(example.input_ids, dtype=torch.long)


def _labels(example: TokenizedExample) -> Tensor:
    is_target_T = torch.tensor(example.loss_mask, dtype=torch.bool)
    is_target_T[0] = False
    return torch.where(is_target_T, _ids(example), IGNORED)


def _nothing(count: int) -> tuple[Tensor, Tensor]:
    return torch.full((count,), FILLER_ID), torch.full((count,), IGNORED)


def _pad(rows: list[Tensor], value: int, width: int) -> Tensor:
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=value) for row in rows])
