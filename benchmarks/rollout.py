"""Compare our rollout engine's speed with transformers' `generate`: `python -m benchmarks.rollout`, or `make bench`.

There are three workloads: bundled prompts answered up to EOS (at most 256 tokens) with 1 and with 8 samples per prompt,
and 64 tokens after prompts of 64. Both engines alternate in one process, so that other load on the machine affects
both. `generate` gets its prompts sorted by length, and its best result of 32, 64 and 128 rows per batch counts; unlike
ours, it returns no log-probabilities. On a CPU with several cores ours is measured twice: in this process, with a
thread per core, and divided over processes with one thread each, as a step divides its prompts (`run.processes`).
Tokens are those of the answers, including stop tokens. Only prints; there is no pass or fail. The upper bound on a CPU
is the bare forward pass of the same rows; with `--shape`, for random weights on a GPU, memory bandwidth gives another
bound.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from benchmarks.ppo import Worker
from llamachat.chat_format.proof import load_proved_format
from llamachat.config.sections import Base
from llamachat.data.files import read_rows
from llamachat.data.loading import parse_rows
from llamachat.data.records import as_prompt
from llamachat.models.loading import load_base, load_policy
from llamachat.rollout.decoder import LlamaEngine
from llamachat.rollout.engine import Sampling

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from llamachat.chat_format import ChatFormat

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "assets" / "base"
PROMPTS = ROOT / "data" / "prompts" / "general.jsonl.gz"
TUNED = ROOT / "runs" / "tiny" / "sft" / "artifact"
BATCHES = (32, 64, 128)
LONGEST_PROMPT = 512
SHAPES = {  # hidden size, inner size, layers, heads, key-value heads
    "1.1b": (2048, 5632, 22, 32, 4),
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Load:
    """A workload: prompts, and how answers are sampled."""

    name: str
    prompts: Prompts
    samples: int
    new_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(slots=True)
class Result:
    """The results of one engine by run."""

    name: str
    tokens_per_s: list[float] = field(default_factory=list)
    mean_length: float = 0.0

    @property
    def median(self) -> float:
        """Median tokens per second."""
        return statistics.median(self.tokens_per_s)


def with_ours(engine: LlamaEngine, load: Load, seed: int) -> list[int]:
    """Sample with our engine; return the lengths of the answers."""
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=load.new_tokens, seed=seed)
    groups = engine.generate(load.prompts, samples_per_prompt=load.samples, sampling=sampling)
    return [len(completion.token_ids) for group in groups for completion in group]


def with_processes(worker: Worker, load: Load, seed: int) -> list[int]:
    """Sample with our engine in several processes; return the lengths of the answers."""
    answers = worker.ask({"load": load.name, "seed": seed})
    return [length for answer in answers for length in answer["lengths"]]


def answer_requests(model: "LlamaForCausalLM", chosen: Sequence[Load]) -> None:
    """One of the processes of `with_processes`: sample a share of the load's prompts for each line of JSON."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shares = {load.name: replace(load, prompts=load.prompts[rank::count]) for load in chosen}
    engines = {name: LlamaEngine(model, load.stop_ids) for name, load in shares.items()}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["load"]
        print(json.dumps({"lengths": with_ours(engines[name], shares[name], request["seed"])}), flush=True)


