"""PPO under kills: the same command continues, and ends with the weights and figures of an uninterrupted run."""

import hashlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamachat.runs.artifacts import StepFolder, read_artifact
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


# Its scores are those of LETTER; at one call it does something else. The calls of all commands are counted.
FAILING = """from pathlib import Path

def score(prompts, completions, scores, **columns):
    result = [text.count("t") / (1 + len(text)) for text in completions]
    calls = Path(__file__).with_name("calls")
    calls.write_text(calls.read_text() + "x" if calls.is_file() else "x")
    if len(calls.read_text()) == {call}:
        {fault}
    return result
"""
# Call, what it does there, the line and words of the error, and the iterations that are kept. Calls 1 and 2 are the start's
# validation and test, 3 and 4 iterations; 5 repeats the failed one; after 6, 9 and 12, validations, comes the final test.
FAULTS = (
    (4, "result.pop()", 3, "returned 7 values for 8 completions", 1),
    (9, "result[0] = float('nan')", 3, "returned nan for completion 0", 4),
    (13, "result[8]", 8, "raised IndexError: list index out of range", 5),
)


def test_a_reward_function_that_fails_costs_nothing_but_its_own_call(
    commands: Commands, base16: Path, tmp_path: Path
) -> None:
    whole = write_recipe(tmp_path / "whole.yaml", base16, "lora")
    assert commands.run(whole) == 0
    recipe, file = write_recipe(tmp_path / "failing.yaml", base16, "lora"), tmp_path / "letter.py"
    step, uninterrupted = (StepFolder(tmp_path / "runs" / name / "ppo") for name in ("failing", "whole"))
    versions = []
    for call, fault, line, words, iterations in FAULTS:
        file.write_text(FAILING.format(call=call, fault=fault))
        versions.append(f"{hashlib.sha256(file.read_bytes()).hexdigest()}:score")
        assert commands.run(recipe) == 1
        assert f"{file}:{line}: 'score' {words}" in commands.words()
        checkpoint = newest(step.checkpoints)
        assert checkpoint is not None and checkpoint.step == iterations
    file.write_text("def score(:\n")
    assert commands.run(recipe) == 2
    assert f"scoring.combine: {file}:1: the file cannot be run: SyntaxError" in commands.words()
    file.write_text(FAILING.format(call=0, fault="pass"))
    assert commands.run(recipe) == 0
    assert len((tmp_path / "calls").read_text()) == 14
    assert results(step) == results(uninterrupted)
    manifest = read_artifact(step.path).manifest
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert manifest.identity["failed_functions"] == versions
    assert manifest.inputs["reward_function"] == f"{file}:score (SHA-256 {digest})"
    assert "failed_functions" not in json.loads(uninterrupted.identity.read_text())["identity"]
