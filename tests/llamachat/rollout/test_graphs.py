"""The recorded decode step: a recorder repeats it operation by operation, as a CUDA graph does, on the same tensors.

What Python decided when a step was recorded stays decided in it, so that a number that ought to come from a tensor
gives other answers than the plain step, which is the oracle.
"""

import logging
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from llamachat.rollout.decoder import LlamaEngine
from llamachat.rollout.engine import Completion, Sampling
from llamachat.rollout.graphs import MOST_RECORDINGS, Recordings, Step, padded_rows
from tests.tiny_llama import tiny_llama

STOPS = tuple(range(2, 22))
PLAIN = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=60, seed=3)
NUCLEUS = Sampling(temperature=1.3, top_p=0.9, max_new_tokens=40, seed=4, top_k=50)
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=40, seed=0)


class Recorder(TorchDispatchMode):
    """Writes down every operation on tensors, with what it was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "local_scalar" not in str(func) and "nonzero" not in str(func), "a graph cannot hand numbers to Python"
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class RecordedStep:
    """A capture as CUDA's: the step is not run by recording it, and Python has no part in its repetition."""

    def __init__(self) -> None:
        self.recorded = self.repeated = 0

    def __call__(self, step: Step) -> Step:
        self.recorded += 1
        with Recorder() as recorder:
            result = step()
        first = [True]

        def repeat() -> Tensor:
            self.repeated += 1
            if first[0]:  # recording on a CPU runs the step too: that counts as its first repetition
                first[0] = False
                return result
            replaced: dict[int, Tensor] = {}
            for func, args, kwargs, was in recorder.calls:
                args, kwargs = tree_map(
                    lambda x: replaced.get(id(x), x) if isinstance(x, Tensor) else x, (args, kwargs)
                )
                now = func(*args, **kwargs)
                for before, after in zip(tree_leaves(was), tree_leaves(now), strict=True):
                    if isinstance(before, Tensor):
                        replaced[id(before)] = after
            return replaced[id(result)]

        return repeat


def prompts_of(count: int, longest: int = 60) -> list[list[int]]:
    numbers = random.Random(0)
    return [[1, *(numbers.randrange(22, 420) for _ in range(numbers.randrange(longest)))] for _ in range(count)]


def sampled(prompts: list[list[int]], sampling: Sampling, **options: Any) -> list[list[Completion]]:
    engine = LlamaEngine(tiny_llama(max_position_embeddings=256), STOPS, **options)
    return engine.generate(prompts, samples_per_prompt=3, sampling=sampling)


def assert_alike(groups: list[list[Completion]], expected: list[list[Completion]]) -> None:
    """The same tokens, and log-probabilities up to the order of fp32 sums: products are of more rows when recorded."""
    for group, others in zip(groups, expected, strict=True):
        for completion, other in zip(group, others, strict=True):
            assert (completion.token_ids, completion.is_finished) == (other.token_ids, other.is_finished)
            assert completion.logprobs == pytest.approx(other.logprobs, abs=2e-5)


@pytest.mark.parametrize("sampling", [GREEDY, NUCLEUS, PLAIN])
def test_recorded_steps_say_what_plain_ones_say(sampling: Sampling) -> None:
    prompts, capture = prompts_of(40), RecordedStep()
    plain = sampled(prompts, sampling, rows_per_batch=24)
    assert_alike(sampled(prompts, sampling, rows_per_batch=24, capture=capture), plain)
    assert capture.repeated > 5 * capture.recorded > 0
    tight = RecordedStep()
    assert_alike(sampled(prompts, sampling, capture=tight, cache_gib=500 * 1024 / 2**30), plain)
    assert tight.repeated > tight.recorded


def test_a_stream_is_recorded_too() -> None:
    seen, capture = list[int](), RecordedStep()
    engine = LlamaEngine(tiny_llama(), (), capture=capture)
    streamed = engine.stream([1, 90, 91], sampling=PLAIN, on_token=seen.append)
    plain = LlamaEngine(tiny_llama(), ()).generate([[1, 90, 91]], samples_per_prompt=1, sampling=PLAIN)
    assert_alike([[streamed]], plain)
    assert tuple(seen) == streamed.token_ids
    assert capture.recorded == 1


def test_a_capture_that_fails_is_reported_once_and_the_steps_run_plainly(caplog: pytest.LogCaptureFixture) -> None:
    def fail(step: Step) -> Step:
        raise RuntimeError("operation not permitted when stream is capturing")

    with caplog.at_level(logging.WARNING):
        assert_alike(sampled(prompts_of(10), PLAIN, capture=fail), sampled(prompts_of(10), PLAIN))
    (message,) = caplog.messages
    assert "runs without one, more slowly: operation not permitted" in message


def test_a_shape_is_recorded_when_it_comes_again_and_the_oldest_is_dropped() -> None:
    ran: list[tuple[str, int]] = []

    def capture(step: Step) -> Step:
        number = int(step())
        ran[-1] = ("recorded", number)
        return lambda: ran.append(("repeated", number)) or torch.tensor(number)

    def step(number: int) -> Step:
        return lambda: ran.append(("plain", number)) or torch.tensor(number)

    recordings = Recordings(capture)
    for _ in range(3):
        recordings.run("a", step(1))
    assert ran == [("plain", 1), ("recorded", 1), ("repeated", 1), ("repeated", 1)]
    for number in range(2, MOST_RECORDINGS + 2):
        recordings.run(number, step(number))
        recordings.run(number, step(number))
    ran.clear()
    recordings.run("a", step(1))
    assert ran == [("plain", 1)], "its recording is gone"


def test_shapes_are_few() -> None:
    assert [padded_rows(used, 24) for used in (1, 2, 3, 5, 16, 17, 24)] == [1, 2, 4, 8, 16, 24, 24]
