"""What Ghost Attention would cost: memory of its worst phase by part, seconds. Reads no data and no weights.

Sampling and tuning follow each other; the larger of the two counts. Nothing here was measured on a GPU; `plan` calls it
an estimate.
"""

from dataclasses import dataclass, replace

from gatt.config import Config
from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Rollout, Tuning
from llamachat.models.estimates import BYTES, Estimate, Shape, training_time
from llamachat.models.role_bytes import DECODING_SLOWDOWN, cache_bytes, decoder_bytes, role_bank_bytes

TURN_TOKENS = 100.0  # of a user turn with its answer; ours, assumed


@dataclass(frozen=True, slots=True)
class Workload:
    """What the planner knows of one step."""

    shape: Shape
    base: Base
    tuning: Tuning
    rollout: Rollout
    tuned: Estimate  # the tuning on the dialogs
    gpu: Gpu | None = None  # None for two CPU cores


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak, seconds of sampling, measuring and tuning, and optimizer steps of the tuning."""
    width = BYTES[work.base.dtype]
    held = role_bank_bytes(work.shape, work.tuning, width=width, critic=None, is_continued=False, sharing=0, beside={})
    held["keys and values of the rollout"] = cache_bytes(work.shape, work.base, work.rollout)
    copy = decoder_bytes(work.shape, work.base, work.rollout, work.gpu, held=sum(held.values()))
    held["rollout's copy of the projections"] = copy
    memory = max(held, work.tuned.memory, key=lambda parts: sum(parts.values()))
    answers = config.dialogs * (2 + config.turns) / 2 * config.samples_per_turn
    answers += 3 * config.evaluation_dialogs * max(config.evaluation_turns)
    seconds, assumed = training_time(
        work.shape.weights,
        work.tuning,
        tokens=answers * TURN_TOKENS * DECODING_SLOWDOWN / 3,
        gradient_checkpointing=False,
        gpu=replace(work.gpu, count=1) if work.gpu else None,
        told=f"{TURN_TOKENS:.0f} tokens a turn, decoding at a quarter of training's speed",
    )
    return Estimate(memory, seconds + work.tuned.seconds, work.tuned.optimizer_steps, assumed)
