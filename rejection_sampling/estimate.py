"""What a round of rejection sampling would cost: memory of its worst phase by part, seconds. Reads no data and no weights.

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
    cache_bytes,
    decoder_bytes,
    role_bank_bytes,
)
from rejection_sampling.config import Config


@dataclass(frozen=True, slots=True)
class Workload:
    """What the planner knows of one round."""

    shape: Shape
    base: Base
    tuning: Tuning
    rollout: Rollout
    prompts: int | None  # of the training side, None where they were not counted
    tuned: Estimate  # the tuning on the winners
    sharing: int = 0  # reward models that are one more adapter
    beside: Mapping[str, Beside] = field(default_factory=dict)  # reward models on other trunks, by name
    gpu: Gpu | None = None  # None for two CPU cores


def num_winners(config: Config, prompts: int | None) -> int | None:
    """Dialogs that are learnt if each prompt has a winner; earlier rounds' come on top."""
    return prompts if config.prompts is None else min(config.prompts, config.prompts if prompts is None else prompts)


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of the round, seconds of its sampling, scoring and tuning, and optimizer steps of the tuning."""
    sampling = sampling_memory(work)
    memory = max(sampling, work.tuned.memory, key=lambda parts: sum(parts.values()))
    winners = num_winners(config, work.prompts)
    if winners is None:
        return Estimate(memory)
    answers = (winners + config.validation_prompts) * config.samples_per_prompt + 2 * config.test_prompts
    answers += len(config.sweep_temperatures) * config.sweep_prompts * config.sweep_samples
    per_answer = min(float(work.base.max_tokens), PROMPT_TOKENS + work.rollout.max_new_tokens)
    # A forward pass is a third of a training's; each reward model is one.
    passes = (work.sharing + len(work.beside)) / 3
    passes += DECODING_SLOWDOWN * work.rollout.max_new_tokens / per_answer / 3
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
    held["keys and values of the rollout"] = cache_bytes(work.shape, work.base, work.rollout)
    copy = decoder_bytes(work.shape, work.base, work.rollout, work.gpu, held=sum(held.values()))
    held["rollout's copy of the projections"] = copy
    return held
