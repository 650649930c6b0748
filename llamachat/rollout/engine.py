"""The rollout engine protocol: token ids of prompts in, sampled token ids with their log-probabilities out.

A log-probability is that of the sampling distribution, after temperature, top-k and top-p. At temperature 0, which is
greedy, it is the model's own (temperature 1, all tokens).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from llamachat import distributed
from llamachat.errors import DataError, UsageError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import LlamaForCausalLM


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose the next token. The same seed and list of prompts give the same completions."""

    temperature: float  # 0 means greedy
    top_p: float  # sample from the most likely tokens that together reach this probability
    max_new_tokens: int
    seed: int
    top_k: int | None = None  # sample from the k most likely tokens, before top-p; None: from all

    def __post_init__(self) -> None:
        wrong = [
            f"{name} is {value}, and must be {required}"
            for name, value, required, is_right in (
                ("temperature", self.temperature, "0 (the likeliest token) or above", 0 <= self.temperature < 1e4),
                ("top-p", self.top_p, "above 0 and at most 1 (all tokens)", 0 < self.top_p <= 1),
                ("top-k", self.top_k, "at least 1, or left out (all tokens)", self.top_k is None or self.top_k >= 1),
                ("max-new-tokens", self.max_new_tokens, "at least 1", self.max_new_tokens >= 1),
                ("seed", self.seed, "0 or above", self.seed >= 0),
            )
            if not is_right
        ]
        if wrong:
            raise UsageError(f"Sampling: {'; '.join(wrong)}. Change the value.")


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer: its ids, including the stop id if it was reached, and a log-probability (nats) for each."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    is_finished: bool

    def __post_init__(self) -> None:
        assert len(self.token_ids) == len(self.logprobs), "every token was drawn with a probability"


class RolloutEngine(Protocol):
    """Samples answers from a model."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: Sampling,
        numbers: Sequence[int] | None = None,
    ) -> list[list[Completion]]:
        """`samples_per_prompt` completions of each prompt, in the order of the prompts.

        `numbers` are the prompts' indices in the full list, which together with the seed determine the samples; None if
        `prompts` is the full list.
        """
        ...


class LocalEngine(RolloutEngine, Protocol):
    """An engine in this process, with access to the model that it samples from."""

    @property
    def context(self) -> int:
        """The model's maximum number of positions, prompt and answer together."""
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: Sampling,
        numbers: Sequence[int] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """As `RolloutEngine.generate`, within the model's positions; `advance` gets the number of new completions."""
        ...

    def stream(self, prompt: Sequence[int], *, sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """The completion that `generate` returns for this single prompt; `on_token` gets each id immediately."""
        ...

    def refresh(self, model: "LlamaForCausalLM | PeftModel") -> None:
        """Use the model's current weights from now on."""

    def release(self) -> None:
        """Free the memory that is kept between calls."""


@runtime_checkable
class SleepingEngine(Protocol):
    """An engine that frees GPU memory between rollouts; all processes call these methods together."""

    def wake_up(self) -> None:
        """Prepare for `generate`."""

    def sleep(self) -> None:
        """Free what only `generate` needs."""


def scatter_generate(
    engine: RolloutEngine, prompts: Sequence[Sequence[int]], *, samples_per_prompt: int, sampling: Sampling
) -> list[list[Completion]]:
    """Distribute the prompts over the processes; each process returns all that `engine.generate` would return.

    A prompt's answers depend on its index in the full list, so they are the same for any number of processes.
    """

    def generate(part: list[int]) -> list[list[Completion]]:
        own = [prompts[number] for number in part]
        return engine.generate(own, samples_per_prompt=samples_per_prompt, sampling=sampling, numbers=part)

    if isinstance(engine, SleepingEngine):
        engine.wake_up()
    completions = distributed.scatter_map(range(len(prompts)), generate)
    if isinstance(engine, SleepingEngine):
        engine.sleep()
    return completions


def check_prompts(prompts: Sequence[Sequence[int]], numbers: Sequence[int], *, context: int) -> None:
    """Reject a prompt that leaves no position for an answer."""
    for number, prompt in zip(numbers, prompts, strict=True):
        assert prompt, "a prompt has at least its BOS"
        if len(prompt) >= context:
            raise DataError(
                f"prompt {number + 1}: {len(prompt)} tokens, but prompt and answer must fit into "
                f"the model's {context} positions. Shorten the prompt, or use a model with a longer context."
            )


@contextmanager
def evaluating(model: "nn.Module") -> Iterator[None]:
    """Disable the dropout of unmerged adapters within the block; restore it afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
