"""Compare the speed of reward model training with TRL's: `python benchmarks/reward_training.py`, or `make bench`.

Times whole optimizer steps (forward, backward, update) of `reward.ranking.PackedRewardTrainer` and of TRL's
`RewardTrainer` with its own collator, on the same bundled helpfulness and safety pairs in their natural mix, with the
bundled base, one dtype, full fine-tuning and no checkpointing. Ours runs as a step that runs alone does: on a CPU its
rows are divided over one process per core (`--processes`). TRL has one process with all threads, as it
comes. In each round every trainer gets the same pairs, in alternating order, so that other load on the machine affects
all of them. Only prints; there is no pass or fail.
"""

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging
from trl import RewardConfig, RewardTrainer

from benchmarks.workers.processes import Worker, count_of_a_step
from llamachat import distributed
from llamachat.chat_format.proof import load_proved_format
from llamachat.chat_format.tokenizer import write_tokenizer
from llamachat.config.sections import Base, Data, DataSource, Tuning
from llamachat.data.packing import epoch_order
from llamachat.data.pairs import PairExample
from llamachat.models.reward_model import build_reward_model
from llamachat.models.sequence_attention import use_sequence_attention
from llamachat.models.start_checks import fast_tokenizer
from llamachat.training.trainer import CHECKPOINTING, Watch, collator, row_numbers, trainer_arguments
from reward.batches import plan_batches
from reward.config import CPU_ROW_TOKENS, Config
from reward.pairs import Examples, load_examples
from reward.ranking import Ranking

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "base"
MAX_TOKENS = 1024
RATE = 1e-5
Pairs = Sequence[PairExample]


