"""SFT under kills: the same command continues, and ends with the weights and figures of an uninterrupted run.

Kills at moments in the training: tests/test_stopped_trainings.py.
"""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from llamachat.runs import checkpoints as checkpoints_module
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.record import MetricsRecord
from tests.killed_steps import Commands, open_commands, results
from tests.sft.tiny_sft import toy_dialogs, write_dialogs, write_recipe

METHODS = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
    "qlora": {"method": "qlora", "rank": 4, "alpha": 8, "dropout": 0.1},
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    with open_commands(tmp_path_factory.mktemp("log"), "sft", {"sft.train": {}}) as opened:
        yield opened


@pytest.fixture(scope="module")
def dialogs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dialogs(tmp_path_factory.mktemp("data") / "dialogs.jsonl", toy_dialogs(40))


@dataclass(frozen=True)
class Run:
    """One recipe and where its step lies."""

    recipe: Path

    @property
    def step(self) -> StepFolder:
        return StepFolder(self.recipe.parent / "runs" / self.recipe.stem / "sft")

    def weights(self) -> bytes:
        (file,) = self.step.artifact.glob("*model.safetensors")
        return file.read_bytes()

    def figures(self, name: str) -> list[float]:
        return [row[name] for row in MetricsRecord(self.step.metrics).read() if name in row]


@pytest.fixture(scope="module")
def uninterrupted(
    commands: Commands, base16: Path, dialogs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Run, int]]:
    """By method: the run that nobody killed, and its file operations."""
    runs: dict[str, tuple[Run, int]] = {}

    def of(method: str) -> tuple[Run, int]:
        if method not in runs:
            folder = tmp_path_factory.mktemp(f"whole-{method}")
            run = Run(write_recipe(folder / "whole.yaml", base16, dialogs, {"tuning": METHODS[method]}))
            assert commands.run(run.recipe) == 0, commands.words()
            runs[method] = (run, commands.operations)
        return runs[method]

    return of


# --- kills


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_file_operations_it_ends_like_an_uninterrupted_run(
    method: str, commands: Commands, uninterrupted: Any, base16: Path, dialogs: Path, tmp_path: Path
):
    whole, operations = uninterrupted(method)
    run = Run(write_recipe(tmp_path / "killed.yaml", base16, dialogs, {"tuning": METHODS[method]}))
    # Shares of an uninterrupted run's operations, counted from each start.
    in_a_save = 0
    for share in (0.12, 0.26, 0.33, 0.22, 0.17):
        assert commands.run(run.recipe, kill_at=int(share * operations)) == -signal.SIGKILL, commands.words()
        in_a_save += any(run.step.checkpoints.glob(".incoming-*"))
        assert not run.step.artifact.exists()
    assert in_a_save >= 2
    assert commands.run(run.recipe) == 0, commands.words()
    assert results(run.step) == results(whole.step)
    steps = [row["step"] for row in MetricsRecord(run.step.metrics).read() if "sft/loss" in row]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 6
    assert not list(run.step.path.rglob(".incoming-*"))


@pytest.mark.parametrize(
    ("moment", "operation"),
    [
        ("before the summary", r"; os.rename .*/summary\.json$"),
        ("inside the artifact", r"; open .*/\.incoming-artifact/.*manifest"),
        ("before its rename", r"; os.rename .*/\.incoming-artifact .*/artifact$"),
        ("after its rename", r"^os.rename .*/\.incoming-artifact .*/artifact; "),
    ],
)
def test_killed_while_it_ends_a_step_is_published_whole_with_its_summary(
    moment: str, operation: str, commands: Commands, uninterrupted: Any, base16: Path, dialogs: Path, tmp_path: Path
):
    whole, _ = uninterrupted("full")
    run = Run(write_recipe(tmp_path / "late.yaml", base16, dialogs))
    assert commands.run(run.recipe, kill_on=operation) == -signal.SIGKILL, commands.words()
    assert run.step.summary.exists() == (moment != "before the summary")
    assert (run.step.path / ".incoming-artifact").exists() == (moment in ("inside the artifact", "before its rename"))
    assert run.step.artifact.exists() == (moment == "after its rename")
    assert commands.run(run.recipe) == 0, commands.words()
    assert results(run.step) == results(whole.step)
    assert (run.step.path.parent / "lineage.json").exists()


# --- what may change between a kill and the next start, and what may not


def test_operational_keys_may_change_when_it_resumes(commands: Commands, base16: Path, dialogs: Path, tmp_path: Path):
    sections = {"base": {"dtype": "float32", "model": str(base16)}, "sft": {"packing": False, "learning_rate": 1e-4}}
    whole, run = (
        Run(write_recipe(tmp_path / f"{name}.yaml", base16, dialogs, sections)) for name in ("whole", "killed")
    )
    assert commands.run(whole.recipe) == 0
    assert commands.run(run.recipe, kill_at=int(0.6 * commands.operations)) == -signal.SIGKILL
    reached = checkpoints_module.newest(run.step.checkpoints)
    assert reached and reached.step >= 2
    changed = (
        "run.keep_checkpoints=true",
        "sft.rows_per_microbatch=1",
        "tracking.save_every=1",
        "tracking.eval_every=4",
        "sft.row_tokens=64",
    )
    assert commands.run(run.recipe, *changed) == 0, commands.words()
    got, expected = (load_file(one.step.artifact / "model.safetensors") for one in (run, whole))
    assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < 1e-6
    losses = [one.figures("sft/loss") for one in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # The cadence is that of the last command, not the one in the checkpoint: both of the newest two are kept.
    last = len(losses[1])
    assert sorted(path.name for path in run.step.checkpoints.iterdir()) == [
        f"step-{last - 1:08d}",
        f"step-{last:08d}",
    ]
