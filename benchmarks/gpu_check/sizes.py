"""Sizes of the check's model and rows."""

from dataclasses import dataclass, replace

from benchmarks.memory import Case, estimated
from llamachat.config.gpus import Gpu
from llamachat.memory.estimates import Shape


@dataclass(frozen=True, slots=True)
class Sizes:
    """A model, and the lengths of its inputs and outputs in tokens."""

    shape: Shape
    tokens: int  # of a supervised tuning row, and of an answer of a pair
    prompt: int  # maximum prompt length
    new_tokens: int
    rows: int  # number of answers sampled at once
    packed: tuple[int, int, int]  # lengths of the sequences of a packed row

    @property
    def longest(self) -> int:
        return max(self.tokens, self.prompt + self.new_tokens + 2)

    @property
    def cases(self) -> tuple[Case, ...]:
        """Training as in the presets: adapters on a 4-bit base, with gradient checkpointing."""
        return (
            Case("sft", "qlora", tokens=self.tokens, checkpointing=True),
            Case("rm", "qlora", tokens=self.tokens, checkpointing=True),
            Case(
                "ppo",
                "qlora",
                tokens=self.prompt,
                rows=self.rows,
                new_tokens=self.new_tokens,
                row_tokens=self.tokens,
                checkpointing=True,
            ),
        )


# The widths of Llama 2 7B, with as many of its 32 layers as fit on the card.
LAYERS = (4, 2, 1)
CARD = Sizes(
    Shape(4096, 11008, 4, 32, 32, 32000), tokens=2048, prompt=128, new_tokens=128, rows=32, packed=(700, 900, 300)
)
TOY = Sizes(Shape(64, 128, 2, 4, 2, 4096), tokens=128, prompt=100, new_tokens=24, rows=4, packed=(9, 14, 6))


def sizes_for(gpu: Gpu) -> Sizes:
    """The largest sizes that fit on the card according to the plan."""
    candidates = [replace(CARD, shape=replace(CARD.shape, layers=layers)) for layers in LAYERS]
    for sizes in candidates:
        if all(estimated(case, sizes.shape, gpu).peak_bytes <= gpu.usable_bytes for case in sizes.cases):
            return sizes
    return candidates[-1]
