"""What supervised fine-tuning would cost: memory by part, optimizer steps, seconds. Reads no data and no weights.

The memory is that of one card at the worst moment of an optimizer step. Nothing here was measured on a GPU; what is
counted is said beside it, and `plan` calls it an estimate.
"""

import math
from dataclasses import dataclass

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Tuning
from llamachat.memory.estimates import (
    BASE_WEIGHTS,
    BYTES,
    LOADED,
    OPTIMIZER,
    Estimate,
    Shape,
    training_memory,
    training_time,
)
from sft.config import Config

TOKENS_PER_CHUNK = 2048  # of logits, as sft/loss.py has it (which imports torch)
# A logit in fp32, its logarithm and its gradient, together for a moment; on a GPU TRL's fused head never has the last two.
LOGIT_BYTES, FUSED_LOGIT_BYTES = 12, 10


@dataclass(frozen=True, slots=True)
class Workload:
    """What the planner knows of one SFT step."""

    shape: Shape
    base: Base
    tuning: Tuning
    dialogs: int | None  # training dialogs, None where they were not counted
    tokens_per_dialog: float = 200.0
    gpu: Gpu | None = None  # None for two CPU cores


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of an optimizer step, and seconds on the card, or on two CPU cores without one."""
    tokens = (1 if config.packing else config.rows_per_microbatch) * work.base.max_tokens
    memory = training_memory(
        work.shape,
        work.base,
        work.tuning,
        tokens=tokens,
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        logits=min(tokens, TOKENS_PER_CHUNK) * work.shape.vocabulary * (FUSED_LOGIT_BYTES if work.gpu else LOGIT_BYTES),
        gpu=work.gpu,
    )
    if work.gpu and work.gpu.count > 1 and work.tuning.method == "full" and config.sample_prompts:
        memory = _sampling_if_worse(memory, work.shape.weights * BYTES[work.base.dtype])
    if work.dialogs is None:
        return Estimate(memory, loaded=LOADED)
    examples = max(1, int(work.dialogs * config.epochs + 0.5))
    seconds, assumed = training_time(
        work.shape.weights,
        work.tuning,
        tokens=work.dialogs * config.epochs * work.tokens_per_dialog,
        gradient_checkpointing=config.gradient_checkpointing,
        gpu=work.gpu,
        told=f"{work.tokens_per_dialog:.0f} tokens a dialog",
    )
    return Estimate(memory, seconds, math.ceil(examples / config.examples_per_step), assumed, LOADED)


def _sampling_if_worse(training: dict[str, int], whole: int) -> dict[str, int]:
    """Of weights that are cut over cards: answers are sampled from them gathered whole, beside the optimizer alone."""
    kept = {name: training[name] for name in (BASE_WEIGHTS, OPTIMIZER)}
    sampling = kept | {"weights gathered to sample": whole}
    return max(training, sampling, key=lambda parts: sum(parts.values()))
