"""Answers sampled from the policy as it is now, through whatever engine there is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamachat.chat_format import ChatFormat
from llamachat.data.prompts import EncodedPrompt
from llamachat.rollout.engine import RolloutEngine, Sampling, scatter_generate

if TYPE_CHECKING:
    from llamachat.config.sections import Rollout
    from llamachat.models.roles import RoleBank
    from llamachat.rollout.engine import LocalEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """An answer to a prompt: its ids, EOS among them where it is finished, and its text."""

    prompt: EncodedPrompt
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # by the engine; training takes its own
    is_finished: bool
    text: str


def open_engine(bank: "RoleBank", rollout: "Rollout") -> "LocalEngine":
    """What samples from the bank's policy: the recipe's engine."""
    from llamachat import rollout as engines

    return engines.open_engine(bank.policy_model(), bank.chat_format, rollout)


def sample(
    engine: RolloutEngine,
    chat_format: ChatFormat,
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    *,
    samples_per_prompt: int = 1,
) -> list[Response]:
    """The answers to each prompt side by side, in the order of the prompts; several processes share the work."""
    ids = [prompt.ids for prompt in prompts]
    found = scatter_generate(engine, ids, samples_per_prompt=samples_per_prompt, sampling=sampling)
    return [
        Response(
            prompt=prompt,
            ids=completion.token_ids,
            logprobs=completion.logprobs,
            is_finished=completion.is_finished,
            text=chat_format.decode_answer(completion.token_ids),
        )
        for prompt, group in zip(prompts, found, strict=True)
        for completion in group
    ]


def refresh(engine: "LocalEngine", bank: "RoleBank") -> None:
    """Let the engine take the policy's weights as they are now."""
    engine.refresh(bank.policy_model())
