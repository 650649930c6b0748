"""PPO under kills: the same command continues, and ends with the weights and figures of an uninterrupted run."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamachat.runs.artifacts import StepFolder
from llamachat.runs.checkpoints import newest
from tests.killed_steps import Commands, open_commands, results
from tests.ppo.tiny_ppo import config_of, write_function, write_prompts
from tests.tiny_steps import SPLIT, write_values

WAYS: dict[str, dict[str, Any]] = {
    "lora": {"ppo": {"kl_control": "adaptive", "epochs": 2}, "tuning": {"method": "lora", "rank": 4, "alpha": 8}},
    "rloo": {
        "ppo": {"advantages": "rloo", "responses_per_prompt": 4},
        "tuning": {"method": "lora", "rank": 4, "alpha": 8},
    },
    "full": {"ppo": {"critic": "shared", "critic_warmup": 1}, "tuning": {"method": "full"}},
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with open_commands(tmp_path_factory.mktemp("log"), "ppo", {"ppo.train": {}}) as opened:
        yield opened


def write_recipe(path: Path, base: Path, way: str) -> Path:
    folder = path.parent
    values = {
        "base": {"dtype": "bfloat16", "max_tokens": 96},
        "data": {"sft": [], "prompts": [{"path": str(write_prompts(folder / "prompts.jsonl", 60))}], "split": SPLIT},
        "scoring": {"combine": write_function(folder / "letter.py"), "unfinished_score": 0.5}
        | ({"length": {"shortest": 0.99, "longest": 1.01}} if way == "lora" else {}),
        "rollout": {"max_new_tokens": 8},
        "ppo": config_of(
            iterations=5, responses_per_iteration=8, responses_per_minibatch=4, validation_prompts=6, test_prompts=6
        ).model_dump(mode="json"),
    }
    return write_values(path, base, values, steps=["ppo"], **WAYS[way])


@pytest.mark.parametrize("way", WAYS)
def test_killed_at_file_operations_it_ends_like_an_uninterrupted_run(
    way: str, commands: Commands, base16: Path, tmp_path: Path
) -> None:
    whole = write_recipe(tmp_path / "whole.yaml", base16, way)
    assert commands.run(whole) == 0
    operations = commands.operations
    killed = write_recipe(tmp_path / "killed.yaml", base16, way)
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
