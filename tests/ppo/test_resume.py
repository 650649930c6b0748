"""PPO under kills: the same command continues, and ends with the weights and figures of an uninterrupted run.

Commands are forked from one process that has the libraries loaded, and die at a chosen file operation in their run folder.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llamachat.runs.checkpoints import newest
from llamachat.runs.folder import StepFolder
from llamachat.runs.record import MetricsRecord
from tests.ppo.tiny_ppo import write_function, write_prompts
from tests.sft.test_resume import ENVIRONMENT, FORKING, ROOT
from tests.sft.tiny_sft import write_base

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"ppo": {"kl_control": "adaptive", "epochs": 2}, "tuning": {"method": "lora", "rank": 4, "alpha": 8}},
    "full": {"ppo": {"critic": "shared", "critic_warmup": 1}, "tuning": {"method": "full"}},
}


@dataclass
class Commands:
    """`llamachat ppo` in processes of its own."""

    process: "subprocess.Popen[str]"
    operations: int = 0  # of the last command, in its run folder

    def run(self, recipe: Path, *, kill_at: int = -1, kill_on: str = "$^") -> int:
        """The exit status, or -9 where it was killed."""
        assert self.process.stdin and self.process.stdout
        order = {"arguments": ["ppo", "--config", str(recipe)], "kill_at": kill_at, "kill_on": kill_on}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status, self.operations = json.loads(self.process.stdout.readline())
        return status


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    log = tmp_path_factory.mktemp("log") / "stderr"
    with (
        log.open("a") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", FORKING.replace("sft.train", "ppo.train")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
        ) as process,
    ):
        yield Commands(process)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece, dtype=torch.bfloat16)


def write_recipe(path: Path, base: Path, way: str) -> Path:
    folder = path.parent
    values = {
        "run": {"dir": str(folder / "runs" / path.stem), "seed": 1},
        "base": {"model": str(base), "dtype": "bfloat16", "max_tokens": 96},
        "tuning": WAYS[way]["tuning"],
        "data": {
            "sft": [],
            "prompts": [{"path": str(write_prompts(folder / "prompts.jsonl", 60))}],
            "split": {"test": 0.2, "validation": 0.2, "judge": 0.0},
        },
        "steps": ["ppo"],
        "scoring": {"combine": write_function(folder / "letter.py"), "unfinished_score": 0.5},
        "rollout": {"max_new_tokens": 8},
        "ppo": {
            "iterations": 5,
            "responses_per_iteration": 8,
            "responses_per_minibatch": 4,
            "learning_rate": 1e-3,
            "critic_learning_rate": 1e-3,
            "validation_every": 2,
            "validation_prompts": 6,
            "test_prompts": 6,
            "save_every": 2,
            **WAYS[way]["ppo"],
        },
        "tracking": {"mode": "off"},
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def results(recipe: Path) -> dict[str, Any]:
    """What a run made, without what the clock and the machine put in."""
    step = StepFolder(recipe.parent / "runs" / recipe.stem / "ppo")
    volatile = ("time", "throughput/", "memory/")
    rows = MetricsRecord(step.metrics).read()
    summary = json.loads(step.summary.read_text())
    return {
        "weights": {path.name: path.read_bytes() for path in step.artifact.glob("*model.safetensors")},
        "record": [[(n, row[n]) for n in sorted(row) if not n.startswith(volatile)] for row in rows],
        "summary": {name: value for name, value in summary.items() if not name.startswith(volatile)},
    }


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_file_operations_it_ends_like_an_uninterrupted_run(
    way: str, commands: Commands, base: Path, tmp_path: Path
) -> None:
    whole = write_recipe(tmp_path / "whole.yaml", base, way)
    assert commands.run(whole) == 0
    operations = commands.operations
    killed = write_recipe(tmp_path / "killed.yaml", base, way)
    step = StepFolder(tmp_path / "runs" / "killed" / "ppo")
    for share in (0.3, 0.45, 0.4):
        assert commands.run(killed, kill_at=int(share * operations)) == -signal.SIGKILL
        assert not step.artifact.exists()
    # While a checkpoint is put in its place, and while the step is published.
    for moment in (r"; os.rename .*/\.incoming-step-", r"; os.rename .*/\.incoming-artifact .*/artifact$"):
        commands.run(killed, kill_on=moment)
    assert newest(step.checkpoints) is not None
    assert commands.run(killed) == 0
    assert results(killed) == results(whole)
