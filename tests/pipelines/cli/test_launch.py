"""Commands that several processes work on, started as a user starts them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from llamachat.errors import UsageError
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.record import MetricsRecord
from pipelines.cli import launch as launching
from pipelines.cli.main import main
from tests.killed_steps import ENVIRONMENT, ROOT
from tests.recipes import write_recipe as write_toy_recipe
from tests.sft.tiny_sft import toy_dialogs, write_base, write_dialogs, write_recipe

LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "2"]
REST = ["--cpu", "--num_processes", "3", "-m", "pipelines", "sft", "run.dir=runs/x"]


@pytest.fixture
def recipe(tmp_path: Path, tiny_sentencepiece: bytes) -> Path:
    base = write_base(tmp_path / "base", tiny_sentencepiece)
    dialogs = write_dialogs(tmp_path / "dialogs.jsonl", toy_dialogs(60))
    return write_recipe(tmp_path / "tiny.yaml", base, dialogs, {"base": {"dtype": "float32"}, "sft": {"epochs": 4}})


def launched(recipe: Path, log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    command = [*LAUNCH, "-m", "pipelines", "sft", "--config", str(recipe), *arguments]
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=stream, stdout=stream)


MEETING = """
import sys
from llamachat import distributed
from pipelines.cli.main import main
distributed.MEETING_S, distributed._SAY_AFTER_S = float(sys.argv[1]), 0.1
sys.exit(main(sys.argv[2:]))
"""


def left_alone(recipe: Path, seconds: float, **changes: str) -> "subprocess.Popen[str]":
    """A command with the variables of a launcher that is gone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | changes
    command = [sys.executable, "-c", MEETING, str(seconds), "sft", "--config", str(recipe)]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT | variables, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_whose_others_never_come_says_so_and_ends(tmp_path: Path, rank: str) -> None:
    with left_alone(write_toy_recipe(tmp_path), 1.0, RANK=rank) as process:
        _, words = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"process {rank}: waiting at 127.0.0.1:" in words and "for all 2 processes of WORLD_SIZE" in words
    assert "not all arrived within 1 s" in words and "unset WORLD_SIZE" in words and "Traceback" not in words


def test_a_process_that_waits_for_others_obeys_signals(tmp_path: Path) -> None:
    with left_alone(write_toy_recipe(tmp_path), 600.0) as process:
        assert process.stderr is not None
        while "waiting at" not in (line := process.stderr.readline()):
            assert line, "it has not ended"
        sent = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130 and time.monotonic() - sent < 20
        assert "interrupted" in process.stderr.read()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "b"}, "WORLD_SIZE: the environment has 'b'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE: the environment has '-2'"),
        ({"WORLD_SIZE": "2", "RANK": "first"}, "RANK: the environment has 'first'"),
    ],
)
def test_variables_that_are_no_numbers_are_reported(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["plan"]) == 2
    assert words in capsys.readouterr().err


