"""The stand-in behaves as a CUDA device does: its devices, memory, graphs and waits."""

from collections.abc import Callable
from typing import Any

from tests.cuda_standin.device import GIB, Device
from tests.cuda_standin.process import on_standin

MIB = 2**20


def test_tensors_on_the_device_are_computed_and_do_not_mix_with_those_of_the_cpu() -> None:
    result = on_standin(_computed)
    assert result["device"] == "cuda:0"
    assert result["gradient"] == [[30.0, 34.0, 38.0, 42.0, 46.0]] * 3  # column sums of 0 to 19 in four rows
    assert result["masked"] == [18.0, 19.0]
    assert max(result["packed"]) < 0.03
    for error in result["errors"]:
        assert "Expected all tensors to be on the same device" in error
    assert "can't convert cuda:0 device type tensor to numpy" in result["numpy"]


def _computed(device: Device) -> dict[str, Any]:
    import torch
    from torch.nn.attention.varlen import varlen_attn
    from torch.nn.functional import linear, scaled_dot_product_attention

    x = torch.arange(20.0, device="cuda").view(4, 5)
    layer = torch.nn.Linear(5, 3).to("cuda")
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    mixes = (
        lambda: x + torch.ones(4, 5),
        lambda: linear(x, torch.ones(3, 5)),
        lambda: torch.cat([x, torch.ones(4, 5)]),
        lambda: x.gather(1, torch.zeros(4, 1, dtype=torch.long)),
    )
    query = torch.randn(7, 2, 16, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bounds = torch.tensor([0, 3, 7], dtype=torch.int32, device="cuda")
    packed: Any = varlen_attn(query, query, query, bounds, bounds, 4, 4, window_size=(-1, 0))
    packed[:, :, 0].sum().backward()
    assert query.grad is not None
    second = query.detach()[3:].cpu().float().requires_grad_()
    rows = second.transpose(0, 1)
    alone = scaled_dot_product_attention(rows, rows, rows, is_causal=True).transpose(0, 1)
    alone[:, :, 0].sum().backward()
    assert second.grad is not None
    return {
        "device": str(layer.weight.grad.device),
        "gradient": layer.weight.grad.tolist(),
        "masked": x[x > 17].tolist(),
        "packed": [_gap(packed[3:], alone), _gap(query.grad[3:], second.grad)],
        "errors": [_error(mix) for mix in mixes],
        "numpy": _error(x.numpy),
    }


def _gap(tensor: Any, expected: Any) -> float:
    return (tensor.cpu().float() - expected).abs().max().item()


def _error(work: Callable[[], Any]) -> str:
    try:
        work()
    except Exception as error:
        return str(error)
    return ""


def test_graphs_repeat_what_was_captured_and_refuse_what_waits_for_the_device() -> None:
    result = on_standin(_captured)
    assert result["before"] == [1.0, 1.0, 1.0]  # a capture runs nothing
    assert result["after"] == [3.0, 3.0, 3.0]
    assert result["result"] == [9.0, 12.0, 15.0]
    for error in result["errors"]:
        assert "operation not permitted when stream is capturing" in error
    assert result["counts"] == [0, 2]  # kernels that the host launched, graphs


def _captured(device: Device) -> dict[str, Any]:
    import torch

    ones = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ones.add_(1) * 2 + ones.cumsum(0)
    before = ones.tolist()
    device.reset_statistics()
    graph.replay()
    graph.replay()
    statistics = device.statistics()

    def capture(work: Callable[[], Any]) -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            work()

    waiting = (ones.nonzero, ones.cpu, lambda: ones.sum().item(), lambda: ones[ones > 0], torch.cuda.synchronize)
    return {
        "before": before,
        "after": ones.tolist(),
        "result": result.tolist(),
        "errors": [_error(lambda work=work: capture(work)) for work in waiting],
        "counts": [statistics["kernels"], statistics["replays"]],
    }


def test_memory_is_that_of_the_caching_allocator() -> None:
    """Sizes by the rules of torch's documentation: small blocks from 2 MiB, up to 10 MiB from 20, larger ones alone."""
    result = on_standin(_allocated)
    assert result["allocated"] == 1 * MIB + 3 * MIB + 30 * MIB + 1024
    assert result["reserved"] == [52 * MIB, 52 * MIB, 22 * MIB]
    assert result["free"] == 24 * GIB - GIB // 2 - 22 * MIB
    # A block of 30 MiB is left when 5 of it are used: another 30 do not fit into the rest.
    assert result["split"] == [30 * MIB, 60 * MIB]


def _allocated(device: Device) -> dict[str, Any]:
    import torch

    def block(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cuda")

    small, middle, large, tiny = block(MIB), block(3 * MIB), block(30 * MIB), block(1000)
    allocated, reserved = torch.cuda.memory_allocated(), [torch.cuda.memory_reserved()]
    del large
    reserved.append(torch.cuda.memory_reserved())
    torch.cuda.empty_cache()
    reserved.append(torch.cuda.memory_reserved())
    free = torch.cuda.mem_get_info()[0]
    del small, middle, tiny
    torch.cuda.empty_cache()
    first = block(30 * MIB)
    del first
    part = block(15 * MIB)
    split = [torch.cuda.memory_reserved()]
    again = block(30 * MIB)
    split.append(torch.cuda.memory_reserved())
    del part, again
    return {"allocated": allocated, "reserved": reserved, "free": free, "split": split}


def test_expandable_segments_leave_no_holes_and_a_limit_is_kept() -> None:
    result = on_standin(_expanded, is_expandable=True, total_gib=0.6)
    # 15 of 30 MiB are used: 15 are free there and 15 more are mapped, in pages of 20 MiB.
    assert result["reserved"] == [40 * MIB, 60 * MIB]
    assert "CUDA out of memory" in result["error"]
    assert result["after"] <= result["limit"] < result["wanted"]


def _expanded(device: Device) -> dict[str, Any]:
    import torch

    def block(size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cuda")

    first = block(30 * MIB)
    del first
    part = block(15 * MIB)
    reserved = [torch.cuda.memory_reserved()]
    again = block(30 * MIB)
    reserved.append(torch.cuda.memory_reserved())
    limit = device.total - GIB // 2
    wanted = torch.cuda.memory_allocated() + 80 * MIB
    error = _error(lambda: block(80 * MIB))
    del part, again
    return {
        "reserved": reserved,
        "error": error,
        "after": torch.cuda.memory_reserved(),
        "limit": limit,
        "wanted": wanted,
    }


def test_shape_mode_holds_models_of_any_size() -> None:
    result = on_standin(_shapes, is_shape_mode=True, total_gib=80.0)
    assert result["shape"] == [4096, 11008]
    # The product's operand and result, and query, output and three gradients of the attention.
    assert result["peak"] >= 2 * 4096 * (4096 + 11008) + 5 * 2 * 32 * 4096 * 128
    assert result["kernels"] >= 4


def _shapes(device: Device) -> dict[str, Any]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    x = torch.empty(4096, 4096, dtype=torch.bfloat16, device="cuda")
    y = x @ torch.empty(4096, 11008, dtype=torch.bfloat16, device="cuda")
    query = torch.randn(1, 32, 4096, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
    return {"shape": list(y.shape), "peak": device.peak_allocated, "kernels": device.kernels}