def with_generate(model: "LlamaForCausalLM", load: Load, seed: int, rows: int) -> list[int]:
    """Sample with `generate`; return the lengths of the answers up to the stop token."""
    from transformers import GenerationConfig

    torch.manual_seed(seed)
    config = GenerationConfig(
        max_new_tokens=load.new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=load.samples,
        eos_token_id=list(load.stop_ids) or None,
        pad_token_id=0,
        use_cache=True,
    )
    prompts, lengths = sorted(load.prompts, key=len, reverse=True), []
    for start in range(0, len(prompts), max(1, rows // load.samples)):
        batch = prompts[start : start + max(1, rows // load.samples)]
        longest = len(batch[0])
        ids_BP = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in batch], device=model.device)
        mask_BP = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
        answers = cast(Any, model).generate(
            input_ids=ids_BP, attention_mask=mask_BP.to(model.device), generation_config=config
        )[:, longest:]
        for answer in answers.tolist():
            stops = (index for index, token in enumerate(answer) if token in load.stop_ids)
            lengths.append(next(stops, len(answer) - 1) + 1)
    return lengths


def bare_forward(model: "LlamaForCausalLM", load: Load, seed: int) -> list[int]:
    """Forward passes over rows of 128 tokens, 64 at a time, without a cache, for the fixed workload's token count."""
    del seed
    ids_BT = torch.tensor(load.prompts, device=model.device).repeat(1, 2)
    with torch.inference_mode():
        for batch_BT in ids_BT.split(64):
            model(input_ids=batch_BT, use_cache=False)
    return [ids_BT.shape[1]] * len(ids_BT)


def measure(
    load: Load, runs: dict[str, Callable[[int], list[int]]], clock: Callable[[], float], times: int
) -> list[Result]:
    """Run every engine in turn, `times` times, after a warm-up round that selects kernels and allocates memory."""
    results = {name: Result(name) for name in runs}
    for repeat in range(times + 1):
        for name, run in runs.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            started = clock()
            lengths = run(repeat)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                results[name].tokens_per_s.append(sum(lengths) / (clock() - started))
                results[name].mean_length = statistics.mean(lengths)
    return list(results.values())


def report(load: Load, results: Sequence[Result]) -> str:
    """A line for each engine, and the ratio of ours to the best other."""
    best = max(result.median for result in results if result.name.startswith("generate"))
    lines = [f"{load.name}: {len(load.prompts)} prompts x {load.samples}"]
    for result in results:
        spread = f"{min(result.tokens_per_s):.0f}-{max(result.tokens_per_s):.0f}"
        lines.append(
            f"  {result.name:<22}{result.median:>9.0f} tokens/s {spread:>14}{result.median / best:>8.2f}x"
            f"   {result.mean_length:.1f} tokens an answer"
        )
    return "\n".join(lines)


def bundled_prompts(chat_format: "ChatFormat", count: int) -> list[list[int]]:
    """Token ids of the first bundled prompts that fit."""
    forbidden = chat_format.forbidden
    rows = parse_rows(read_rows(str(PROMPTS)), path=str(PROMPTS), kind="prompt", forbidden=forbidden)
    prompts: list[list[int]] = []
    for row in rows:
        if row.record is not None and len(prompts) < count:
            ids = chat_format.encode_prompt(as_prompt(row.record).messages)
            if len(ids) <= LONGEST_PROMPT:
                prompts.append(list(ids))
    return prompts


def loads(options: argparse.Namespace, chat_format: "ChatFormat | None", vocabulary: int) -> list[Load]:
    """The selected workloads."""
    numbers = torch.Generator().manual_seed(0)
    fixed = torch.randint(3, vocabulary, (options.prompts, 64), generator=numbers).tolist()
    selected = [Load("fixed 64 + 64", fixed, 1, 64, ())]
    if chat_format is not None:
        prompts, stops = bundled_prompts(chat_format, options.prompts), tuple(chat_format.stop_ids)
        selected.insert(0, Load("natural stops, K = 8", prompts[: max(1, options.prompts // 4)], 8, 256, stops))
        selected.insert(0, Load("natural stops, K = 1", prompts, 1, 256, stops))
    return [load for load in selected if options.only in load.name]


def random_model(shape: str) -> "LlamaForCausalLM":
    """A model of a known size with random weights, on the GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden, inner, layers, heads, key_value_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=4096,
    )
    with torch.device("cuda"):
        return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()


def bandwidth_limit(model: "LlamaForCausalLM", *, rows: int, tokens: int) -> float:
    """Tokens per second if weights and cache are read once per step at the bandwidth of a plain copy on this GPU."""
    block = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(block)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        target.copy_(block)
    torch.cuda.synchronize()
    bytes_per_s = 10 * 2 * len(block) / (time.perf_counter() - started)
    config = model.config
    head = config.head_dim or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * (config.num_key_value_heads or 1) * head * model.dtype.itemsize * tokens
    weights = sum(weight.numel() * weight.itemsize for weight in model.parameters())
    return rows * bytes_per_s / (weights + rows * cache)


def peak_bytes(run: Callable[[], object]) -> int:
    """Peak memory while it runs: of the process, or on a GPU of torch's allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated()
    run()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def ways(model: "LlamaForCausalLM", load: Load, worker: Worker | None = None) -> dict[str, Callable[[int], list[int]]]:
    """The engines by name; ours first."""
    engine = LlamaEngine(model, load.stop_ids)
    engines: dict[str, Callable[[int], list[int]]] = {"ours": lambda seed: with_ours(engine, load, seed)}
    if worker is not None:
        engines[f"ours, {worker.count} processes"] = lambda seed: with_processes(worker, load, seed)
    for rows in BATCHES:
        engines[f"generate, {rows} rows"] = lambda seed, rows=rows: with_generate(model, load, seed, rows)
    if load.name.startswith("fixed"):
        engines["bare forward"] = lambda seed: bare_forward(model, load, seed)
    return engines


def main() -> None:
    parser = argparse.ArgumentParser(description="Tokens a second of the rollout engine against generate.")
    parser.add_argument(
        "--policy",
        help="Artifact of a policy; without it that of `make sft`, or else the bundled base, which never stops.",
    )
    parser.add_argument("--prompts", type=int, default=256, help="Prompts; a quarter of them for K = 8.")
    parser.add_argument("--times", type=int, default=5, help="Runs that are counted, after one that is not.")
    parser.add_argument("--only", default="", help="Part of the name of a load: K = 1, K = 8 or fixed.")
    parser.add_argument("--shape", choices=sorted(SHAPES), help="Random weights of this size, on a GPU.")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: where others use the machine.")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peak", metavar="ENGINE", help="Only run this one once, and print the peak memory in MiB.")
    options = parser.parse_args()

    chat_format: ChatFormat | None = None
    if options.shape:
        model = random_model(options.shape)
    elif options.policy or TUNED.exists():
        policy = load_policy(options.policy or TUNED, device="auto")
        model, chat_format = cast("LlamaForCausalLM", policy.model), policy.chat_format
    else:
        model = load_base(Base(model=str(BASE), dtype="bfloat16", max_tokens=1024), device="auto").eval()
        chat_format, _ = load_proved_format(BASE)
    chosen = loads(options, chat_format, model.config.vocab_size)
    if options.worker:
        answer_requests(model, chosen)
        return
    if options.peak:
        (load,) = chosen
        way = next(run for name, run in ways(model, load).items() if name.startswith(options.peak))
        print(peak_bytes(lambda: way(0)) // 2**20)
        return
    dtype = str(model.dtype).removeprefix("torch.")
    place = (
        f"{model.device}, {torch.get_num_threads()} threads of {os.cpu_count()} cores, {dtype}, {options.clock} clock"
    )
    cores = len(os.sched_getaffinity(0))
    command = [sys.executable, "-m", "benchmarks.rollout", *sys.argv[1:]]
    # With the clock of this process, other processes' work would count as none.
    is_divided = model.device.type == "cpu" and cores > 1 and options.clock == "wall"
    worker = Worker([*command, "--worker"], {**os.environ, "PYTHONPATH": str(ROOT)}, cores) if is_divided else None
    model_name = (
        options.shape or options.policy or (TUNED if TUNED.exists() else f"{BASE}: untuned, its answers seldom stop")
    )
    print(f"{model_name}\n{model.num_parameters() / 1e6:.1f} M parameters, {place}, torch {torch.__version__}")
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    for load in chosen:
        results = measure(load, ways(model, load, worker), clock, options.times)
        print(report(load, results), flush=True)
        if options.shape:
            limit = bandwidth_limit(model, rows=min(len(load.prompts), 512), tokens=96)
            print(f"  {'memory bandwidth':<22}{limit:>9.0f} tokens/s")
        fastest = max(results, key=lambda result: result.median if result.name.startswith("generate") else 0.0)
        for name in ("ours", fastest.name):
            peak = subprocess.check_output([*command, "--only", load.name, "--peak", name], text=True, cwd=ROOT)
            print(f"  peak memory, {name}: {peak.strip()} MiB", flush=True)
    if worker is not None:
        worker.kill()


if __name__ == "__main__":
    main()
