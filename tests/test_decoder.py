"""Our decoder: the oracles are the Hugging Face engine, teacher-forced forwards of the model, and counted frequencies."""

import random

import pytest

from llamachat.rollout.decoder import LlamaEngine
from llamachat.rollout.engine import Completion, Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from tests.tiny_llama import tiny_llama

STOPS = tuple(range(2, 22))  # of 420 ids: some answers end early, some do not
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=12, seed=0)
RANDOM = Sampling(temperature=1.3, top_p=0.9, max_new_tokens=12, seed=7)


def random_prompts(count: int, *, longest: int = 90, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[1, *(numbers.randrange(22, 420) for _ in range(numbers.randrange(longest)))] for _ in range(count)]


def ids_of(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, Sampling(1.0, 1.0, 30, 3)])
def test_both_engines_say_the_same(sampling: Sampling) -> None:
    model = tiny_llama()
    prompts = random_prompts(200)
    expected = HuggingFaceEngine(model, STOPS, 0).generate(prompts, samples_per_prompt=1, sampling=sampling)
    found = LlamaEngine(model, STOPS).generate(prompts, samples_per_prompt=1, sampling=sampling)
    assert ids_of(found) == ids_of(expected)
