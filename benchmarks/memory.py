"""Compare the memory of the recipe's steps with the estimates of `plan`: `python -m benchmarks.memory`.

Random Llama weights of about 100 M parameters, in a shape with equally many heads and key-value heads and a deeper one
with fewer, run through the project's steps: two optimizer steps of two micro-batches for sft, a reward model and PPO,
and a rollout. Each case runs in its own process and measures the growth from after loading to the peak: resident memory
on a CPU, memory reserved by torch's allocator on a GPU. Prints estimates by part, measurements, and their ratio.
`--check` makes a ratio outside 0.85 to 1.15 an error. This has never run on a GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Rollout, Tuning
from llamachat.memory.estimates import Estimate, Setup, Shape
from llamachat.memory.role_bytes import Beside, Lengths, Seating
from pipelines.planning.stage_costs import ppo_cost, reward_cost, sampling_memory, sft_cost
from ppo.config import Config as PpoConfig
from reward.config import Config as RewardConfig
from sft.config import Config as SftConfig

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "assets" / "base"
SHAPES = {
    "mha": Shape(768, 2048, 10, 12, 12, 32000),
    "gqa": Shape(640, 1728, 16, 10, 2, 32000),
    "deep": Shape(512, 1408, 24, 8, 4, 24000),  # not used to fit any formula
}
TOY = Shape(64, 128, 2, 4, 2, 32000)
BAND = (0.85, 1.15)
RANK = 16
# Freed blocks of at least this size return to the system at once, so that resident memory is that of live tensors.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


@dataclass(frozen=True, slots=True)
class Case:
    """One step with its sizes."""

    step: str  # sft, rm, rollout, ppo
    method: str = "full"
    tokens: int = 512  # of an sft row, an answer of a pair, or a prompt
    rows: int = 1  # padded rows of sft, prompts of a rollout, or responses of a PPO iteration
    new_tokens: int = 0  # of each sampled answer
    row_tokens: int = 0  # of a row in PPO's update
    checkpointing: bool = False
    attention: str = "sdpa"
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        sizes = {
            "sft": f"{self.rows} x {self.tokens} tokens",
            "rm": f"a pair of 2 x {self.tokens} tokens",
            "rollout": f"{self.rows} answers, {self.tokens} + {self.new_tokens} tokens",
            "ppo": f"{self.rows} answers, {self.tokens} + {self.new_tokens} tokens, rows of {self.row_tokens}",
        }[self.step]
        ways = [self.method, self.dtype, self.attention, *(["checkpointing"] if self.checkpointing else [])]
        return f"{self.step}: {', '.join(way for way in ways if way not in ('bfloat16', 'sdpa'))}, {sizes}"


CASES = (
    Case("sft", tokens=512),
    Case("sft", tokens=1024),
    Case("sft", tokens=1024, checkpointing=True),
    Case("sft", tokens=256, rows=4),
    Case("sft", tokens=1024, attention="eager"),
    Case("sft", tokens=1024, dtype="float32"),
    Case("sft", "lora", tokens=1024),
    Case("sft", "lora", tokens=2048, checkpointing=True),
    Case("rm", tokens=512),
    Case("rm", tokens=512, checkpointing=True),
    Case("rm", "lora", tokens=512),
    Case("rollout", tokens=128, rows=64, new_tokens=128),
    Case("rollout", "lora", tokens=512, rows=16, new_tokens=64),
    Case("ppo", tokens=128, rows=16, new_tokens=128, row_tokens=1024),
    Case("ppo", "lora", tokens=128, rows=16, new_tokens=128, row_tokens=1024),
    Case("ppo", "lora", tokens=128, rows=16, new_tokens=128, row_tokens=2048, checkpointing=True),
)


def base_of(case: Case, folder: Path) -> Base:
    """The section `base`, with the case's maximum sequence length."""
    longest = {"rollout": case.tokens + case.new_tokens, "ppo": case.tokens + case.new_tokens + 2}
    sizes = {"dtype": case.dtype, "attention": case.attention, "max_tokens": longest.get(case.step, case.tokens)}
    return Base.model_validate({"model": str(folder / "base"), **sizes})


def tuning_of(case: Case) -> Tuning:
    """The section `tuning`."""
    return Tuning.model_validate({"method": case.method, "rank": RANK})


def rollout_of(case: Case) -> Rollout:
    """The section `rollout`."""
    return Rollout(max_new_tokens=max(1, case.new_tokens))


def sft_config(case: Case) -> SftConfig:
    """The section `sft`; padded if the case has several rows."""
    return SftConfig(
        packing=case.rows == 1,
        row_tokens=case.tokens,
        rows_per_microbatch=case.rows,
        gradient_checkpointing=case.checkpointing,
    )


def reward_config(case: Case) -> RewardConfig:
    """The section `reward`, with one pair per row."""
    return RewardConfig(row_tokens=2 * case.tokens, gradient_checkpointing=case.checkpointing)


