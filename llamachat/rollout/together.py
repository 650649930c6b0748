"""Completions of several processes that work together: the prompts are dealt out, all completions are in every process.

What a prompt is answered belongs to its place in the whole list, so it is the same however many processes there are.
"""

from collections.abc import Sequence

from llamachat import distributed
from llamachat.rollout.engine import Completion, RolloutEngine, Sampling


def generate(
    engine: RolloutEngine, prompts: Sequence[Sequence[int]], *, samples_per_prompt: int, sampling: Sampling
) -> list[list[Completion]]:
    """As `engine.generate`, each process doing its part."""

    def mine(part: list[int]) -> list[list[Completion]]:
        of = [prompts[number] for number in part]
        return engine.generate(of, samples_per_prompt=samples_per_prompt, sampling=sampling, numbers=part)

    return distributed.scatter_map(range(len(prompts)), mine)
