"""Answers sampled from a policy through a rollout engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from llamachat.chat_format import ChatFormat
from llamachat.data.prompts import EncodedPrompt
from llamachat.rollout.engine import RolloutEngine, Sampling, scatter_generate


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An answer to a prompt: its ids, including EOS if it is finished, and its text."""

    prompt: EncodedPrompt
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # by the engine; training computes its own
    is_finished: bool
    text: str
    is_closed: bool = True  # False for a finished one whose ids lack the space before EOS that training answers have


def sample(
    engine: RolloutEngine,
    chat_format: ChatFormat,
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    *,
    samples_per_prompt: int = 1,
) -> list[Response]:
    """The answers to each prompt, in the order of the prompts; several processes share the work."""
    ids, closing = [prompt.ids for prompt in prompts], tuple(chat_format.closing_ids)
    completions = scatter_generate(engine, ids, samples_per_prompt=samples_per_prompt, sampling=sampling)
    return [
        Response(
            prompt=prompt,
            ids=completion.token_ids,
            logprobs=completion.logprobs,
            is_finished=completion.is_finished,
            text=chat_format.decode_answer(completion.token_ids),
            is_closed=not completion.is_finished or completion.token_ids[-len(closing) :] == closing,
        )
        for prompt, group in zip(prompts, completions, strict=True)
        for completion in group
    ]
