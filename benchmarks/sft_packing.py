"""Compare packed with padded rows in supervised fine-tuning: `python benchmarks/sft_packing.py`, or `make bench`.

Times forward and backward of the training loss (`sft.loss.answer_token_losses`) on bundled dialogs with the bundled
base, without optimizer updates. On a CPU a step's dialogs are divided over one process per core, in every layout, as a
step of the recipe divides them (`--processes`). Each step's dialogs run through every layout in turn, so that other load
on the machine affects all of them. Tokens are those of the dialogs, without padding. Only prints; there is no pass or
fail.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.workers.processes import count_of_a_step, environments
from llamachat import distributed
from llamachat.chat_format import TokenizedExample, TrainOn
from llamachat.chat_format.proof import load_proved_format
from llamachat.config.sections import Base, Data, DataSource
from llamachat.data.packing import collate_packed, collate_padded, pack_evenly, plan_steps
from llamachat.models.loading import load_base
from llamachat.models.sequence_attention import use_sequence_attention
from sft.config import CPU_ROW_TOKENS
from sft.examples import load_examples
from sft.loss import SHAPE_MULTIPLE, answer_token_losses

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "base"
BASELINE = "padded, 8 dialogs a micro-batch, in data order"
EXAMPLES_PER_STEP = 16  # of configs/tiny.yaml
MAX_TOKENS = 1024
MOST_STEPS = 200
Batch = dict[str, Tensor]


@dataclass(slots=True)
class Layout:
    """One way to arrange a step's dialogs in batches, and its results by step."""

    name: str
    model: "LlamaForCausalLM"
    batches_of: Callable[[Sequence[TokenizedExample]], list[Batch]]
    tokens_per_s: list[float] = field(default_factory=list)
    positions: int = 0  # tokens computed, including padding
    nats: float = 0.0  # sum of losses, equal for all layouts up to rounding

    def run(self, dialogs: Sequence[TokenizedExample]) -> None:
        """Run one step, timed from the first forward pass to the last gradient of all processes."""
        model = self.model
        batches, loss_tokens = self.batches_of(dialogs), sum(sum(dialog.loss_mask[1:]) for dialog in dialogs)
        total = torch.zeros((), device=model.device, dtype=torch.float64)
        distributed.wait()
        started = time.perf_counter()
        for batch in distributed.shard(batches):
            losses = answer_token_losses(model, {name: tensor.to(model.device) for name, tensor in batch.items()})
            (losses.sum() / loss_tokens).backward()
            total += losses.detach().sum(dtype=torch.float64)
        self.nats += float(distributed.all_reduce_sum(total))  # synchronises device and processes
        self.tokens_per_s.append(num_tokens(dialogs) / (time.perf_counter() - started))
        self.positions += sum(batch["input_ids"].numel() for batch in batches)
        model.zero_grad(set_to_none=True)


def num_tokens(dialogs: Sequence[TokenizedExample]) -> int:
    """Number of tokens of the dialogs, without padding."""
    return sum(len(dialog.input_ids) for dialog in dialogs)


def load_steps(count: int, seed: int) -> list[list[TokenizedExample]]:
    """The dialogs of the first steps, in the training order with this seed."""
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
    lengths = [len(example.input_ids) for example in examples]
    one_by_one = plan_steps(lengths, examples_per_step=1, epochs=1, seed=seed, capacity=MAX_TOKENS, packing=False)
    order = [examples[row[0]] for row in one_by_one.rows]
    return [order[start * EXAMPLES_PER_STEP : (start + 1) * EXAMPLES_PER_STEP] for start in range(count)]


def packed(dialogs: Sequence[TokenizedExample], row_tokens: int) -> list[Batch]:
    """Packed rows of up to `row_tokens` tokens; one row per batch, as in training."""
    rows = pack_evenly([len(dialog.input_ids) for dialog in dialogs], row_tokens, shares=distributed.count())
    return [collate_packed([dialogs[index] for index in row], multiple_of=SHAPE_MULTIPLE) for row in rows]


