"""Sampling on the device: 4-bit projections, recordings, memory for keys and values, waits and launches of a decode step."""

import random
from itertools import pairwise
from pathlib import Path
from statistics import mode
from typing import Any

from tests.cuda_standin.device import Device
from tests.cuda_standin.process import on_standin

MIB = 2**20


def _prompts(count: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [[1, *(numbers.randrange(22, 420) for _ in range(numbers.randrange(40)))] for _ in range(count)]


def _policy(folder: Path, *, layers: int = 2, device: str = "auto") -> Any:
    """A tiny 4-bit model with an adapter that matters."""
    from llamachat.config.sections import Tuning
    from llamachat.models.loading import attach_adapter, load_base
    from tests.tiny_llama import base_section, move_adapter, tiny_llama

    if not folder.exists():
        tiny_llama(num_hidden_layers=layers).bfloat16().save_pretrained(folder)
    model = load_base(base_section(folder, dtype="bfloat16"), device=device, is_nf4=True)
    model = attach_adapter(model, Tuning(method="qlora", rank=4, alpha=8), seed=0).eval().requires_grad_(False)
    move_adapter(model)
    return model


def test_stacked_4bit_projections_multiply_as_unpacked_ones_with_their_adapters(tmp_path: Path) -> None:
    result = on_standin(_products, tmp_path)
    for gap, added_gap, size in result["products"]:
        assert gap < 0.01 * size  # bf16
        assert added_gap < 0.01 * size
    assert result["kept"] == 0, "the stack is the model's memory, no copy"
    assert result["again"] == 0, "a second decoder stacks nothing"


def _products(device: Device, folder: str) -> dict[str, Any]:
    import torch
    from bitsandbytes.functional import dequantize_4bit

    from llamachat.rollout.weights import Packed, Weights, without_wrapper

    model = _policy(Path(folder) / "base")
    attention, mlp = (getattr(without_wrapper(model).model.layers[0], name) for name in ("self_attn", "mlp"))
    groups = [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj]]
    groups += [[mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]

    def merged(module: Any) -> torch.Tensor:
        weight = module.base_layer.weight
        delta = module.lora_B["default"].weight.float() @ module.lora_A["default"].weight.float()
        return dequantize_4bit(weight.data, weight.quant_state).float() + 2.0 * delta  # alpha 8, rank 4

    expected = [torch.cat([merged(module) for module in group]) for group in groups]
    allocated_before = device.allocated
    weights = Weights(model, is_merged=False)
    stacks: list[Any] = [
        stack
        for layer in weights.layers
        for stack in (layer.query_key_value, layer.attention_out, layer.gate_up, layer.down)
    ]
    assert all(isinstance(stack, Packed) for stack in stacks)
    products = []
    for stack, weight_OI in zip(stacks[:4], expected, strict=True):  # the first layer's
        x_BI = torch.randn(5, weight_OI.shape[1]).bfloat16().to("cuda")
        y_BO = torch.randn(5, weight_OI.shape[0]).bfloat16().to("cuda")
        plain_BO = x_BI.float() @ weight_OI.T
        gap = (stack(x_BI).float() - plain_BO).abs().max()
        added_gap = (stack.added_to(y_BO, x_BI).float() - plain_BO - y_BO.float()).abs().max()
        products.append([gap.item(), added_gap.item(), plain_BO.abs().max().item()])
        del x_BI, y_BO, plain_BO, gap, added_gap
    own = [tensor.nbytes for stack in stacks for tensor in (stack.scales, stack.down_RD, stack.up_OR)]
    own += [norm.nbytes for norm in weights._norms]
    kept = device.allocated - allocated_before - sum(own)
    again: Any = Weights(model, is_merged=False)
    moved = [
        layer.gate_up.codes.data_ptr()
        for layer, before in zip(again.layers, stacks[2::4], strict=True)
        if layer.gate_up.codes.data_ptr() != before.codes.data_ptr()
    ]
    return {"products": products, "kept": kept // 4096, "again": len(moved)}


def test_a_4bit_policy_decodes_in_graphs_that_later_calls_repeat(tmp_path: Path) -> None:
    result = on_standin(_recorded, tmp_path)
    assert result["captures"] > 0
    assert result["recorded"] == result["plain"]
    assert result["captures of the second call"] == 0
    assert result["second"] == result["plain"]
    assert result["moved"] != result["plain"], "the adapter has moved"
    assert result["moved"] == result["moved, plain"], "a kept recording reads the refreshed adapter"
    assert result["hotter"] == result["hotter, plain"], "the temperature is part of a recording"
    assert result["released"] < result["held"], "the cache is kept until then"


def _recorded(device: Device, folder: str) -> dict[str, Any]:
    import torch

    from llamachat.rollout.decoder import LlamaEngine
    from llamachat.rollout.engine import Sampling

    model = _policy(Path(folder) / "base")
    engine = LlamaEngine(model, (), is_merged=False)
    plain = LlamaEngine(model, (), is_merged=False, capture=lambda step: step)

    def sampled(sampler: LlamaEngine, temperature: float = 1.0, seed: int = 3) -> list[Any]:
        sampling = Sampling(temperature=temperature, top_p=1.0, max_new_tokens=12, seed=seed)
        groups = sampler.generate(_prompts(6), samples_per_prompt=2, sampling=sampling)
        return [answer.token_ids for group in groups for answer in group]

    def captures() -> int:
        return device.statistics()["waits"].get("capture of a graph", 0)

    result: dict[str, Any] = {"plain": sampled(plain), "recorded": sampled(engine)}
    result["captures"] = before = captures()
    result["second"] = sampled(engine)
    result["captures of the second call"] = captures() - before
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.mul_(-3.0)
    for sampler in (engine, plain):
        sampler.refresh(model)
    result["moved"], result["hotter"] = sampled(engine), sampled(engine, 2.0)
    result["held"] = device.allocated
    engine.release()
    result["released"] = device.allocated
    result["moved, plain"], result["hotter, plain"] = sampled(plain), sampled(plain, 2.0)
    return result


def test_a_decode_step_waits_at_most_twice_and_launches_few_kernels(tmp_path: Path) -> None:
    result = on_standin(_steps, tmp_path)
    for name, steps in result.items():
        assert max(waits for _, waits, _, _ in steps) <= 2, name
        assert any(done and waits == 2 for _, waits, done, _ in steps), f"{name}: answers end"
        assert any(rows < before for (*_, before), (*_, rows) in pairwise(steps)), "rows close up"
    # Of most steps: rows that close up are moved by a few more in each layer.
    launches = {layers: mode(kernels for kernels, *_ in result[f"{layers} layers, plain"]) for layers in (2, 4)}
    per_layer = (launches[4] - launches[2]) / 2
    assert launches[2] + 30 * per_layer < 1000, f"32 layers, as Llama-2 7B has: {launches}"
    # Answers that end are collected by a few more, and rows that close up.
    assert min(kernels for kernels, _, done, _ in result["2 layers, recorded"] if not done) <= 4


def _steps(device: Device, folder: str) -> dict[str, Any]:
    from llamachat.rollout.decoder import LlamaEngine
    from llamachat.rollout.engine import Sampling
    from llamachat.rollout.live_rows import LiveRows

    plain_step = LiveRows.step
    steps: list[tuple[int, int, int, int]] = []

    def step(self: LiveRows) -> Any:
        device.reset_statistics()
        done = plain_step(self)
        waits = device.statistics()["waits"]
        waits.pop("capture of a graph", None)
        steps.append((device.kernels, sum(waits.values()), len(done), self.live))
        return done

    LiveRows.step = step  # type: ignore[method-assign]
    result = {}
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24, seed=3)
    for layers in (2, 4):
        model = _policy(Path(folder) / f"{layers}", layers=layers)
        # Answers end at any of these tokens, so that they end at different steps.
        for name, capture in (("plain", lambda step: step), ("recorded", None)):
            engine = LlamaEngine(model, range(0, 420, 30), is_merged=False, capture=capture)
            for _ in range(2):
                steps = []
                engine.generate(_prompts(8), samples_per_prompt=3, sampling=sampling)
            engine.release()
            result[f"{layers} layers, {name}"] = steps
    return result


def test_memory_that_the_allocator_keeps_counts_as_free_for_keys_and_values() -> None:
    first, second, third = on_standin(_rooms, total_gib=0.75)
    assert first > 64 * MIB
    assert second > 0.95 * first, "after the pool was given back"
    assert third > 0.95 * first


def _rooms(device: Device) -> list[int]:
    from llamachat.rollout.decoder import LlamaEngine
    from llamachat.rollout.engine import Sampling
    from tests.tiny_llama import tiny_llama

    model: Any = tiny_llama(max_position_embeddings=2048)
    engine = LlamaEngine(model.to("cuda"), range(420))  # every answer ends at once
    rooms = []
    for temperature in (1.0, 0.9, 0.8):  # the recordings of one do not serve the others
        device.reset_peaks()
        before = device.allocated
        sampling = Sampling(temperature=temperature, top_p=1.0, max_new_tokens=1900, seed=0)
        engine.generate(_prompts(256), samples_per_prompt=2, sampling=sampling)
        rooms.append(device.peak_allocated - before)
        engine.release()
    return rooms


def test_fp32_on_a_gpu_attends_in_fp32() -> None:
    assert on_standin(_kept_in) == {"cpu": "torch.float64", "cuda": "torch.float32"}


def _kept_in(device: Device) -> dict[str, str]:
    from llamachat.rollout.decoder import LlamaEngine
    from tests.tiny_llama import tiny_llama

    model: Any = tiny_llama()
    return {place: str(LlamaEngine(model.to(place), ())._network.shape.dtype) for place in ("cpu", "cuda")}
