"""What a reward model's training would cost: memory by part, optimizer steps, seconds. Reads no data and no weights.

As for supervised tuning, less the logits: a reward model reads one position of each answer. Its longest forward pass is
one pair, both answers of `base.max_tokens`. Nothing here was measured on a GPU; `plan` calls it an estimate.
"""

import math
from dataclasses import dataclass

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Tuning
from llamachat.memory.estimates import LOADED, Estimate, Shape, training_memory, training_time
from reward.config import Config

CPU_ROW_TOKENS = 2048  # as reward/train.py has it (which imports torch)


@dataclass(frozen=True, slots=True)
class Workload:
    """What the planner knows of one reward model."""

    shape: Shape
    base: Base
    tuning: Tuning
    pairs: int | None  # that its mix has in one epoch, None where they were not counted
    tokens_per_pair: float = 600.0  # of both answers, each with the prompt
    gpu: Gpu | None = None  # None for two CPU cores


def longest_row(config: Config, base: Base, gpu: Gpu | None) -> int:
    """Tokens of the longest forward pass: a row, or the longest pair."""
    auto = CPU_ROW_TOKENS if gpu is None else 0
    return max(auto if config.row_tokens == "auto" else config.row_tokens, 2 * base.max_tokens)


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of an optimizer step, and seconds on the card, or on two CPU cores without one."""
    memory = training_memory(
        work.shape.headless(),
        work.base,
        work.tuning,
        tokens=longest_row(config, work.base, work.gpu),
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        gpu=work.gpu,
        logits=0,
        is_eager=work.gpu is None,  # a CPU attends a sequence at a time, without a fused kernel
    )
    if work.pairs is None:
        return Estimate(memory, loaded=LOADED)
    steps = math.ceil(max(1, int(work.pairs * config.epochs + 0.5)) / config.pairs_per_step)
    seconds, assumed = training_time(
        work.shape.weights - work.shape.embedding_weights,
        work.tuning,
        tokens=work.pairs * config.epochs * work.tokens_per_pair,
        gradient_checkpointing=config.gradient_checkpointing,
        gpu=work.gpu,
        told=f"{work.tokens_per_pair:.0f} tokens a pair",
    )
    return Estimate(memory, seconds, steps, assumed, LOADED)
