"""PPO under kills: the same command continues, and ends with the weights and figures of an uninterrupted run."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llamachat.runs.artifacts import StepFolder
from llamachat.runs.checkpoints import newest
from tests.killed_steps import Commands, open_commands, results
from tests.ppo.tiny_ppo import write_function, write_prompts
from tests.sft.tiny_sft import write_base

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"ppo": {"kl_control": "adaptive", "epochs": 2}, "tuning": {"method": "lora", "rank": 4, "alpha": 8}},
    "full": {"ppo": {"critic": "shared", "critic_warmup": 1}, "tuning": {"method": "full"}},
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with open_commands(tmp_path_factory.mktemp("log"), "ppo", {"ppo.train": {}}) as opened:
        yield opened


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


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_file_operations_it_ends_like_an_uninterrupted_run(
    way: str, commands: Commands, base: Path, tmp_path: Path
) -> None:
    whole = write_recipe(tmp_path / "whole.yaml", base, way)
    assert commands.run(whole) == 0
    operations = commands.operations
    killed = write_recipe(tmp_path / "killed.yaml", base, way)
    step, uninterrupted = (StepFolder(tmp_path / "runs" / name / "ppo") for name in ("killed", "whole"))
    for share in (0.3, 0.45, 0.4):
        assert commands.run(killed, kill_at=int(share * operations)) == -signal.SIGKILL
        assert not step.artifact.exists()
    # While a checkpoint is put in its place, and while the step is published.
    for moment in (r"; os.rename .*/\.incoming-step-", r"; os.rename .*/\.incoming-artifact .*/artifact$"):
        commands.run(killed, kill_on=moment)
    assert newest(step.checkpoints) is not None
    assert commands.run(killed) == 0
    assert results(step) == results(uninterrupted)