class Clock(TrainerCallback):
    """Records the seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        distributed.wait()
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._started)


@dataclass(slots=True)
class Contender:
    """One trainer and its results by round."""

    name: str
    step: Callable[[range], float]  # seconds of an optimizer step on these pairs
    pairs_per_s: list[float] = field(default_factory=list)

    def run(self, places: range) -> None:
        self.pairs_per_s.append(len(places) / self.step(places))


def seconds_of_step(trainer: Any) -> float:
    """The seconds of the only optimizer step of this trainer."""
    clock = Clock()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(clock)
    trainer.train()
    (seconds,) = clock.seconds
    return seconds


def load_pairs() -> list[PairExample]:
    """All bundled training pairs in the order of one epoch."""
    chat_format, _ = load_proved_format(BASE)
    sources = {
        kind: tuple(DataSource(path=str(path)) for path in sorted((ROOT / "data" / kind).glob("*.jsonl.gz")))
        for kind in ("helpfulness", "safety")
    }
    data = Data(sft=(), helpfulness=sources["helpfulness"], safety=sources["safety"])
    config = Config(other_share=0.99)  # all safety pairs
    pairs = load_examples(
        config, data, chat_format, which="helpfulness", system=None, max_tokens=MAX_TOKENS, seed=0
    ).train
    return [pairs[index] for index in epoch_order(len(pairs), 1, 0)]


def ours(options: argparse.Namespace) -> Contender:
    """Our trainer in its own processes (`work`)."""
    command = [sys.executable, "-m", "benchmarks.reward_training", "--worker", "--dtype", options.dtype]
    worker = Worker(command, {**os.environ, "PYTHONPATH": str(ROOT)}, options.processes)

    def step(places: range) -> float:
        return max(answer["seconds"] for answer in worker.ask({"start": places.start, "stop": places.stop}))

    return Contender(f"llamachat, packed rows, {options.processes} process(es)", step)


def work(base: Base) -> None:
    """The other side of `Worker`: one of our optimizer steps for each line."""
    answers, sys.stdout = sys.stdout, sys.stderr
    with distributed.opened(), tempfile.TemporaryDirectory() as scratch:
        pairs, trainer_of = load_pairs(), our_trainers(base, Path(scratch))
        for line in sys.stdin:
            request = json.loads(line)
            seconds = seconds_of_step(trainer_of(pairs[request["start"] : request["stop"]]))
            print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def our_trainers(base: Base, scratch: Path) -> Callable[[Pairs], Any]:
    """The training of `reward.train`, without evaluations."""
    start = build_reward_model(base, Tuning(), policy=None, seed=0, device="auto")
    by_sequence = start.device.type == "cpu"
    if by_sequence:
        use_sequence_attention(start.model, trains_together=True)
    row_tokens = CPU_ROW_TOKENS if start.device.type == "cpu" else 2 * MAX_TOKENS
    tokenizer = fast_tokenizer(start.chat_format, scratch)

    def trainer_of(pairs: Pairs) -> Any:
        config = Config(pairs_per_step=len(pairs), learning_rate=RATE)
        batches = plan_batches(
            pairs,
            [],
            pairs_per_step=len(pairs),
            epochs=1,
            seed=0,
            row_tokens=row_tokens,
            has_pair_labels=False,
            branches=by_sequence,
        )
        examples = Examples(
            train=list(pairs), labels=[], validation=[], test=[], dialogs=[], test_labels=[], dropped={}
        )
        ranking = Ranking(config, "rm/helpfulness", "helpfulness", start.model, start.chat_format, examples, batches)
        return ranking.trainer(
            trainer_arguments(config, batches.plan, folder=scratch, seed=0, log_every=1, save_every=10**6),
            data_collator=collator(batches.collate),
            train_dataset=row_numbers(len(batches.plan.rows)),
            processing_class=tokenizer,
            checkpoints=scratch / "checkpoints",
            before_save=lambda: None,
            watch=Watch([0], names=ranking.names, on_log=lambda *_: None, on_step=lambda _: None),
        )

    return trainer_of


def plain_trl(base: Base, pairs: Pairs, scratch: Path, *, rows: int, attention: str) -> Contender:
    """TRL as documented: token ids in, its own collator, `rows` pairs per device batch."""
    model = AutoModelForSequenceClassification.from_pretrained(
        str(BASE), num_labels=1, dtype=getattr(torch, base.dtype), attn_implementation=attention
    )
    chat_format, _ = load_proved_format(BASE)
    write_tokenizer(chat_format.tokenizer, scratch, chat_format.chat_template)
    tokenizer = AutoTokenizer.from_pretrained(str(scratch))
    without_checkpointing: dict[str, Any] = {CHECKPOINTING: False}
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    def step(places: range) -> float:
        arguments = RewardConfig(
            output_dir=str(scratch),
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=len(places) // rows,
            max_steps=1,
            learning_rate=RATE,
            max_length=MAX_TOKENS,
            **without_checkpointing,
            bf16=False,  # the weights already have that dtype
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        columns = [
            {"chosen_ids": list(pair.chosen), "rejected_ids": list(pair.rejected), "margin": pair.margin}
            for pair in pairs[places.start : places.stop]
        ]
        return seconds_of_step(
            RewardTrainer(
                model=model, args=arguments, train_dataset=Dataset.from_list(columns), processing_class=tokenizer
            )
        )

    return Contender(f"TRL, {rows} pairs a batch, {attention}", step)


def report(contenders: Sequence[Contender]) -> str:
    """Medians over rounds, and the ratio of our median to theirs."""
    mine = statistics.median(contenders[0].pairs_per_s)
    lines = [f"{'trainer':<36}{'pairs/s':>9}{'min-max':>16}{'ours/it':>9}"]
    for contender in contenders:
        rates = contender.pairs_per_s
        spread = f"{min(rates):.1f}-{max(rates):.1f}"
        middle = statistics.median(rates)
        lines.append(f"{contender.name:<36}{middle:>9.2f}{spread:>16}{mine / middle:>9.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pairs a second of reward model training, against plain TRL.")
    parser.add_argument("--seconds", type=float, default=120.0, help="Time to measure; at least two rounds are done.")
    parser.add_argument("--pairs", type=int, default=32, help="Pairs of an optimizer step, a multiple of 32.")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="Number format.")
    parser.add_argument("--processes", type=int, default=count_of_a_step(), help="Processes that share our step.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    logging.disable(logging.WARNING)
    base = Base(model=str(BASE), dtype=options.dtype, attention="eager", max_tokens=MAX_TOKENS)
    if options.worker:
        work(base)
        return
    pairs = load_pairs()
    with tempfile.TemporaryDirectory() as name:
        contenders = [
            ours(options),
            *(plain_trl(base, pairs, Path(name), rows=rows, attention="sdpa") for rows in (8, 16, 32)),
            plain_trl(base, pairs, Path(name), rows=8, attention="eager"),
        ]
        for contender in contenders:  # the first pass selects kernels and allocates memory
            contender.run(range(len(pairs) - options.pairs, len(pairs)))
            contender.pairs_per_s.clear()
        started, done = time.monotonic(), 0
        most = len(pairs) // options.pairs - 1
        while done < most and (done < 2 or time.monotonic() - started < options.seconds):
            places = range(done * options.pairs, (done + 1) * options.pairs)
            for contender in contenders if done % 2 == 0 else reversed(contenders):
                contender.run(places)
            done += 1
    place = "a GPU" if torch.cuda.is_available() else f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(f"{done} rounds of {options.pairs} pairs, {options.dtype}, {place}, torch {torch.__version__}")
    print(report(contenders))


if __name__ == "__main__":
    main()
