"""GPU specifications for `run.gpu` and `plan --gpu`: a card's name, an amount of memory, or several cards.

rtx-4090    24GiB    8x a100-80gb
"""

import re
from dataclasses import dataclass

from llamachat.config.section import TextCheck

# name: (GiB that the driver reports, peak dense bf16 TFLOP/s with fp32 accumulation), both from the vendor's data
# sheets.
CARDS = {
    "rtx-3060": (12.0, 25.0),
    "rtx-3070": (8.0, 40.0),
    "rtx-3090": (24.0, 71.0),
    "rtx-4090": (24.0, 165.0),
    "rtx-a6000": (48.0, 155.0),
    "a10": (22.5, 125.0),
    "l4": (22.5, 121.0),
    "l40s": (45.0, 362.0),
    "a100-40gb": (40.0, 312.0),
    "a100-80gb": (80.0, 312.0),
    "h100": (79.6, 989.0),
    "h200": (140.4, 989.0),
}
# Cards before Ampere that are still common, compute capability below 8.0.
WITHOUT_BF16 = ("t4", "v100", "v100-16gb", "v100-32gb", "p100", "rtx-2080", "rtx-2080-ti", "titan-rtx", "gtx-1080-ti")
# CUDA's own context and the workspaces of its libraries need a share; ours, not measured.
USABLE = 0.9
# Memory that torch's caching allocator reserves beyond what is allocated, as a share: blocks that no new tensor
# fits into. With expandable_segments, counted on the simulated GPU (tests/cuda_standin/test_planner.py).
ALLOCATOR_SHARE = {"training": 0.065, "sampling": 0.045, "ppo": 0.025}

_FORM = re.compile(r"(?:(?P<count>[1-9][0-9]*) ?x ?)?(?:(?P<size>[0-9]+(?:\.[0-9]+)?) ?gi?b|(?P<name>[a-z][a-z0-9-]*))")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One or several cards of one kind."""

    name: str
    gib: float  # memory of one card
    tflops: float | None  # peak of one card; None if only its memory is known
    count: int = 1

    @property
    def timed(self) -> tuple[float, str]:
        """Peak of one card in TFLOP/s, and the card it belongs to: for a bare amount of memory, the slowest known card
        with it."""
        if self.tflops is not None:
            return self.tflops, "its"
        least = USABLE * self.gib  # cards of one class differ in what the driver reserves
        largest = max(gib for gib, _ in CARDS.values())
        name = min((name for name in CARDS if CARDS[name][0] >= min(least, largest)), key=lambda name: CARDS[name][1])
        return CARDS[name][1], f"the {name}'s (the slowest known of that memory)"

    @property
    def usable_bytes(self) -> float:
        """Bytes that a step should need at most on one card."""
        return USABLE * self.gib * 2**30

    @property
    def allocatable_bytes(self) -> float:
        """Bytes that tensors may use where answers are sampled, without the allocator's share."""
        return self.usable_bytes / (1 + ALLOCATOR_SHARE["sampling"])

    def __str__(self) -> str:
        return f"{self.count} x {self.name}" if self.count > 1 else self.name


def parse_gpu(text: str) -> Gpu:
    """The card that a text names; raises a ValueError that lists the accepted forms."""
    match = _FORM.fullmatch(text.strip().lower())
    count = int(match["count"] or 1) if match else 1
    if match and match["size"] and float(match["size"]) > 0:
        # Vendors write GB but mean GiB.
        return Gpu(f"{float(match['size']):g} GiB", float(match["size"]), None, count)
    if match and match["name"] in CARDS:
        gib, tflops = CARDS[match["name"]]
        return Gpu(match["name"], gib, tflops, count)
    if match and match["name"] in WITHOUT_BF16:
        raise ValueError(
            f"the {match['name']} has no bfloat16 arithmetic (cards of compute capability 8.0 or later have it). Steps compute"
            " in bfloat16 on a GPU, and QLoRA needs it: float16 would need loss scaling, which is not"
            f" implemented. Use another card, such as one of {', '.join(CARDS)}."
        )
    raise ValueError(
        f"'{text}' is not a known card. Memory and hours are estimated from it. Write an amount of memory such as 24GiB,"
        f" several cards as 8x80GiB, or one of {', '.join(CARDS)}."
    )


def _fault(text: str) -> str | None:
    try:
        parse_gpu(text)
    except ValueError as error:
        return str(error)
    return None


GPU_NAME = TextCheck(_fault)
