"""SFT under kills: the same command continues, and ends with the weights and figures of an uninterrupted run.

Most commands are forked from one process that has the libraries loaded, since importing them takes longer than the
training; one test starts them from the shell, as a user does.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sft
from llamachat.runs import checkpoints as checkpoints_module
from llamachat.runs.folder import StepFolder
from llamachat.runs.record import MetricsRecord, SamplesRecord
from llamachat.training.trainer import Watch
from sft import train as train_module
from sft.config import Config
from sft.train import Session
from tests.sft.tiny_sft import inputs_of, toy_dialogs, write_base, write_dialogs, write_recipe
from tests.tiny_llama import LORA

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
METHODS = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "rank": 4, "alpha": 8, "dropout": 0.1},
    "qlora": {"method": "qlora", "rank": 4, "alpha": 8, "dropout": 0.1},
}

# Reads {"arguments": [...], "kill_at": n, "kill_on": pattern} a line; is killed at its n-th file operation in the run
# folder, or where "the last one; this one" fits the pattern; answers with the exit status and the number of such operations.
FORKING = """
import json, os, re, signal, sys
import peft, sft.train, llamachat.tracking.curves
from pipelines.cli.main import main

def child(order, counted):
    os.dup2(2, 1)
    count, before = 0, ""
    def hook(event, arguments):
        nonlocal count, before
        if event == "open" or event.startswith(("os.", "shutil.")):
            paths = [str(a) for a in arguments if isinstance(a, (str, os.PathLike)) and "/runs/" in str(a)]
            count += bool(paths)
            now = " ".join([event, *paths])
            if paths and (count == order["kill_at"] or re.search(order["kill_on"], f"{before}; {now}")):
                os.kill(os.getpid(), signal.SIGKILL)
            before = now if paths else before
    sys.addaudithook(hook)
    status = main(order["arguments"])
    os.write(counted, str(count).encode())
    return status

for line in sys.stdin:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = child(json.loads(line), writing)
        finally:
            os._exit(status)
    os.close(writing)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([status, int(os.read(reading, 20) or 0)]), flush=True)
    os.close(reading)
