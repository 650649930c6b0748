"""Processes that work together: divided work comes back complete and in order, the same in every process."""

from typing import Any

import pytest
import torch
from accelerate import DistributedType, PartialState
from torch.testing import assert_close

from llamachat import distributed
from pipelines.cli.main import main
from tests.several import run_several

GRADIENTS = (torch.tensor([[1.0, -2.0]]), torch.tensor([3.0, 0.5, 4.0]))


def share_work() -> dict[str, Any]:
    index = distributed.index()
    calls: list[list[int]] = []

    def squares(items: list[int]) -> list[int]:
        calls.append(items)
        return [item * item for item in items]

    squared = {length: distributed.scatter_map(list(range(length)), squares) for length in (0, 1, 2, 7)}
    weights = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in GRADIENTS]
    # Each has something for the first weight, and only the last one for the second.
    weights[0].grad = GRADIENTS[0] * (index + 1)
    if index == distributed.count() - 1:
        weights[1].grad = GRADIENTS[1].clone()
    distributed.NUMBERS_PER_TRANSFER = 4  # the two weights do not go together
    distributed.sum_gradients(weights)
    # In bf16 alone, and in one transfer with fp32. Summed in bf16, 256 and 5 would be 260, and a third of it 86.5, not 87.
    mixed = [torch.nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)]
    scaled = []
    for trained in (mixed[:1], mixed):
        for weight in mixed:
            weight.grad = torch.tensor([256.0 if index == 0 else 5.0, 0.25]).to(weight.dtype)
        distributed.sum_gradients(trained, scale=1 / 3)
        scaled.append([weight.grad for weight in trained])
    mine = torch.tensor([1.0, float(index)])
    return {
        "squared": squared,
        "calls": calls,
        "gradients": [weight.grad for weight in weights],
        "scaled": scaled,
        "summed": distributed.all_reduce_sum(mine),
        "mine": mine,
        "agreed": distributed.broadcast_object({"index": index}),
        "first": distributed.is_first(),
    }


@pytest.mark.parametrize("count", [1, 2, 3])
def test_work_is_dealt_out_and_its_results_are_in_every_process(count: int) -> None:
    results = run_several(count, share_work)
    assert [one["first"] for one in results] == [True] + [False] * (count - 1)
    for index, one in enumerate(results):
        assert one["squared"] == {length: [n * n for n in range(length)] for length in (0, 1, 2, 7)}
        assert one["agreed"] == {"index": 0}
        assert_close(one["mine"], torch.tensor([1.0, float(index)]))
        assert_close(one["summed"], torch.tensor([float(count), float(sum(range(count)))]))
        assert_close(one["gradients"][0], GRADIENTS[0] * sum(range(1, count + 1)))
        assert_close(one["gradients"][1], GRADIENTS[1])
        if count > 1:
            expected = torch.tensor([256.0 + 5 * (count - 1), 0.25 * count]) * (1 / 3)
            for gradients, dtypes in zip(
                one["scaled"], ([torch.bfloat16], [torch.bfloat16, torch.float32]), strict=True
            ):
                assert_close(gradients, [expected.to(dtype) for dtype in dtypes], rtol=0, atol=0)
    # Nobody does another's work, and who has none is not asked; of nothing at all each makes nothing.
    calls = [items for one in results for items in one["calls"]]
    assert sorted(item for items in calls for item in items) == sorted([0, *range(2), *range(7)])
    assert calls.count([]) == count


def fail_in_the_last() -> None:
    if distributed.index() == distributed.count() - 1:
        raise ValueError("the last one fails")
    distributed.wait()


def test_an_error_in_one_process_is_the_end_of_all() -> None:
    with pytest.raises(AssertionError, match=r"process \d of 2"):
        run_several(2, fail_in_the_last)


@pytest.mark.parametrize("name", ["LOCAL_RANK", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"])
def test_variables_of_other_launchers_leave_one_process_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(PartialState, "_shared_state", {})
    assert main(["--help"]) == 0
    assert PartialState(cpu=True).distributed_type == DistributedType.NO
