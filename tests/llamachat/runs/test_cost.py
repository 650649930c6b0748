"""What a step has cost: seconds, peak memory and starts, also of commands that were killed."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

import sft
from llamachat import distributed
from llamachat.errors import DataError
from llamachat.runs import state as state_module
from llamachat.runs.artifacts import Artifact, StepFolder
from llamachat.runs.atomic import StorageError
from llamachat.runs.state import Cost, counted, peak_memory, read_cost, reset_peak
from pipelines.recipe.recipe import load
from tests.recipes import publish_toy_policy, run_command, write_recipe

ROOT = Path(__file__).resolve().parents[3]


def test_seconds_and_starts_add_up_and_the_largest_peak_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, peaks = StepFolder(tmp_path), iter([0.5, 2.0, 0.5, 0.75])
    assert read_cost(folder) is None
    monkeypatch.setattr(state_module, "peak_memory", lambda: next(peaks))
    for _ in range(2):
        with counted(folder):
            time.sleep(0.1)
    cost = read_cost(folder) or Cost()
    assert (cost.peak_gib, cost.starts) == (2.0, 2) and 0.2 <= cost.seconds < 5
    assert sorted(json.loads(folder.cost.read_text())) == ["peak_gib", "seconds", "starts"]


@pytest.mark.parametrize(
    "text", ["", "[]", "[1", '{"seconds": "x"}', "{}", '{"seconds": null, "peak_gib": 1, "starts": 1}']
)
def test_a_damaged_file_is_counted_from_zero(tmp_path: Path, text: str) -> None:
    folder = StepFolder(tmp_path)
    folder.cost.write_text(text)
    assert read_cost(folder) is None
    with counted(folder):
        pass
    assert (read_cost(folder) or Cost()).starts == 1


KILLED = """
import os, signal, sys, time
from pathlib import Path
from llamachat.runs import state as cost
from llamachat.runs.artifacts import StepFolder
cost.EVERY_S = 0.05
with cost.counted(StepFolder(Path(sys.argv[1]))):
    time.sleep(0.6)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_command_is_counted_up_to_its_last_refresh(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == -signal.SIGKILL
    cost = read_cost(StepFolder(tmp_path)) or Cost()
    assert cost.starts == 1 and 0.3 < cost.seconds < 5 and cost.peak_gib > 0.005


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system sets no peak back")
def test_the_peak_is_that_of_the_step_and_not_of_the_one_before() -> None:
    large = bytearray(os.urandom(1 << 20) * 400)
    before = peak_memory()
    del large
    reset_peak()
    assert peak_memory() < before - 0.3
    again = bytearray(os.urandom(1 << 20) * 400)
    assert peak_memory() > before - 0.1 and len(again) == 400 << 20


def test_without_the_files_of_linux_the_peak_is_that_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "_CLEAR_REFS", tmp_path / "none" / "clear_refs")
    monkeypatch.setattr(state_module, "_STATUS", tmp_path / "none" / "status")
    reset_peak()
    assert 0.01 < peak_memory() < 64


def test_the_cost_is_refreshed_while_torch_is_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    partial = ModuleType("torch")  # as the refreshing thread sees it: `cuda` and `distributed` are not there yet
    partial.__spec__ = ModuleSpec("torch", None)
    partial.__spec__._initializing = True  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torch", partial)
    reset_peak()
    assert peak_memory() > 0.01 and distributed.is_first()


def test_a_disk_that_is_full_as_the_work_ends_does_not_undo_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StorageError("no space left")

    with counted(StepFolder(tmp_path)):
        monkeypatch.setattr(state_module, "write_json", full)
    assert (read_cost(StepFolder(tmp_path)) or Cost()).starts == 1


def test_each_command_that_works_on_a_step_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, calls = load(write_recipe(tmp_path)), []

    def run(config: object, inputs: object) -> Artifact:
        calls.append(inputs)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return publish_toy_policy(config, inputs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(sft, "run", run)
    with pytest.raises(KeyboardInterrupt):
        run_command(recipe, "sft")
    (artifact,) = run_command(recipe, "sft")
    run_command(recipe, "sft")
    folder = StepFolder(artifact.path.parent)
    assert (read_cost(folder) or Cost()).starts == 2, "a step that is done already costs nothing"
    assert "cost.json" not in artifact.manifest.files and "cost" not in json.dumps(artifact.manifest.identity)


def test_a_refused_start_leaves_nothing_to_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Artifact:
        raise DataError("data.sft: holds nothing")

    monkeypatch.setattr(sft, "run", refuse)
    recipe = load(write_recipe(tmp_path))
    with pytest.raises(DataError):
        run_command(recipe, "sft")
    assert not StepFolder(Path(recipe.run.dir) / "sft").cost.exists()
