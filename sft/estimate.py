"""What supervised fine-tuning would cost: memory by part, optimizer steps, seconds. Reads no data and no weights.

The memory is that of one card at the worst moment of an optimizer step. Nothing here was measured on a GPU; what is
counted is said beside it, and `plan` calls it an estimate.
"""

import math
from dataclasses import dataclass

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Tuning
from llamachat.models.estimates import BYTES, CPU_FLOPS, Estimate, Shape
from sft.config import Config

# Model FLOPs utilization: share of a card's peak that the model's own arithmetic reaches. Checkpointing's recomputing comes
# on top, as time. Ours, assumed: no card has been measured. A 4-bit base unpacks each matrix before it is used.
ASSUMED_MFU = {"full": 0.40, "lora": 0.40, "qlora": 0.30}
TOKENS_PER_CHUNK = 2048  # of logits, as sft/loss.py has it (which imports torch)
LOGIT_BYTES = 10  # a logit in bf16, in fp32, and its logarithm or gradient


@dataclass(frozen=True, slots=True)
class Workload:
    """What the planner knows of one SFT step."""

    shape: Shape
    base: Base
    tuning: Tuning
    dialogs: int | None  # training dialogs, None where they were not counted
    tokens_per_dialog: float = 200.0
    gpu: Gpu | None = None  # None for two CPU cores

    @property
    def trained(self) -> int:
        """Weights that train."""
        if self.tuning.method == "full":
            return self.shape.weights
        targets = None if self.tuning.targets == "all-linear" else self.tuning.targets
        return self.shape.adapter_weights(self.tuning.rank, targets)


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of an optimizer step, and seconds on the card, or on two CPU cores without one."""
    memory = _memory(config, work)
    if work.dialogs is None:
        return Estimate(memory)
    examples = max(1, int(work.dialogs * config.epochs + 0.5))
    steps = math.ceil(examples / config.examples_per_step)
    seconds, assumed = _time(config, work)
    return Estimate(memory, seconds, steps, assumed)


def _memory(config: Config, work: Workload) -> dict[str, int]:
    shape, tuning, width = work.shape, work.tuning, BYTES[work.base.dtype]
    is_full, trained = tuning.method == "full", work.trained
    # FSDP cuts weights, gradients and optimizer over the cards; adapters are small, and every card has them whole.
    cards = work.gpu.count if work.gpu and is_full else 1
    tokens = (1 if config.packing else config.rows_per_microbatch) * work.base.max_tokens
    activations = tokens * _kept_per_token(config, work, width)
    logits = min(tokens, TOKENS_PER_CHUNK) * shape.vocabulary * LOGIT_BYTES
    moments = 8 if config.optimizer == "adamw" else 2  # bytes a weight: two in fp32, or two in 8 bits
    # Gradients in fp32 and AdamW's square roots live for the step alone, when no activation does.
    stepping = -(-trained * (8 if width < 4 else 4) // cards)
    return {
        "base weights": -(-shape.trunk_bytes(width, is_4bit=tuning.method == "qlora") // cards),
        "gathered blocks": (2 * shape.layer_weights + shape.embedding_weights) * width if cards > 1 else 0,
        "one unpacked matrix": max(a * b for a, b in shape.projections.values()) * width
        if tuning.method == "qlora"
        else 0,
        "trained weights": 0 if is_full else trained * width,
        "gradients": -(-trained * width // cards),
        "optimizer (fp32 masters and two moments)": -(-trained * (moments + (0 if width == 4 else 4)) // cards),
        "activations": activations,
        "logits of a chunk": logits,
        "the optimizer's step, beyond activations": max(0, stepping - activations - logits),
    }


def _kept_per_token(config: Config, work: Workload, width: int) -> int:
    """Bytes of activations a token: all blocks and the gradients in one, or their inputs and twice one block."""
    shape, tuning = work.shape, work.tuning
    is_full = tuning.method == "full"
    block = shape.block_activations(
        width,
        work.base.max_tokens,
        is_eager=work.base.attention == "eager",
        adapter_rank=None if is_full else tuning.rank,
    )
    if not is_full and tuning.dropout:  # each projection has an input of its own then, and a mask of bytes
        block += sum(inputs for inputs, _ in shape.projections.values()) * (width + 1)
    if config.gradient_checkpointing:
        return shape.layers * shape.hidden_size * width + 2 * block
    return (shape.layers + 1) * block


def _time(config: Config, work: Workload) -> tuple[float, str]:
    """Seconds, and what they assume in words."""
    assert work.dialogs is not None
    tokens = work.dialogs * config.epochs * work.tokens_per_dialog
    # Forward 2 operations a weight and token, backward 2 for the inputs and 2 for the weights that train (Kaplan et al.
    # 2020, arXiv:2001.08361, section 2.1); attention's own, a few in a hundred at 4096 tokens, are left out.
    per_weight = 6.0 if work.tuning.method == "full" else 4.0
    operations = per_weight * work.shape.weights * tokens
    if config.gradient_checkpointing:
        operations *= (per_weight + 2) / per_weight
    told = f"{work.tokens_per_dialog:.0f} tokens a dialog"
    if work.gpu is None:
        return operations / CPU_FLOPS, f"on 2 CPU cores at 0.1 TFLOP/s each and {told}"
    if work.gpu.tflops is None:
        return 0.0, ""
    mfu = ASSUMED_MFU[work.tuning.method]
    seconds = operations / (work.gpu.count * work.gpu.tflops * 1e12 * mfu)
    return seconds, f"on {work.gpu}, assuming {mfu:.0%} of its {work.gpu.tflops:g} TFLOP/s (MFU) and {told}"