def ppo_config(case: Case) -> PpoConfig:
    """The section `ppo`."""
    return PpoConfig.model_validate(
        {
            "responses_per_iteration": case.rows,
            "responses_per_minibatch": case.rows,
            "tokens_per_microbatch": case.row_tokens,
            "gradient_checkpointing": case.checkpointing,
            "validation_prompts": 4,
            "test_prompts": 4,
        }
    )


def estimated(case: Case, shape: Shape, gpu: Gpu | None) -> Estimate:
    """The estimate of `plan` for the case."""
    setup = Setup(shape, base_of(case, BUNDLED.parent), tuning_of(case), gpu)
    if case.step == "sft":
        return sft_cost(sft_config(case), setup, dialogs=None)
    if case.step == "rm":
        return reward_cost(reward_config(case), setup, pairs=None)
    if case.step == "rollout":
        memory = sampling_memory(setup, rollout_of(case), Seating(), answers_at_once=case.rows)
        return Estimate(memory, loaded=frozenset(("trunk", "adapters and heads")))
    seating = Seating(beside={"helpfulness": Beside(shape, width=2)})
    return ppo_cost(ppo_config(case), setup, rollout_of(case), seating, Lengths())


def measure(case: Case, folders: dict[str, Path], shape: str) -> int:
    """Growth in bytes from after loading to the peak, measured in a separate process."""
    with tempfile.TemporaryDirectory() as scratch:
        copies = [Path(scratch) / name for name in ("toy", shape)]
        for copy in copies:  # a case writes next to links to the models
            copy.mkdir()
            for model in folders[copy.name].iterdir():
                (copy / model.name).symlink_to(model)
        request = json.dumps({"case": asdict(case), "folders": [str(copy) for copy in copies]})
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.workers.memory_case", request],
            env={**os.environ, **MALLOC, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{case}: the process failed\n{done.stderr[-3000:]}")
    return int(done.stdout.splitlines()[-1])


def write_models(folder: Path, shape: Shape, *, device: str = "cpu") -> Path:
    """Write a base and a reward model of the shape with random weights, in bf16, and a tokenizer of matching size.

    The weights are drawn on the device.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=4096,
        pad_token_id=0,
    )
    kinds: dict[str, Any] = {"base": LlamaForCausalLM, "reward": LlamaForSequenceClassification}
    for name, kind in kinds.items():
        with torch.device(device):
            model = kind._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder / name)
        config.num_labels = 1
        write_tokenizer_model(folder / name / "tokenizer.model", shape.vocabulary)
    return folder


def write_tokenizer_model(path: Path, size: int) -> None:
    """Write the bundled tokenizer, padded with pieces that occur in no text."""
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # protobuf creates its classes at import
    model = messages.ModelProto()
    model.ParseFromString((BUNDLED / "tokenizer.model").read_bytes())
    for number in range(len(model.pieces), size):
        model.pieces.add(piece=f"\ue000{number}", score=-1e4 - number)
    path.write_bytes(model.SerializeToString())


def report(case: Case, shape: str, estimate: Estimate, measured: int) -> str:
    """One line with the ratio, and one with the parts."""
    grown = estimate.grown_bytes
    parts = ", ".join(
        f"{name} {size / 2**20:.0f}" for name, size in estimate.memory.items() if size and name not in estimate.loaded
    )
    ratio = f"{grown / 2**20:>7.0f}{measured / 2**20:>10.0f}{grown / measured:>8.2f}"
    return f"{shape:<5}{case!s:<84}{ratio}\n     {parts}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of the steps against the planner's estimates, in MiB.")
    parser.add_argument("--only", default="", help="Part of a case's words, such as sft or 'ppo: lora'.")
    parser.add_argument("--times", type=float, default=1.0, help="Factor for the length of the rows, for a GPU.")
    parser.add_argument("--check", action="store_true", help="Fail where a ratio is outside 0.85 to 1.15.")
    options = parser.parse_args()

    import torch

    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = Gpu(properties.name, properties.total_memory / 2**30, None)
    place = gpu.name if gpu else f"{os.cpu_count()} cores"
    print(f"growth from after the load to the peak, MiB; {place}, torch {torch.__version__}")
    print(f"{'':<89}{'estimate':>7}{'measured':>9}{'ratio':>8}")
    outside = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: write_models(Path(scratch) / name, shape) for name, shape in ({"toy": TOY} | SHAPES).items()}
        for case in (case for case in CASES if options.only in str(case)):
            longer = replace(case, tokens=round(case.tokens * options.times))
            for name in SHAPES:
                estimate, measured = estimated(longer, SHAPES[name], gpu), measure(longer, folders, name)
                print(report(longer, name, estimate, measured), flush=True)
                if not BAND[0] <= estimate.grown_bytes / measured <= BAND[1]:
                    outside.append(f"{name} {longer}")
        shutil.rmtree(scratch, ignore_errors=True)
    if outside and options.check:
        raise SystemExit("outside the band:\n" + "\n".join(outside))


if __name__ == "__main__":
    main()
