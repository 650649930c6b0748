"""What supervised fine-tuning would cost: memory by part, optimizer steps, seconds. Reads no data and no weights."""

import math
from dataclasses import dataclass

from llamachat.config.sections import Base, Tuning
from llamachat.models.estimates import BYTES, CPU_FLOPS, Estimate, Shape
from sft.config import Config


@dataclass(frozen=True, slots=True)
class Workload:
    """What the planner knows of one SFT step."""

    shape: Shape
    base: Base
    tuning: Tuning
    dialogs: int | None  # training dialogs, None where they were not counted
    tokens_per_dialog: float = 200.0


def estimate(config: Config, shape: Workload) -> Estimate:
    """Bytes at the peak of an optimizer step, and seconds on two CPU cores."""
    model, tuning = shape.shape, shape.tuning
    width = BYTES[shape.base.dtype]
    trained = model.weights if tuning.method == "full" else model.adapter_weights(tuning.rank)
    rows = 1 if config.packing else config.rows_per_microbatch
    tokens = rows * shape.base.max_tokens
    # Of each block its input alone with checkpointing, else about 14 tensors of the width and 3 of the SwiGLU's.
    per_token = (
        model.hidden_size if config.gradient_checkpointing else 14 * model.hidden_size + 3 * model.intermediate_size
    )
    memory = {
        "base weights": model.weights * width if tuning.method != "qlora" else round(model.weights * 0.55),
        "trained weights": 0 if tuning.method == "full" else trained * width,
        "gradients": trained * width,
        "optimizer (fp32 masters and two moments)": trained * (8 if width == 4 else 12),
        "activations": tokens * model.layers * per_token * width + tokens * model.vocabulary * 4,
    }
    if shape.dialogs is None:
        return Estimate(memory)
    examples = max(1, int(shape.dialogs * config.epochs + 0.5))
    steps = math.ceil(examples / config.examples_per_step)
    flops = 6.0 * model.weights * shape.dialogs * config.epochs * shape.tokens_per_dialog
    return Estimate(memory, flops / CPU_FLOPS, steps)
