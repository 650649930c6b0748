"""The decoder on the device: its answers are the CPU's, recorded as graphs or not."""

import random
from typing import Any

from tests.cuda_standin.device import Device
from tests.cuda_standin.process import on_standin

STOPS = tuple(range(2, 22))
SAMPLINGS = {
    "plain": {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 24},
    "nucleus": {"temperature": 1.3, "top_p": 0.9, "max_new_tokens": 24, "top_k": 50},
    "greedy": {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 24},
}


def _prompts(count: int) -> list[list[int]]:
    numbers = random.Random(0)
    return [[1, *(numbers.randrange(22, 420) for _ in range(numbers.randrange(40)))] for _ in range(count)]


def test_merged_weights_decode_in_graphs_what_they_decode_on_a_cpu() -> None:
    result = on_standin(_merged)
    for name, counts in result.items():
        assert counts["same"] == counts["answers"] == 24, name
        assert counts["gap"] < 1e-5, name
        assert counts["replays"] > 0, name


def _merged(device: Device) -> dict[str, Any]:
    from llamachat.rollout.decoder import LlamaEngine
    from llamachat.rollout.engine import Sampling
    from tests.tiny_llama import tiny_llama

    result = {}
    models: list[Any] = [tiny_llama(), tiny_llama()]
    places = ("cpu", "cuda")
    engines = [
        LlamaEngine(model.to(place), STOPS, rows_per_batch=8) for model, place in zip(models, places, strict=True)
    ]
    for name, values in SAMPLINGS.items():
        sampling = Sampling(seed=3, **values)
        device.reset_statistics()
        expected, actual = (e.generate(_prompts(8), samples_per_prompt=3, sampling=sampling) for e in engines)
        pairs = [pair for rows in zip(expected, actual, strict=True) for pair in zip(*rows, strict=True)]
        same = [(a, b) for a, b in pairs if a.token_ids == b.token_ids]
        result[name] = {
            "answers": len(pairs),
            "same": len(same),
            "gap": max(abs(x - y) for a, b in same for x, y in zip(a.logprobs, b.logprobs, strict=True)),
            "replays": device.statistics()["replays"],
        }
    return result
