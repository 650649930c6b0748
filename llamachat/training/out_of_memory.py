"""Training that runs out of device memory continues with smaller micro-batches.

An optimizer step is a fixed set of examples, so the size of a micro-batch affects memory and speed but not the result.
A training loop wraps the forward and backward of one micro-batch in `in_room` and itself in `halving`.
"""

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from llamachat.errors import DeviceMemoryError, first_line

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Parts = TypeVar("Parts")


class MicrobatchTooLargeError(Exception):
    """Memory ran out in a forward or backward pass: weights and optimizer are those of the last finished step."""


def in_room(work: Callable[[], Result]) -> Result:
    """`work()`; if memory runs out in it, raises a `MicrobatchTooLargeError` that keeps none of its tensors alive.

    With several processes the original error is raised: the others wait in the middle of the same step.
    """
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return work()
    try:
        return work()
    except torch.OutOfMemoryError as error:
        reason = first_line(error)
    # Outside the handler: an error raised inside it would keep the failed one, its frames, and so the activations.
    raise MicrobatchTooLargeError(reason)


def halving(
    parts: Parts,
    *,
    train: Callable[[Parts], None],
    halve: Callable[[Parts], Parts | None],
    step: str,
    section: str,
    unit: str,
) -> Parts:
    """`train(parts)`, repeated with `halve(parts)` as long as its micro-batches do not fit; returns the parts that
    fitted.

    `train` continues from its last finished optimizer step; `halve` logs the new size, and returns None if it cannot
    be made smaller. `section` is the stage's key in the recipe, `unit` is what cannot be split (a dialog).
    """
    while True:
        try:
            train(parts)
            return parts
        except MicrobatchTooLargeError as error:
            reason = str(error)
        except torch.OutOfMemoryError as error:
            reason = first_line(error)
            raise DeviceMemoryError(
                f"{step}: the device ran out of memory where a smaller micro-batch does not help ({reason}): in the optimizer, "
                "in an evaluation, while sampling, or on one of several GPUs. Weights, moments and activations must "
                f"all fit. Set tuning.method to qlora, {section}.optimizer to paged_adamw_8bit, or a smaller base.max_tokens."
            ) from None
        gc.collect()  # the failed trainer is a reference cycle, and keeps the old optimizer alive
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = halve(parts)
        if smaller is None:
            raise DeviceMemoryError(
                f"{step}: the device has too little memory for a single {unit} ({reason}). A {unit} is never split, so its "
                f"forward and backward must fit. Set {section}.gradient_checkpointing=true, tuning.method to qlora, or a "
                "smaller base.max_tokens."
            )
        parts = smaller


def warn_of_halving(step: str, key: str, before: int, after: int, *, unit: str) -> None:
    """Log that the micro-batches of a key of the recipe become smaller, and how to start with that size."""
    log.warning(
        "%s: the device has too little memory for a forward and backward pass with %s %d. Resuming from the last "
        "optimizer step with %d; the %ss of each step stay the same. Set %s=%d to start with that size.",
        step,
        key,
        before,
        after,
        unit,
        key,
        after,
    )
