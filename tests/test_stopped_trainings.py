"""SFT, reward models and DPO, stopped by an exception or a kill at any moment: the same call resumes, and ends with the weights
and figures of an uninterrupted training.
"""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dpo
import reward
import sft
from dpo import train as dpo_module
from dpo import tuning as pairs_module
from dpo.config import Config as DpoConfig
from llamachat.config.sections import Tuning
from llamachat.runs import checkpoints as checkpoints_module
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.checkpoints import newest
from llamachat.training.session import Session
from llamachat.training.trainer import Watch
from reward import train as reward_module
from reward.config import Config as RewardConfig
from sft import train as sft_module
from sft.config import Config as SftConfig
from sft.tuning import Tuning as Dialogs
from tests.dpo.tiny_dpo import dpo_inputs
from tests.killed_steps import ENVIRONMENT, ROOT, results
from tests.reward.tiny_reward import data_of, reward_inputs, toy_labels, toy_pairs
from tests.sft.tiny_sft import inputs_of, toy_dialogs, write_base
from tests.tiny_llama import LORA

METHODS = {
    "full": Tuning(),
    "lora": LORA.model_copy(update={"dropout": 0.1}),
    "qlora": LORA.model_copy(update={"method": "qlora", "dropout": 0.1}),
}
TRACKING = {"save_every": 2, "eval_every": 3, "sample_every": 5}


def tune(folder: Path, base: Path, method: str) -> StepFolder:
    config = SftConfig(epochs=2, examples_per_step=8, learning_rate=1e-3, sample_prompts=1)
    tuning = METHODS[method]
    inputs = inputs_of(folder, base, toy_dialogs(30), tuning=tuning, tracking=TRACKING, dtype="bfloat16")
    return StepFolder(sft.run(config, inputs).path.parent)


def rank(folder: Path, base: Path, method: str) -> StepFolder:
    config = RewardConfig(epochs=2, pairs_per_step=8, learning_rate=3e-3)
    data = data_of(folder, helpfulness=toy_pairs(20), safety=toy_pairs(40, "the moon"), labels=toy_labels(24))
    inputs = reward_inputs(
        folder, base, which="safety", data=data, tuning=METHODS[method], tracking=TRACKING, dtype="bfloat16"
    )
    return StepFolder(reward.run(config, inputs).path.parent)


def prefer(folder: Path, base: Path, method: str) -> StepFolder:
    config = DpoConfig(epochs=2, pairs_per_step=8, learning_rate=3e-3, sample_prompts=1)
    inputs = dpo_inputs(folder, base, tuning=METHODS[method], tracking=TRACKING, dtype="bfloat16")
    return StepFolder(dpo.run(config, inputs).path.parent)


TRAININGS: dict[str, tuple[Callable[[Path, Path, str], StepFolder], str]] = {
    "sft": (tune, "sft"),
    "reward": (rank, "rm/safety"),
    "dpo": (prefer, "dpo"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def uninterrupted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """By training and method: what one that nobody stopped makes."""
    by_training: dict[tuple[str, str], Any] = {}

    def of(training: str, method: str) -> Any:
        if (training, method) not in by_training:
            folder = tmp_path_factory.mktemp(f"whole-{training}-{method}")
            by_training[training, method] = results(TRAININGS[training][0](folder, base, method))
        return by_training[training, method]

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


@pytest.mark.parametrize(
    ("training", "method", "target", "name", "call"),
    [
        pytest.param("sft", "lora", Watch, "on_step_begin", 1, id="sft, in the first step"),
        pytest.param("sft", "lora", Watch, "on_step_end", 4, id="sft, between two checkpoints"),
        pytest.param("sft", "lora", Watch, "on_log", 5, id="sft, when a step is written down"),
        pytest.param("sft", "lora", torch, "save", 2, id="sft, inside the first checkpoint"),
        pytest.param("sft", "lora", checkpoints_module, "_prune", 2, id="sft, before older checkpoints go"),
        pytest.param("sft", "lora", Session, "measure", 3, id="sft, in an evaluation"),
        pytest.param("sft", "lora", Dialogs, "sample", 1, id="sft, while sampling"),
        pytest.param("sft", "lora", sft_module, "publish_policy", 1, id="sft, before it is published"),
        pytest.param("reward", "full", Watch, "on_step_end", 4, id="reward, between two checkpoints, all weights"),
        pytest.param("reward", "lora", Watch, "on_step_end", 4, id="reward, between two, adapter and head"),
        pytest.param("reward", "qlora", Watch, "on_step_end", 4, id="reward, between two, on 4 bits"),
        pytest.param("reward", "full", checkpoints_module, "write_json", 2, id="reward, before one is marked whole"),
        pytest.param("reward", "lora", Session, "finish", 1, id="reward, after the last checkpoint"),
        pytest.param("reward", "full", reward_module, "publish_reward_model", 1, id="reward, before it is published"),
        pytest.param("dpo", "lora", pairs_module, "answer_logprobs", 2, id="dpo, while the reference is computed"),
        pytest.param("dpo", "lora", Watch, "on_step_begin", 2, id="dpo, before its first checkpoint"),
        pytest.param("dpo", "full", Watch, "on_step_end", 4, id="dpo, between two checkpoints, all weights"),
        pytest.param("dpo", "lora", Watch, "on_step_end", 4, id="dpo, between two, an adapter"),
        pytest.param("dpo", "qlora", Watch, "on_step_end", 4, id="dpo, between two, on 4 bits"),
        pytest.param("dpo", "lora", dpo_module, "publish_policy", 1, id="dpo, before it is published"),
    ],
)
def test_stopped_at_any_moment_it_ends_like_an_uninterrupted_training(
    training: str,
    method: str,
    target: Any,
    name: str,
    call: int,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[str, str], Any],
) -> None:
    train, step = TRAININGS[training]
    with monkeypatch.context() as patch, pytest.raises(StopError):
        stop_at(patch, target, name, call=call)
        train(tmp_path, base, method)
    assert not StepFolder(tmp_path / "runs" / "one" / step).artifact.exists()
    assert results(train(tmp_path, base, method)) == uninterrupted(training, method)


KILLED = """
import os, signal, sys
from pathlib import Path
from llamachat.training.trainer import Watch
from tests.test_stopped_trainings import rank
work = Watch.on_step_end
def killing(self, args, state, control, **kwargs):
    if state.global_step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    work(self, args, state, control, **kwargs)
Watch.on_step_end = killing
rank(Path(sys.argv[1]), Path(sys.argv[2]), "lora")
"""


def test_a_killed_process_leaves_a_checkpoint_that_another_resumes_from(
    base: Path, tmp_path: Path, uninterrupted: Callable[[str, str], Any]
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(base), "5"]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    checkpoint = newest(tmp_path / "runs" / "one" / "rm" / "safety" / "checkpoints")
    assert checkpoint is not None and checkpoint.step == 4
    assert results(rank(tmp_path, base, "lora")) == uninterrupted("reward", "lora")
