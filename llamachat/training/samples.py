"""Answers of a policy in training to the same held-out prompts, for people to read."""

from collections.abc import Sequence
from typing import Any

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.rollout.engine import RolloutEngine, Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from llamachat.tracking.tracker import Tracker

# Common values of temperature and nucleus, truncated well above the usual length of an answer.
WATCHED = Sampling(temperature=0.7, top_p=0.9, max_new_tokens=256, seed=0)


def record_samples(
    model: Any,
    chat_format: ChatFormat,
    prompts: Sequence[Sequence[Message]],
    tracker: Tracker,
    step: int,
    *,
    prefix: str,
) -> None:
    """Sample an answer to each prompt; log the texts, their mean length and the share that ends, under this prefix."""
    if not prompts:
        return
    engine = HuggingFaceEngine(model, chat_format.stop_ids, chat_format.tokenizer.pad_id)
    samples = sample_answers(engine, chat_format, prompts, sampling=WATCHED)
    tracker.samples(step, samples)
    tracker.log(
        step,
        {
            f"{prefix}/finished_fraction": sum(row["finished"] for row in samples) / len(samples),
            f"{prefix}/answer_tokens": sum(row["tokens"] for row in samples) / len(samples),
        },
    )


def sample_answers(
    engine: RolloutEngine, chat_format: ChatFormat, prompts: Sequence[Sequence[Message]], *, sampling: Sampling
) -> list[dict[str, Any]]:
    """One answer to each prompt, always with the same seed: two samples differ only by training."""
    encoded = [chat_format.encode_prompt(messages) for messages in prompts]
    groups = engine.generate(encoded, samples_per_prompt=1, sampling=sampling)
    return [
        {
            "prompt": "\n".join(f"{message.role}: {message.content}" for message in messages),
            "answer": chat_format.decode_answer(group[0].token_ids),
            "tokens": len(group[0].token_ids),
            "finished": group[0].is_finished,
        }
        for messages, group in zip(prompts, groups, strict=True)
    ]
