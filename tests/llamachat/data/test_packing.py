"""Packing, step plans and tensors: by hand, and by what must hold for any lengths."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamachat.chat_format import TokenizedExample
from llamachat.data.packing import IGNORED, StepPlan, collate_packed, collate_padded, pack, pack_evenly, plan_steps
from tests.tiny_llama import tiny_llama

LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=40)


def example(first: int, length: int) -> TokenizedExample:
    """Ids first, first + 1, ...; the second half of them learnt."""
    ids = tuple(range(first, first + length))
    return TokenizedExample(ids, tuple(index >= length // 2 for index in range(length)))


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        # Falling: 7 -> [7]; 6 -> [6]; 4 fits best into the 6 (room 4); 3 into the 7 (room 3); 2 opens a third row.
        ([2, 7, 3, 6, 4], [[1, 2], [3, 4], [0]]),
        # Rows after 6, 5: rooms 4 and 5. The 4 goes to the row with room 4 although both could take it; then 5 fits too.
        ([6, 5, 4, 5], [[0, 2], [1, 3]]),
        ([4, 11, 6], [[1], [2, 0]]),  # a longer example has a row of its own
    ],
)
def test_pack_by_hand(lengths: list[int], rows: list[list[int]]):
    assert pack(lengths, capacity=10) == rows


@given(lengths=LENGTHS, capacity=st.integers(16, 40))
def test_pack_loses_nothing_overfills_nothing_and_wastes_at_most_half(lengths: list[int], capacity: int):
    rows = pack(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    fill = [sum(lengths[index] for index in row) for row in rows]
    assert max(fill) <= capacity
    # Two rows that would fit into one never both stay open.
    assert len(rows) == 1 or sorted(fill)[0] + sorted(fill)[1] > capacity


def test_pack_evenly_by_hand():
    # The longest to the emptiest: 9 | 6, 6 takes the 4 and then has 10, 9 takes the 3. Three: 9 | 6 | 4 3. Others have one.
    lengths = [3, 9, 4, 6]
    assert pack_evenly(lengths, 12, shares=2) == [[1, 0], [3, 2]]
    assert pack_evenly(lengths, 12, shares=3) == [[1], [2, 0], [3]]
    assert pack_evenly(lengths, 12, shares=9) == [[1], [3], [2], [0]]
    assert pack_evenly([], 12, shares=2) == []
    # 3 3 and 2 2 2 fill two rows of 6. Even ones would have 3 2 2, one too many, so that each of the two takes two rows.
    assert pack_evenly([3, 3, 2, 2, 2], 6, shares=1) == pack([3, 3, 2, 2, 2], 6) == [[0, 1], [2, 3, 4]]
    assert pack_evenly([3, 3, 2, 2, 2], 6, shares=2) == [[2, 4], [0], [1], [3]]


@given(lengths=LENGTHS, capacity=st.integers(4, 40), shares=st.integers(1, 9))
def test_pack_evenly_loses_nothing_and_gives_each_worker_as_many_rows(lengths: list[int], capacity: int, shares: int):
    rows = pack_evenly(lengths, capacity, shares=shares)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    assert len(rows) % shares == 0 or len(rows) == len(lengths)
    fill = [sum(lengths[index] for index in row) for row in rows]
    assert fill == sorted(fill, reverse=True) and fill[0] <= max(capacity, *lengths)


def steps_of(plan: StepPlan) -> list[Counter[int]]:
    return [Counter(index for row in plan.step_rows(step) for index in row) for step in range(plan.num_steps)]


@settings(deadline=None)
@given(
    lengths=LENGTHS,
    examples_per_step=st.integers(1, 9),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
    world_size=st.integers(1, 3),
    rows_per_microbatch=st.integers(1, 4),
)
def test_steps_hold_the_same_examples_packed_or_not(
    lengths: list[int], examples_per_step: int, epochs: int, seed: int, world_size: int, rows_per_microbatch: int
):
    def plan(*, packing: bool) -> StepPlan:
        return plan_steps(
            lengths,
            examples_per_step=examples_per_step,
            epochs=epochs,
            seed=seed,
            capacity=20,
            packing=packing,
            rows_per_microbatch=1 if packing else rows_per_microbatch,
            world_size=world_size,
        )

    packed, padded = plan(packing=True), plan(packing=False)
    assert steps_of(packed) == steps_of(padded)
    assert packed.tokens_per_step == padded.tokens_per_step
    for batches in (packed, padded):
        assert sum(steps_of(batches), Counter()) == Counter(dict.fromkeys(range(len(lengths)), epochs))
        assert [sum(step.values()) for step in steps_of(batches)[:-1]] == [examples_per_step] * (batches.num_steps - 1)
        assert len(batches.rows) == batches.num_steps * batches.rows_per_step
        assert batches.microbatches_per_step * batches.rows_per_microbatch * world_size == batches.rows_per_step
        assert batches.tokens(0, batches.num_steps) == epochs * sum(lengths)
        assert all(sum(lengths[index] for index in row) <= 20 for row in batches.rows)
    # Each epoch is whole before the next begins.
    order = [index for step in range(padded.num_steps) for row in padded.step_rows(step) for index in sorted(row)]
    if examples_per_step == 1:
        assert sorted(order[: len(lengths)]) == list(range(len(lengths)))


def plan_of(count: int, *, epochs: float, seed: int, per_step: int = 1) -> list[tuple[int, ...]]:
    return plan_steps([1] * count, examples_per_step=per_step, epochs=epochs, seed=seed, capacity=4, packing=False).rows


def test_order_changes_with_epoch_and_seed_and_with_nothing_else():
    rows = plan_of(50, epochs=2, seed=1)
    assert rows == plan_of(50, epochs=2, seed=1)
    assert rows[:50] != rows[50:]
    assert rows[:50] != plan_of(50, epochs=1, seed=2)
    assert rows[:50] == plan_of(50, epochs=1, seed=1)
    assert rows[:50] != [(index,) for index in range(50)]


@pytest.mark.parametrize(("epochs", "count"), [(0.5, 5), (0.25, 3), (1.5, 15), (0.001, 1)])
def test_parts_of_epochs(epochs: float, count: int):
    rows = plan_of(10, epochs=epochs, seed=0)
    assert rows == plan_of(10, epochs=2, seed=0)[:count]


def test_padded_steps_are_sorted_by_length_and_filled_up():
    plan = plan_steps(
        [3, 9, 5], examples_per_step=3, epochs=1, seed=0, capacity=9, packing=False, rows_per_microbatch=2
    )
    assert plan.rows == [(1,), (2,), (0,), ()]
    assert (plan.num_steps, plan.rows_per_step, plan.microbatches_per_step) == (1, 4, 2)


def test_packed_row_by_hand():
    batch = collate_packed([example(10, 4), example(20, 3)])
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 20, 21, 22]]
    assert batch["labels"].tolist() == [[IGNORED, IGNORED, 12, 13, IGNORED, 21, 22]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert "attention_mask" not in batch
    whole = TokenizedExample((7, 8), (True, True))  # an example's first token is no label of its neighbour
    assert collate_packed([whole, whole])["labels"].tolist() == [[IGNORED, 8, IGNORED, 8]]


def test_padded_rows_by_hand():
    # The second example ends with id 0, the pad's: its mask is by length, and its label stays.
    batch = collate_padded([example(10, 4), TokenizedExample((5, 0), (False, True))], rows=3)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13], [5, 0, 0, 0], [0, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, 12, 13],
        [IGNORED, 0, IGNORED, IGNORED],
        [IGNORED] * 4,
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3]] * 3


def test_row_without_examples_trains_nothing():
    packed, padded = collate_packed([]), collate_padded([], rows=2)
    assert packed["input_ids"].tolist() == [[0]]
    assert packed["labels"].tolist() == [[IGNORED]]
    assert padded["input_ids"].tolist() == [[0], [0]]
    assert padded["attention_mask"].tolist() == [[1], [1]]
    assert (padded["labels"] == IGNORED).all()


@settings(deadline=None)
@given(lengths=LENGTHS)
def test_trained_tokens_are_those_of_the_examples(lengths: list[int]):
    examples = [example(100 * index, length) for index, length in enumerate(lengths)]
    trained = Counter(
        token
        for one in examples
        for token, is_learnt in list(zip(one.input_ids, one.loss_mask, strict=True))[1:]
        if is_learnt
    )

    def trained_in(labels: torch.Tensor) -> Counter[int]:
        return Counter(labels[labels != IGNORED].tolist())

    packed: Counter[int] = Counter()
    for row in pack(lengths, 20):
        packed += trained_in(collate_packed([examples[index] for index in row])["labels"])
    assert packed == trained_in(collate_padded(examples)["labels"]) == trained


def per_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    shifted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=IGNORED
    )
    return shifted[labels[:, 1:].flatten() != IGNORED]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_and_padded_give_the_same_loss_for_every_token(attention: str):
    model = tiny_llama(attn_implementation=attention)
    examples = [example(10, 9), example(50, 3), example(90, 6)]
    with torch.no_grad():
        packed = collate_packed(examples)
        labels = packed.pop("labels")
        in_row = per_token_losses(model(**packed, use_cache=False).logits, labels)
        padded = collate_padded(examples, rows=4)
        labels = padded.pop("labels")
        apart = per_token_losses(model(**padded, use_cache=False).logits, labels)
        alone = [
            per_token_losses(model(torch.tensor([one.input_ids])).logits, collate_packed([one])["labels"])
            for one in examples
        ]
    assert len(in_row) == 5 + 2 + 3
    torch.testing.assert_close(in_row, torch.cat(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(apart, torch.cat(alone), atol=1e-5, rtol=0)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_packed_neighbour_cannot_be_seen(attention: str):
    model = tiny_llama(attn_implementation=attention)

    def second_logits(neighbour: TokenizedExample) -> torch.Tensor:
        batch = collate_packed([neighbour, example(50, 5)])
        del batch["labels"]
        with torch.no_grad():
            return model(**batch, use_cache=False).logits[0, -5:]

    assert torch.equal(second_logits(example(10, 8)), second_logits(example(200, 8)))
