"""What a step would cost that samples answers, scores them and tunes on some: memory of its worst phase, seconds.

Sampling and tuning follow each other, and what the one held is given back before the other: the larger of the two
counts. Nothing here was measured on a GPU; `plan` calls it an estimate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Rollout, Tuning
from llamachat.memory.estimates import BYTES, Estimate, Shape, forward_time
from llamachat.memory.role_bytes import (
    DECODING_SLOWDOWN,
    ROLLOUT_PARTS,
    Beside,
    Lengths,
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
    lengths: Lengths = field(default_factory=Lengths)


def asked_prompts(most: int | None, prompts: int | None) -> int | None:
    """How many prompts are asked of those that there are, with a limit to them; None where neither is known."""
    return min((count for count in (most, prompts) if count is not None), default=None)


def sampling_estimate(work: Workload, *, answers: int | None, samples_per_prompt: int = 1) -> Estimate:
    """Bytes at the peak, seconds of sampling, scoring and tuning, and optimizer steps of the tuning."""
    held = sampling_memory(work)
    worst = Estimate(held, loaded=frozenset(held) - frozenset(ROLLOUT_PARTS))
    worst = max(worst, work.tuned, key=lambda estimate: estimate.peak_bytes)
    if answers is None:
        return Estimate(worst.memory, loaded=worst.loaded)
    prompt, answer = work.lengths.of(work.base, work.rollout)
    # Forward passes: of a prompt once for all its answers, of each answer's tokens, of both by each reward model.
    generated = (prompt / samples_per_prompt + DECODING_SLOWDOWN * answer) * work.shape.weights
    scored = (work.sharing + len(work.beside)) * (prompt + answer) * work.shape.block_weights
    seconds, assumed = forward_time(
        answers * (generated + scored), work.tuning, gpu=work.gpu, told=work.lengths.told(work.base, work.rollout)
    )
    return Estimate(worst.memory, seconds + work.tuned.seconds, work.tuned.optimizer_steps, assumed, worst.loaded)


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