def padded(dialogs: Sequence[TokenizedExample], rows: int) -> list[Batch]:
    """Batches of `rows` dialogs in order, each padded to the longest in its batch."""
    starts = range(0, len(dialogs), rows)
    return [collate_padded(dialogs[start : start + rows], multiple_of=SHAPE_MULTIPLE) for start in starts]


def report(layouts: Sequence[Layout], *, tokens: int, answer_tokens: int) -> str:
    """Medians and quartiles over steps, and the median ratio to the baseline of the same step."""
    baseline = next(layout for layout in layouts if layout.name == BASELINE)
    lines = [f"{'layout':<48}{'tokens/s':>10}{'quartiles':>16}{'ratio':>8}{'padding':>9}{'loss':>9}"]
    for layout in layouts:
        ratios = [mine / its for mine, its in zip(layout.tokens_per_s, baseline.tokens_per_s, strict=True)]
        low, middle, high = statistics.quantiles(layout.tokens_per_s, n=4)
        lines.append(
            f"{layout.name:<48}{middle:>10.0f}{f'{low:.0f}-{high:.0f}':>16}{statistics.median(ratios):>8.2f}"
            f"{1 - tokens / layout.positions:>9.0%}{layout.nats / answer_tokens:>9.4f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of packed rows against padding.")
    parser.add_argument("--seconds", type=float, default=60.0, help="Time to measure; at least two steps are done.")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="Number format.")
    parser.add_argument("--processes", type=int, default=count_of_a_step(), help="Processes that share a step.")
    options = parser.parse_args()
    if options.processes > 1 and not distributed.are_launched():
        command = [sys.executable, "-m", "benchmarks.sft_packing", *sys.argv[1:]]
        ranks = environments(options.processes)
        started = [subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)} | rank) for rank in ranks]
        raise SystemExit(max(process.wait() for process in started))
    with distributed.opened():
        measure(options)


def measure(options: argparse.Namespace) -> None:
    """Run the layouts in turn and print their speed."""
    base = Base(model=str(BASE), dtype=options.dtype, max_tokens=MAX_TOKENS)
    model, packing = (load_base(base, device="auto").train() for _ in range(2))
    if packing.device.type == "cpu":  # as in training
        use_sequence_attention(packing, trains_together=True)
    steps = load_steps(MOST_STEPS, seed=0)
    layouts = [
        Layout(BASELINE, model, lambda dialogs: padded(dialogs, 8)),
        Layout("packed rows of up to 512 tokens", packing, lambda dialogs: packed(dialogs, 512)),
        Layout(
            f"packed rows of up to {CPU_ROW_TOKENS} tokens", packing, lambda dialogs: packed(dialogs, CPU_ROW_TOKENS)
        ),
    ]
    for layout in layouts:  # the first pass selects kernels and allocates memory
        Layout(layout.name, layout.model, layout.batches_of).run(steps[0])
    started, done = time.monotonic(), 0
    while done < len(steps) and distributed.broadcast_object(done < 2 or time.monotonic() - started < options.seconds):
        for layout in layouts if done % 2 == 0 else reversed(layouts):
            layout.run(steps[done])
        done += 1
    if not distributed.is_first():
        return
    threads = f"{distributed.count()} process(es) with {torch.get_num_threads()} thread(s), {os.cpu_count()} cores"
    print(
        f"{model.num_parameters() / 1e6:.1f} M parameters, {model.device}, {threads}, {options.dtype}, "
        f"torch {torch.__version__}"
    )
    dialogs = [dialog for step in steps[:done] for dialog in step]
    answer_tokens = sum(sum(dialog.loss_mask[1:]) for dialog in dialogs)
    tokens = num_tokens(dialogs)
    print(
        f"{done} steps of {EXAMPLES_PER_STEP} dialogs, {tokens} tokens, {answer_tokens} of them trained on; "
        "forward and backward:"
    )
    print(report(layouts, tokens=tokens, answer_tokens=answer_tokens))


if __name__ == "__main__":
    main()