"""


@dataclass
class Commands:
    """The command line in processes of its own."""

    process: "subprocess.Popen[str]"
    log: Path
    operations: int = 0  # of the last command, in its run folder

    def run(self, recipe: Path, *overrides: str, kill_at: int = -1, kill_on: str = "$^") -> int:
        """The exit status of `llamachat sft`, or -9 where it was killed."""
        assert self.process.stdin and self.process.stdout
        self.log.write_text("")
        order = {"arguments": ["sft", "--config", str(recipe), *overrides], "kill_at": kill_at, "kill_on": kill_on}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status, self.operations = json.loads(self.process.stdout.readline())
        return status

    def words(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    log = tmp_path_factory.mktemp("log") / "stderr"
    with (
        log.open("a") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
        ) as process,
    ):
        yield Commands(process, log)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece, dtype=torch.bfloat16)


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

    def record(self) -> list[dict[str, float]]:
        """Every line in order, without what the clock and the machine put in."""
        volatile = ("time", "throughput/", "memory/")
        rows = MetricsRecord(self.step.metrics).read()
        return [{name: value for name, value in row.items() if not name.startswith(volatile)} for row in rows]

    def samples(self) -> list[dict[str, Any]]:
        return [{**row, "time": 0} for row in SamplesRecord(self.step.samples).read()]

    def summary(self) -> dict[str, float]:
        figures = json.loads(self.step.summary.read_text())
        return {name: value for name, value in figures.items() if not name.startswith(("time/", "memory/"))}


def assert_same(run: Run, whole: Run) -> None:
    assert run.weights() == whole.weights()
    assert run.record() == whole.record()
    assert run.samples() == whole.samples()
    assert run.summary() == whole.summary()


@pytest.fixture(scope="module")
def uninterrupted(
    commands: Commands, base: Path, dialogs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Run, int]]:
    """By method: the run that nobody killed, and its file operations."""
    made: dict[str, tuple[Run, int]] = {}

    def of(method: str) -> tuple[Run, int]:
        if method not in made:
            folder = tmp_path_factory.mktemp(f"whole-{method}")
            run = Run(write_recipe(folder / "whole.yaml", base, dialogs, {"tuning": METHODS[method]}))
            assert commands.run(run.recipe) == 0, commands.words()
            made[method] = (run, commands.operations)
        return made[method]

    return of


# --- kills


@pytest.mark.parametrize("method", METHODS)
def test_killed_at_file_operations_it_ends_like_an_uninterrupted_run(
    method: str, commands: Commands, uninterrupted: Any, base: Path, dialogs: Path, tmp_path: Path
):
    whole, operations = uninterrupted(method)
    run = Run(write_recipe(tmp_path / "killed.yaml", base, dialogs, {"tuning": METHODS[method]}))
    # Shares of an uninterrupted run's operations, counted anew by each start.
    in_a_save = 0
    for share in (0.12, 0.26, 0.33, 0.22, 0.17):
        assert commands.run(run.recipe, kill_at=int(share * operations)) == -signal.SIGKILL, commands.words()
        in_a_save += any(run.step.checkpoints.glob(".incoming-*"))
        assert not run.step.artifact.exists()
    assert in_a_save >= 2
    assert commands.run(run.recipe) == 0, commands.words()
    assert_same(run, whole)
    steps = [row["step"] for row in run.record() if "sft/loss" in row]
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
    moment: str, operation: str, commands: Commands, uninterrupted: Any, base: Path, dialogs: Path, tmp_path: Path
):
    whole, _ = uninterrupted("full")
    run = Run(write_recipe(tmp_path / "late.yaml", base, dialogs))
    assert commands.run(run.recipe, kill_on=operation) == -signal.SIGKILL, commands.words()
    assert run.step.summary.exists() == (moment != "before the summary")
    assert (run.step.path / ".incoming-artifact").exists() == (moment in ("inside the artifact", "before its rename"))
    assert run.step.artifact.exists() == (moment == "after its rename")
    assert commands.run(run.recipe) == 0, commands.words()
    assert_same(run, whole)
    assert (run.step.path.parent / "lineage.json").exists()


def started(recipe: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "pipelines", "sft", "--config", str(recipe)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]", *, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, "the moment to kill has not come"
        time.sleep(0.001)


def test_from_the_shell_killed_then_done_then_nothing_to_do(
    commands: Commands, uninterrupted: Any, base: Path, dialogs: Path, tmp_path: Path
):
    whole, _ = uninterrupted("full")
    run = Run(write_recipe(tmp_path / "shell.yaml", base, dialogs))
    checkpoints = run.step.checkpoints
    moments: list[Callable[[], bool]] = [
        lambda: any(checkpoints.glob(".incoming-step-*")),
        lambda: (checkpoints / "step-00000004").exists(),
    ]
    for moment in moments:
        with started(run.recipe) as process:
            owner = f"{process.pid}"
            wait_until(lambda: run.step.lock.exists() and owner in run.step.lock.read_text(), process)  # noqa: B023
            assert commands.run(run.recipe) == 1  # two at once: the second is refused
            assert f"process {owner} " in commands.words()
            wait_until(moment, process)
            process.kill()
    with started(run.recipe) as process:
        assert process.wait(timeout=300) == 0
    assert_same(run, whole)
    begun = time.monotonic()
    with started(run.recipe) as process:
        _, words = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "nothing to do" in words
    assert time.monotonic() - begun < 10
    assert_same(run, whole)


# --- what may change between a kill and the next start, and what may not


def test_operational_keys_may_change_when_it_resumes(commands: Commands, base: Path, dialogs: Path, tmp_path: Path):
    sections = {"base": {"dtype": "float32", "model": str(base)}, "sft": {"packing": False, "learning_rate": 1e-4}}
    whole, run = (Run(write_recipe(tmp_path / f"{name}.yaml", base, dialogs, sections)) for name in ("whole", "killed"))
    assert commands.run(whole.recipe) == 0
    assert commands.run(run.recipe, kill_at=int(0.6 * commands.operations)) == -signal.SIGKILL
    reached = checkpoints_module.newest(run.step.checkpoints)
    assert reached and reached.step >= 2
    changed = ("sft.rows_per_microbatch=1", "tracking.save_every=1", "tracking.eval_every=4", "sft.row_tokens=64")
    assert commands.run(run.recipe, *changed) == 0, commands.words()
    got, expected = (load_file(one.step.artifact / "model.safetensors") for one in (run, whole))
    assert max(float((got[name] - expected[name]).abs().max()) for name in expected) < 1e-6
    losses = [[row["sft/loss"] for row in one.record() if "sft/loss" in row] for one in (run, whole)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    # The cadence is that of the last command, not the one in the checkpoint: both of the newest two are kept.
    last = len(losses[1])
    assert sorted(path.name for path in run.step.checkpoints.iterdir()) == [
        f"step-{last - 1:08d}",
        f"step-{last:08d}",
    ]


def test_a_changed_learning_rate_is_refused_with_both_ways_out(commands: Commands, uninterrupted: Any):
    whole, _ = uninterrupted("full")
    before = whole.weights()
    assert commands.run(whole.recipe, "sft.learning_rate=0.5") == 2
    words = commands.words()
    assert "sft.learning_rate: 0.001 -> 0.5" in words
    assert "run.dir=NEW run.parent=" in words and "--overwrite" in words
    assert whole.weights() == before


# --- the same with exceptions, in this process, at moments that a kill seldom meets


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


MOMENTS: dict[str, tuple[Any, str, int]] = {
    "in the first step": (Watch, "on_step_begin", 1),
    "between two checkpoints": (Watch, "on_step_end", 4),
    "when a step is written down": (Watch, "on_log", 5),
    "inside the first checkpoint": (torch, "save", 2),
    "before a checkpoint is marked whole": (checkpoints_module, "write_json", 2),
    "before older checkpoints go": (checkpoints_module, "_prune", 2),
    "in an evaluation": (Session, "measure", 3),
    "while sampling": (Session, "sample", 1),
    "after the last checkpoint": (Session, "finish", 1),
    "before it is published": (train_module, "publish_policy", 1),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_stopped_at_any_moment_it_ends_like_an_uninterrupted_run(
    moment: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_process: tuple[bytes, list[Any]]
):
    inputs = stage_inputs(tmp_path, base)
    with monkeypatch.context() as patch, pytest.raises(StopError):
        target, name, call = MOMENTS[moment]
        stop_at(patch, target, name, call=call)
        sft.run(STAGE, inputs)
    assert not inputs.folder.artifact.exists()
    sft.run(STAGE, inputs)
    assert results(inputs.folder.path) == in_process


STAGE = Config(epochs=2, examples_per_step=8, learning_rate=1e-3, sample_prompts=1)


def stage_inputs(folder: Path, base: Path) -> Any:
    tracking = {"save_every": 2, "eval_every": 3, "sample_every": 5}
    tuning = LORA.model_copy(update={"dropout": 0.1})
    return inputs_of(folder, base, toy_dialogs(30), tuning=tuning, tracking=tracking, dtype="bfloat16")


def results(step: Path) -> tuple[bytes, list[Any]]:
    rows = MetricsRecord(step / "metrics.jsonl").read()
    figures = [(row["step"], name, row[name]) for row in rows for name in row if name.startswith(("sft/", "optim/"))]
    return (step / "artifact" / "adapter_model.safetensors").read_bytes(), figures


@pytest.fixture(scope="module")
def in_process(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Any]]:
    inputs = stage_inputs(tmp_path_factory.mktemp("whole"), base)
    sft.run(STAGE, inputs)
    return results(inputs.folder.path)
