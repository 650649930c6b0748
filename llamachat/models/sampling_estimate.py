"""What a step would cost that samples answers, scores them and tunes on some: memory of its worst phase, seconds.

Sampling and tuning follow each other, and what the one held is given back before the other: the larger of the two
counts. Nothing here was measured on a GPU; `plan` calls it an estimate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Rollout, Tuning
from llamachat.models.estimates import BYTES, Estimate, Shape, training_time
from llamachat.models.role_bytes import (
    DECODING_SLOWDOWN,
    PROMPT_TOKENS,
    Beside,
    role_bank_bytes,
    rollout_bytes,
)


@dataclass(frozen=True, slots=True)
class Workload:
    """What the planner knows of one such step."""

    shape: Shape
    base: Base
    tuning: Tuning
    rollout: Rollout
    prompts: int | None  # of the training side, None where they were not counted
    tuned: Estimate  # the tuning on the answers that are chosen
    sharing: int = 0  # reward models that are one more adapter
    beside: Mapping[str, Beside] = field(default_factory=dict)  # reward models on other trunks, by name
    gpu: Gpu | None = None  # None for two CPU cores
    answers: int | None = None  # that are sampled at once at most; None for as many as the engine takes


def asked_prompts(most: int | None, prompts: int | None) -> int | None:
    """How many prompts are asked of those that there are, with a limit to them; None where neither is known."""
    return min((count for count in (most, prompts) if count is not None), default=None)


def sampling_estimate(work: Workload, *, answers: int | None, tokens: float | None = None) -> Estimate:
    """Bytes at the peak, seconds of sampling, scoring and tuning, and optimizer steps of the tuning.

    `tokens` are those of a prompt with its answer; None is what all steps assume.
    """
    memory = max(sampling_memory(work), work.tuned.memory, key=lambda parts: sum(parts.values()))
    if answers is None:
        return Estimate(memory)
    longest = float(work.base.max_tokens)
    per_answer = min(longest, tokens or PROMPT_TOKENS + work.rollout.max_new_tokens)
    # A forward pass is a third of a training's; each reward model is one.
    passes = (work.sharing + len(work.beside)) / 3
    passes += DECODING_SLOWDOWN * min(1.0, work.rollout.max_new_tokens / per_answer) / 3
    seconds, assumed = training_time(
        work.shape.weights,
        work.tuning,
        tokens=answers * per_answer * passes,
        gradient_checkpointing=False,
        gpu=replace(work.gpu, count=1) if work.gpu else None,
        told=f"{per_answer:.0f} tokens a prompt with its answer, decoding at a quarter of training's speed",
    )
    return Estimate(memory, seconds + work.tuned.seconds, work.tuned.optimizer_steps, assumed)


def sampling_memory(work: Workload) -> dict[str, int]:
    """Bytes on the card while answers are sampled and scored."""
    width = BYTES[work.base.dtype]
    held = role_bank_bytes(
        work.shape,
        work.tuning,
        width=width,
        critic=None,
        is_continued=False,
        sharing=work.sharing,
        beside=work.beside,
    )
    return held | rollout_bytes(
        work.shape,
        work.base,
        work.rollout,
        work.gpu,
        held=sum(held.values()),
        shares_plain=work.tuning.method == "full",
        answers=work.answers,
    )
