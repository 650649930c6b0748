"""Speed of packed rows in supervised tuning, against padding: `python benchmarks/sft_packing.py`, or `make bench`.

Forward and backward of the training's own loss (`sft.loss.answer_token_losses`) on bundled dialogs with the bundled
base; no optimizer step. The layouts take turns in one process, so that what else the machine does meets all of them,
and each sees the same dialogs. Tokens are those of the dialogs: padding is not counted. Prints; passes or fails nothing.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamachat.batching import collate_packed, collate_padded, plan_steps
from llamachat.chat_format import TokenizedExample, TrainOn
from llamachat.chat_format.proof import load_proved_format
from llamachat.config.sections import Base, Data, DataSource
from llamachat.models.loading import load_base
from sft.examples import load_examples
from sft.loss import answer_token_losses

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "base"
BASELINE = "padded, 8 dialogs a micro-batch, in data order"
EXAMPLES_PER_STEP = 16  # of configs/tiny.yaml
MAX_TOKENS = 1024
Batch = dict[str, Tensor]


@dataclass(slots=True)
class Layout:
    """One way to lay the same dialogs out, and what each round over them gave."""

    name: str
    batches: list[Batch]
    tokens_per_s: list[float] = field(default_factory=list)
    loss: float = 0.0  # nats an answer token, equal for all layouts up to rounding

    @property
    def positions(self) -> int:
        """Tokens that the model computes on, padding included."""
        return sum(batch["input_ids"].numel() for batch in self.batches)


def load_dialogs(count: int, seed: int) -> list[TokenizedExample]:
    """The first dialogs in the order in which training with this seed goes through the bundled ones."""
    chat_format, _ = load_proved_format(BASE)
    files = sorted((ROOT / "data" / "sft").glob("*.jsonl.gz"))
    examples = load_examples(
        Data(sft=tuple(DataSource(path=str(path)) for path in files)),
        chat_format,
        system=None,
        train_on=TrainOn.EVERY_ANSWER,
        max_tokens=MAX_TOKENS,
        num_prompts=0,
        seed=seed,
    ).train
    order = plan_steps(
        [len(example.input_ids) for example in examples],
        examples_per_step=1,
        epochs=1,
        seed=seed,
        capacity=MAX_TOKENS,
        packing=False,
    )
    return [examples[row[0]] for row in order.rows[:count]]


def packed(dialogs: Sequence[TokenizedExample], row_tokens: int) -> list[Batch]:
    """Rows of up to so many tokens, packed within each optimizer step, as training does it; one row a batch."""
    plan = plan_steps(
        [len(dialog.input_ids) for dialog in dialogs],
        examples_per_step=EXAMPLES_PER_STEP,
        epochs=1,
        seed=0,
        capacity=row_tokens,
        packing=True,
    )
    return [collate_packed([dialogs[index] for index in row]) for row in plan.rows if row]


def padded(dialogs: Sequence[TokenizedExample], rows: int) -> list[Batch]:
    """So many dialogs a batch as they come, each padded to the longest of its batch."""
    return [collate_padded(dialogs[start : start + rows]) for start in range(0, len(dialogs), rows)]


def run_round(model: "LlamaForCausalLM", layout: Layout, *, tokens: int, answer_tokens: int) -> None:
    """One pass over all dialogs, timed from the first forward to the last gradient."""
    device, total = model.device, torch.zeros((), device=model.device, dtype=torch.float64)
    started = time.perf_counter()
    for batch in layout.batches:
        losses = answer_token_losses(model, {name: tensor.to(device) for name, tensor in batch.items()})
        (losses.sum() / answer_tokens).backward()
        total += losses.detach().sum(dtype=torch.float64)
    layout.loss = float(total) / answer_tokens  # waits for the device
    layout.tokens_per_s.append(tokens / (time.perf_counter() - started))
    model.zero_grad(set_to_none=True)


def report(layouts: Sequence[Layout], *, tokens: int) -> str:
    """Median, range and ratio to the baseline of the same round."""
    baseline = next(layout for layout in layouts if layout.name == BASELINE)
    lines = [f"{'layout':<48}{'tokens/s':>10}{'range':>16}{'ratio':>8}{'padding':>9}{'loss':>9}"]
    for layout in layouts:
        ratios = [mine / its for mine, its in zip(layout.tokens_per_s, baseline.tokens_per_s, strict=True)]
        span = f"{min(layout.tokens_per_s):.0f}-{max(layout.tokens_per_s):.0f}"
        lines.append(
            f"{layout.name:<48}{statistics.median(layout.tokens_per_s):>10.0f}{span:>16}"
            f"{statistics.median(ratios):>8.2f}{1 - tokens / layout.positions:>9.0%}{layout.loss:>9.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of packed rows against padding.")
    parser.add_argument("--dialogs", type=int, default=48, help="Dialogs of one round.")
    parser.add_argument("--seconds", type=float, default=45.0, help="Time to measure; at least two rounds are done.")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="Number format.")
    options = parser.parse_args()

    model = load_base(Base(model=str(BASE), dtype=options.dtype, max_tokens=MAX_TOKENS), device="auto").train()
    dialogs = load_dialogs(options.dialogs, seed=0)
    tokens = sum(len(dialog.input_ids) for dialog in dialogs)
    layouts = [
        Layout(BASELINE, padded(dialogs, 8)),
        Layout("packed rows of 512 tokens", packed(dialogs, 512)),
        Layout("packed rows of 1024 tokens", packed(dialogs, 1024)),
    ]
    # The same number for all: the loss is divided by it, as in an optimizer step.
    answer_tokens = sum(sum(dialog.loss_mask[1:]) for dialog in dialogs)
    place = f"{model.device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {options.dtype}"
    print(
        f"{len(dialogs)} dialogs, {tokens} tokens, {answer_tokens} of them learnt; {place}, torch {torch.__version__}"
    )
    for layout in layouts:  # kernels are chosen and memory is taken on the first pass
        run_round(model, Layout(layout.name, layout.batches[:2]), tokens=tokens, answer_tokens=answer_tokens)
    started, rounds = time.monotonic(), 0
    while rounds < 2 or time.monotonic() - started < options.seconds:
        for layout in layouts if rounds % 2 == 0 else reversed(layouts):
            run_round(model, layout, tokens=tokens, answer_tokens=answer_tokens)
        rounds += 1
    print(f"{rounds} rounds, forward and backward:")
    print(report(layouts, tokens=tokens))


if __name__ == "__main__":
    main()