def test_two_processes_die_with_their_launcher_and_one_continues(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    launcher = launched(recipe, log)
    wait_for_steps(5, tmp_path, launcher)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    launcher.send_signal(signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive and len(workers) == 3, f"{workers}: one that starts, and two that work\n{log.read_text()}"
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", "sft", "--config", str(recipe)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    steps = [
        row["sft/step"]
        for row in MetricsRecord(StepFolder(tmp_path / "runs/tiny/sft").metrics).read()
        if "sft/loss" in row
    ]
    assert steps == sorted(set(steps)) and len(steps) > 20


def test_an_error_is_reported_once_and_with_the_same_exit_status(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    launcher = launched(recipe, log, "data.split.validation=0.999")
    assert launcher.wait(timeout=120) != 0
    words = log.read_text()
    assert words.count("Both are needed") == 1
    assert "returned non-zero exit status 2" in words  # what accelerate says of the command's own


def wait_for_steps(count: int, place: Path, command: "subprocess.Popen[bytes]") -> None:
    """Until the training has done this many optimizer steps, or the command has ended."""
    record, ends = StepFolder(place / "runs/tiny/sft").metrics, time.monotonic() + 120
    while time.monotonic() < ends and command.poll() is None:
        if record.is_file() and record.read_text().count('"sft/loss"') >= count:
            return
        time.sleep(0.05)


def divided(recipe: Path, log: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    """The command whose two processes it starts itself."""
    command = [sys.executable, "-m", "pipelines", "sft", "--config", str(recipe), "run.processes=2", *arguments]
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=stream, stdout=stream)


def test_a_command_divides_its_work_is_interrupted_and_resumes(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = divided(recipe, log)
    wait_for_steps(5, tmp_path, command)
    workers = psutil.Process(command.pid).children(recursive=True)
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=60) == 130, log.read_text()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive and len(workers) == 2
    assert divided(recipe, log).wait(timeout=120) == 0, log.read_text()
    alone = divided(recipe, tmp_path / "alone", "run.processes=1", f"run.dir={tmp_path}/alone-run")
    assert alone.wait(timeout=120) == 0
    losses = [
        [row["sft/loss"] for row in MetricsRecord(StepFolder(place / "sft").metrics).read() if "sft/loss" in row]
        for place in (tmp_path / "runs/tiny", tmp_path / "alone-run")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) > 20


def test_a_report_is_written_by_one_of_several_processes(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = [
        "-m",
        "pipelines",
        "all",
        "--config",
        str(recipe),
        "run.processes=2",
        "steps=[sft, report]",
        "sft.epochs=1",
    ]
    with log.open("wb") as stream:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, stderr=stream, stdout=stream, timeout=200
        )
    assert done.returncode == 0, log.read_text()
    assert (tmp_path / "runs/tiny/report/report.html").is_file()


def test_a_divided_command_says_which_signal_has_ended_it(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = divided(recipe, log)
    wait_for_steps(2, tmp_path, command)
    psutil.Process(command.pid).children()[1].kill()
    assert command.wait(timeout=60) == 1
    assert "SIGKILL" in log.read_text() and "run.processes=1" in log.read_text()


def test_without_a_free_port_the_command_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr(launching.random, "sample", lambda ports, count: [taken.getsockname()[1]])
        with pytest.raises(UsageError, match=r"run\.processes=1"):
            launching.start(2, ["sft"])


def test_a_divided_command_has_the_exit_status_of_its_error(recipe: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert divided(recipe, log, "data.split.validation=0.999").wait(timeout=120) == 2
    assert log.read_text().count("Both are needed") == 1


@pytest.mark.parametrize(
    ("environment", "command", "expected"),
    [
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, ["accelerate", "launch", *REST], 3),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "3"}, ["accelerate", "launch", *REST], 0),
        ({"ACCELERATE_USE_CPU": "True"}, ["accelerate", "launch", *REST], 0),
        ({"MASTER_ADDR": "127.0.0.1"}, ["accelerate", "launch", *REST], 0),
        ({"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}, ["bash"], 0),
    ],
)  # fmt: skip
def test_the_processes_that_accelerate_did_not_start(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], command: list[str], expected: int
) -> None:
    for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parent: Any = SimpleNamespace(cmdline=lambda: command)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    assert launching.missing_processes() == expected


def test_several_machines_without_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    parent: Any = SimpleNamespace(cmdline=lambda: ["accelerate", "launch", "--num_machines", "2", *REST])
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    assert main(["sft"]) == 2
    assert capsys.readouterr().err.startswith("llamachat: accelerate launch --cpu --num_machines 2:")


def test_how_many_a_configuration_asks_for(tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 2\nuse_cpu: true\n")
    assert launching.requested_processes(["--config_file", str(config), "-m", "pipelines", "sft"]) == 2
    assert launching.requested_processes(["--cpu", "-m", "pipelines", "sft"]) == 0
    with pytest.raises(UsageError, match="torchrun --nnodes 2 --nproc_per_node 2"):
        launching.requested_processes(
            ["--cpu", "--num_processes", "4", "--num_machines", "2", "-m", "pipelines", "sft"]
        )


STUCK = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pipelines.cli import launch, main
launch.THREADS_MAY_TAKE = {seconds}
def work():
    time.sleep({sleep})
if {pool}:
    ThreadPoolExecutor(1, thread_name_prefix="of-the-user").submit(work)
else:
    threading.Thread(target=work, name="of-the-user", daemon={daemon}).start()
sys.argv = ["llamachat", *{words}]
sys.exit(main.main())
"""


def test_a_thread_that_never_ends_does_not_keep_the_command_alive() -> None:
    usual = {"seconds": 0.5, "sleep": 1000, "pool": False, "daemon": False, "words": ["plan", "--presets"]}
    cases = (
        ({}, 0, True),
        ({"pool": True}, 0, True),
        ({"words": ["plan", "--config", "none.yaml"]}, 2, True),
        ({"daemon": True}, 0, False),
        ({"sleep": 0.2, "seconds": 30}, 0, False),
    )
    for changes, status, is_named in cases:
        code = STUCK.format(**(usual | changes))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == status, (changes, done.stderr)
        assert ("of-the-user" in done.stderr) == is_named, (changes, done.stderr)
        assert done.stdout or status, "what was printed is not lost"


def test_the_process_ends_without_freeing_modules_but_after_all_handlers() -> None:
    code = """
import atexit, os, sys
from pipelines.cli import main
class Freed:
    def __del__(self):
        os.write(1, b"freed")
def handler():
    print("handler", freed is not None)
def run(arguments, run=main._main):
    atexit.register(handler)
    return run(arguments)
main._main = run
sys.argv = ["llamachat", *{words}]
freed = Freed()
sys.exit(main.main())
"""
    for words, status in (["--version"], 0), (["plan", "--config", "none.yaml"], 2):
        command = [sys.executable, "-c", code.format(words=words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
        assert done.returncode == status, done.stderr
        assert done.stdout.endswith("handler True\n"), "printed, and nothing is freed"


def test_an_environment_installed_from_another_clone_is_reported(tmp_path: Path) -> None:
    command, environment = (
        [sys.executable, "-P", "-m", "pipelines", "--version"],
        {**os.environ, "PYTHONPATH": str(ROOT)},
    )
    environment.pop("LLAMACHAT_DIE_WITH_PARENT", None)
    for folder, is_other in ((ROOT, False), (tmp_path, False), (tmp_path / "clone", True)):
        if is_other:
            (folder / "pipelines" / "cli").mkdir(parents=True)
            (folder / "pipelines" / "cli" / "main.py").touch()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=environment)
        assert done.returncode == 0 and (f"the code in {ROOT}," in done.stderr) == is_other, done.stderr
