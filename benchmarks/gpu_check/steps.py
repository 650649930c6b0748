"""Optimizer steps of supervised tuning, a reward model and PPO on the card: memory against the plan, and speed."""

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu_check.figures import Figure
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.memory import BAND, Case, estimated
from benchmarks.workers.memory_case import MICROBATCHES, measured
from llamachat.config.gpus import CARDS, Gpu

# FLOPs per weight and token with adapters on a frozen base: forward, recomputation, gradients of inputs.
OPERATIONS = 6
SIDE = 4096  # of the matrices for measuring the card's FLOP rate
COPIED = 2**30  # bytes for measuring its bandwidth


def card() -> Gpu | None:
    """This machine's card, with the peak rate from its data sheet if known."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    gib = properties.total_memory / 2**30
    words = set(properties.name.lower().replace("-", " ").split())
    known = [name for name, (size, _) in CARDS.items() if set(name.split("-")) <= words | {f"{size:.0f}gb"}]
    return Gpu(properties.name, gib, CARDS[known[0]][1] if known else None)


def speeds() -> tuple[float, float]:
    """FLOP/s of a large bf16 product, and bytes per second that a copy reads and writes."""
    left = torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16)
    block = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(block)
    rates = []
    for work, size in ((lambda: left @ left, 2 * SIDE**3), (lambda: target.copy_(block), 2 * COPIED)):
        work()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(20):
            work()
        torch.cuda.synchronize()
        rates.append(20 * size / (time.perf_counter() - started))
    return rates[0], rates[1]


def step(
    case: Case, folder: Path, sizes: Sizes, gpu: Gpu | None, *, is_toy: bool, peak: float | None
) -> Iterator[Figure]:
    """Run two optimizer steps: memory peak against the plan's, tokens per second, share of the FLOP rate `peak`."""
    gc.collect()
    before = 0
    if gpu:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
    estimate, result = estimated(case, sizes.shape, gpu), measured(case, folder)
    taken, planned = result.grown, estimate.grown_bytes
    if gpu:  # including the weights
        taken, planned = torch.cuda.max_memory_reserved() - before, estimate.peak_bytes
    yield Figure(f"{case.step}: peak of memory", taken / 2**30, "GiB")
    # A toy model is smaller than the memory the plan ignores, and on a CPU the process keeps memory freed earlier.
    least, most = (None, None) if is_toy else BAND
    yield Figure(f"{case.step}: plan over measured", planned / taken, least=least, most=most)
    tokens = MICROBATCHES * case.tokens * (2 if case.step == "rm" else 1)
    if case.step == "ppo":
        yield Figure("ppo: one iteration", result.step_s, "s")
        return
    yield Figure(f"{case.step}: training", tokens / result.step_s, "tokens/s")
    if peak is not None:
        mfu = OPERATIONS * sizes.shape.weights * tokens / result.step_s / peak
        yield Figure(f"{case.step}: share of the card's peak arithmetic (MFU)", mfu)
