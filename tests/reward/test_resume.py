"""Reward models under kills: the same call continues, and ends with the weights and figures of an uninterrupted run."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import reward
from llamachat.config.sections import Tuning
from llamachat.runs import checkpoints as checkpoints_module
from llamachat.runs.checkpoints import newest
from llamachat.runs.record import MetricsRecord
from llamachat.training.trainer import Watch
from reward import train as train_module
from reward.config import Config
from reward.train import Session
from tests.reward.tiny_reward import data_of, reward_inputs, toy_labels, toy_pairs
from tests.sft.tiny_sft import write_base
from tests.tiny_llama import LORA

ROOT = Path(__file__).resolve().parents[2]
STAGE = Config(epochs=2, pairs_per_step=8, learning_rate=3e-3)
METHODS = {
    "full": Tuning(),
    "lora": LORA.model_copy(update={"dropout": 0.1}),
    "qlora": LORA.model_copy(update={"method": "qlora", "dropout": 0.1}),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece, dtype=torch.bfloat16)


def stage_inputs(folder: Path, base: Path, method: str) -> Any:
    return reward_inputs(
        folder,
        base,
        which="safety",
        data=data_of(folder, helpfulness=toy_pairs(20), safety=toy_pairs(40, "the moon"), labels=toy_labels(24)),
        tuning=METHODS[method],
        tracking={"save_every": 2, "eval_every": 3},
        dtype="bfloat16",
    )


def results(step: Path) -> tuple[bytes, list[Any]]:
    rows = MetricsRecord(step / "metrics.jsonl").read()
    figures = [(row["step"], name, row[name]) for row in rows for name in row if name.startswith(("rm/", "optim/"))]
    (weights,) = (step / "artifact").glob("*model.safetensors")
    return weights.read_bytes(), figures


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By method: what a run that nobody stopped makes."""
    made: dict[str, tuple[bytes, list[Any]]] = {}

    def of(method: str) -> tuple[bytes, list[Any]]:
        if method not in made:
            inputs = stage_inputs(tmp_path_factory.mktemp(f"whole-{method}"), base, method)
            reward.run(STAGE, inputs)
            made[method] = results(inputs.folder.path)
        return made[method]

    return of


class StopError(Exception):
    """In place of a kill."""


def stop_at(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, *, call: int) -> None:
    """Let the call number `call` of `target.name` raise, and those before it do their work."""
    work, count = getattr(target, name), 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            raise StopError
        return work(*args, **kwargs)

    monkeypatch.setattr(target, name, counting)


MOMENTS: dict[str, tuple[str, Any, str, int]] = {
    "in the first step": ("lora", Watch, "on_step_begin", 1),
    "between two checkpoints, all weights": ("full", Watch, "on_step_end", 4),
    "between two checkpoints, adapter and head": ("lora", Watch, "on_step_end", 4),
    "between two checkpoints, on 4 bits": ("qlora", Watch, "on_step_end", 4),
    "inside a checkpoint": ("lora", torch, "save", 3),
    "before a checkpoint is marked whole": ("full", checkpoints_module, "write_json", 2),
    "in an evaluation": ("lora", Session, "measure", 3),
    "after the last checkpoint": ("lora", Session, "finish", 1),
    "before it is published": ("full", train_module, "publish_reward_model", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_at_any_moment_it_ends_like_an_uninterrupted_run(
    moment: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: Any
):
    method, target, name, call = MOMENTS[moment]
    inputs = stage_inputs(tmp_path, base, method)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_at(patch, target, name, call=call)
        reward.run(STAGE, inputs)
    assert not inputs.folder.artifact.exists()
    reward.run(STAGE, inputs)
    assert results(inputs.folder.path) == uninterrupted(method)


KILLED = """
import os, signal, sys
from pathlib import Path
import reward
from llamachat.training.trainer import Watch
from tests.reward.test_resume import STAGE, stage_inputs
work = Watch.on_step_end
def killing(self, args, state, control, **kwargs):
    if state.global_step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    work(self, args, state, control, **kwargs)
Watch.on_step_end = killing
reward.run(STAGE, stage_inputs(Path(sys.argv[1]), Path(sys.argv[2]), "lora"))
"""


def test_a_killed_process_leaves_a_checkpoint_that_another_goes_on_from(base: Path, tmp_path: Path, uninterrupted: Any):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(base), "5"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    inputs = stage_inputs(tmp_path, base, "lora")
    found = newest(inputs.folder.checkpoints)
    assert found is not None and found.step == 4
    reward.run(STAGE, inputs)
    assert results(inputs.folder.path) == uninterrupted("lora")
