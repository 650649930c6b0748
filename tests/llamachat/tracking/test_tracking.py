"""The tracker and the dashboard: what wandb is given and is not, under kills, without network, on a full disk."""

import importlib
import json
import logging
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from llamachat import distributed
from llamachat.config.sections import Base, Data, DataSource, Run, Tracking, Tuning
from llamachat.errors import UsageError
from llamachat.runs.artifacts import Artifact, Manifest, StepFolder
from llamachat.runs.atomic import StorageError
from llamachat.runs.inputs import StepInputs
from llamachat.runs.locks import hold
from llamachat.runs.reader import read_summary
from llamachat.runs.record import MetricsRecord
from llamachat.tracking import dashboard as dashboard_module
from llamachat.tracking import wandb_run
from llamachat.tracking.curves import draw_curves
from llamachat.tracking.dashboard import dashboard, summary_text
from llamachat.tracking.metrics import UnknownMetricError
from llamachat.tracking.tracker import open_record
from llamachat.tracking.wandb_run import wandb_places

ROOT = Path(__file__).resolve().parents[3]
MARKER = "violet-hedgehog-secret"


@pytest.fixture
def folder(tmp_path: Path) -> StepFolder:
    return StepFolder(tmp_path / "runs" / "tiny" / "sft")


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "home").mkdir()


def opened(folder: StepFolder, resume_step: int | None = None, **tracking: Any) -> Any:
    inputs = StepInputs(
        step="sft",
        folder=folder,
        identity={"sft": {"learning_rate": 0.001}},
        fingerprint="f" * 64,
        run=Run(dir=str(folder.path.parent)),
        base=Base(model="assets/base"),
        tuning=Tuning(),
        data=Data(sft=()),
        tracking=Tracking(**{"mode": "offline", **tracking}),
    )
    return open_record(inputs, "sft", resume_step=resume_step)


def toy_artifact(folder: StepFolder) -> Artifact:
    return Artifact(folder.artifact, Manifest(kind="policy", step="sft", fingerprint="0" * 64, identity={}, seed=0))


def offline_runs(folder: StepFolder) -> list[Path]:
    return sorted((folder.path.parents[1] / "wandb").glob("offline-run-*/*.wandb"))


def wandb_records(path: Path) -> list[Any]:
    """The protobuf records of a .wandb file, a LevelDB log: 32 KiB blocks; checksum, length, type before each piece."""
    wandb_internal_pb2: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")  # its stubs name no messages
    content, place, pieces, records = path.read_bytes(), 7, b"", []
    assert content[:4] == b":W&B"
    while place + 7 <= len(content):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", content, place + 4)
        pieces += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            records.append(wandb_internal_pb2.Record.FromString(pieces))
            pieces = b""
    return records


def wandb_history(path: Path) -> dict[str, dict[int, float]]:
    """Metric -> step on its own axis -> value."""
    history: dict[str, dict[int, float]] = {}
    for record in wandb_records(path):
        if record.WhichOneof("record_type") != "history":
            continue
        row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if not name.startswith("_") and not name.endswith("/step"):
                history.setdefault(name, {})[row["sft/step"]] = value
    return history


def test_an_unknown_name_is_refused_before_anything_is_written(folder: StepFolder) -> None:
    with opened(folder, mode="off") as tracker:
        with pytest.raises(UnknownMetricError):
            tracker.log(1, {"sft/los": 1.0})
        with pytest.raises(UnknownMetricError):
            tracker.summary({"sft/los": 1.0})
    assert not folder.metrics.exists()
    assert not folder.summary.exists()


def test_a_full_disk_under_the_record_is_reported(folder: StepFolder) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        words = r"metrics\.jsonl: File too large.*Free space or choose another disk"
        with pytest.raises(StorageError, match=words), opened(folder, mode="off") as tracker:
            for step in range(100):
                tracker.log(step, {"sft/loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    steps = [row["step"] for row in MetricsRecord(folder.metrics).read()]
    assert steps == list(range(len(steps)))
    assert len(steps) > 5


def test_the_offline_run_holds_every_figure_and_no_text(folder: StepFolder) -> None:
    logged = {
        "sft/loss": {step: 3.0 / step for step in range(1, 41)},
        "optim/grad_norm": {step: 0.5 + step for step in range(1, 41)},
        "sft/eval_loss": {20: 1.25, 40: 1.125},
    }
    started = time.monotonic()
    with opened(folder) as tracker:
        for step in range(1, 41):
            tracker.log(step, {name: logged[name][step] for name in ("sft/loss", "optim/grad_norm")})
            if step % 20 == 0:
                tracker.log(step, {"sft/eval_loss": logged["sft/eval_loss"][step]})
                tracker.samples(step, [{"prompt": f"{MARKER} asks", "answer": f"{MARKER} answers"}])
        tracker.sync()
        draw_curves(folder.metrics, folder.curves)
        tracker.figure("curves", folder.curves)
        tracker.summary({"sft/eval_loss": 1.0, "sft/eval_loss_base": 4.0})
    assert time.monotonic() - started < 20
    (run,) = offline_runs(folder)
    history = wandb_history(run)
    assert {name: history[name] for name in logged} == logged
    records = wandb_records(run)
    begun = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (begun.project, begun.run_group, begun.job_type, begun.host) == ("llamachat", "tiny", "sft", "local")
    axes = {record.metric.glob_name: record.metric.step_metric for record in records if record.metric.glob_name}
    assert axes["sft/*"] == axes["optim/*"] == "sft/step"
    final = {
        item.key or "/".join(item.nested_key): json.loads(item.value_json)
        for record in records
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
    assert (final["sft/eval_loss"], final["sft/eval_loss_base"]) == (1.0, 4.0)
    assert read_summary(folder) == {"sft/eval_loss": 1.0, "sft/eval_loss_base": 4.0}
    assert folder.samples.read_text().count(MARKER) == 4
    private = (MARKER, str(folder.path), str(ROOT), str(Path.home()), sys.executable)
    for path in (folder.path.parents[1] / "wandb").rglob("*"):
        if path.is_file():
            assert MARKER.encode() not in path.read_bytes(), path
    assert [text for text in private if text.encode() in run.read_bytes()] == []
    assert list((run.parent / "files" / "media").rglob("*.png"))


def test_text_goes_to_wandb_only_on_request(folder: StepFolder) -> None:
    with opened(folder, upload_text=True) as tracker:
        tracker.samples(1, [{"prompt": MARKER, "messages": [{"role": "user"}]}])
    (run,) = offline_runs(folder)
    assert any(MARKER in path.read_text() for path in (run.parent / "files" / "media").rglob("*.json"))


def test_runs_can_be_told_apart_and_compared_in_wandb(folder: StepFolder, caplog: pytest.LogCaptureFixture) -> None:
    """Their names say run and step, their configuration names files and models, never a folder of this machine."""
    digest = "0123456789abcdef" * 4
    inputs = StepInputs(
        step="rm/safety",
        folder=StepFolder(folder.path.parent / "rm" / "safety"),
        identity={
            "base": {"model": digest, "dtype": "bfloat16"},
            "data": {"safety": [{"path": digest, "weight": 0.5}, {"path": digest}], "split": {"test": 0.2}},
            "inputs": {"policy": digest},
        },
        fingerprint="f" * 64,
        run=Run(dir=str(folder.path.parent)),
        base=Base(model="assets/base"),
        tuning=Tuning(),
        data=Data(
            sft=(), safety=(DataSource(path="data/pairs.jsonl"), DataSource(path=str(folder.path / "own.jsonl")))
        ),
        tracking=Tracking(mode="offline"),
        policy=toy_artifact(folder),
    )
    with open_record(inputs, "rm/safety", resume_step=None) as tracker:
        tracker.log(1, {"rm/safety/loss": 0.5, "rm/safety/eval_accuracy": 0.75})
        tracker.summary({"rm/safety/test/safety/accuracy": 0.625})
    (run,) = offline_runs(folder)
    records = wandb_records(run)
    begun = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert begun.display_name == "tiny/rm/safety"
    assert config["base"]["model"] == "assets/base" and config["inputs"] == {"policy": "tiny/sft"}
    assert [source["path"] for source in config["data"]["safety"]] == ["data/pairs.jsonl", "own.jsonl"]
    assert digest.encode() not in run.read_bytes() and str(folder.path).encode() not in run.read_bytes()
    names = {item.key or "/".join(item.nested_key) for r in records for item in r.history.item}
    # One panel for all reward models; the figure that people look at first once more in a section of its own.
    assert {"rm/loss", "rm/eval_accuracy", "0_main/rm_eval_accuracy", "rm/step"} <= names
    assert not [name for name in names if "safety" in name]
    final = {item.key or "/".join(item.nested_key) for r in records for item in r.summary.update}
    assert "test/rm/safety/accuracy" in final, "test figures are apart from the curves"
    assert wandb_places(inputs.folder, folder.path.parents[1]) == [f"{run.parent} (offline; `wandb sync` uploads it)"]


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("ppo/kl_to_reference", ("ppo/kl_to_reference", "0_main/kl_to_reference")),
        ("ppo/heldout/judge", ("ppo/heldout/judge", "0_main/judge")),
        ("ppo/reward/safety", ("ppo/reward/safety", "0_main/reward_safety")),
        ("ppo/entropy", ("ppo/entropy",)),
        ("rm/judge/probe/harmless/echo", ("test/rm/probe/harmless/echo",)),
        ("ppo/test/final/judge", ("test/ppo/final/judge",)),
        ("optim/grad_norm", ("optim/grad_norm",)),
    ],
)
def test_names_in_wandb(name: str, names: tuple[str, ...]) -> None:
    assert wandb_run.names_in_wandb(name) == names


def test_what_wandb_notes_of_the_machine_is_sent_only_by_key() -> None:
    import wandb

    def settings(**tracking: Any) -> tuple[bool, bool, bool]:
        chosen = wandb_run._settings(wandb, Tracking(**tracking))
        return chosen.x_disable_stats, chosen.disable_git, chosen.x_disable_machine_info

    assert settings() == (True, True, True)
    assert settings(system_stats=True) == (False, True, True)
    assert settings(git=True) == (True, False, False)


class Trackio(ModuleType):
    """What is used of Trackio: projects of named runs, as its documentation has them."""

    def __init__(self) -> None:
        super().__init__("trackio")
        self.projects: dict[str, list[Any]] = {}
        self.Api = lambda: self

    def runs(self, project: str) -> list[Any]:
        if project not in self.projects:
            raise ValueError(f"Project '{project}' does not exist")
        return list(self.projects[project])

    def init(self, *, project: str, name: str, group: str, config: dict[str, Any], embed: bool) -> Any:
        runs, rows = self.projects.setdefault(project, []), list[tuple[int, dict[str, float]]]()
        assert name not in [run.name for run in runs] and not embed
        run = SimpleNamespace(name=name, group=group, config=config, rows=rows, is_finished=False)
        run.log = lambda metrics, step: rows.append((step, metrics))
        run.delete = lambda: runs.remove(run)
        run.finish = lambda: setattr(run, "is_finished", True)
        runs.append(run)
        return run


def test_trackio_holds_the_curve_once_after_resuming(
    folder: StepFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(folder, mode="off", trackio=True) as tracker:
        tracker.log(1, {"sft/loss": 1.0})
    assert "tracking.trackio is on, but" in caplog.text, "it is not installed"
    trackio = Trackio()
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    for resume_step, offset in ((None, 0.0), (2, 10.0)):
        with opened(folder, mode="off", trackio=True, resume_step=resume_step) as tracker:
            for step in range((resume_step or 0) + 1, 5):
                tracker.log(step, {"sft/loss": offset + step})
    (run,) = trackio.projects["llamachat"]
    assert run.group == "tiny" and run.is_finished
    assert [(step, row["sft/loss"]) for step, row in run.rows] == [(1, 1), (2, 2), (3, 13), (4, 14)]
    run.log = lambda *_, **__: 1 / 0
    with opened(folder, mode="off", trackio=True, resume_step=4) as tracker:
        monkeypatch.setattr(tracker._trackio, "log", run.log)
        tracker.log(5, {"sft/loss": 1.0})
        tracker.log(6, {"sft/loss": 1.0})
    assert caplog.text.count("Trackio failed") == 1


def test_system_texts_stay_out_of_the_configuration_in_wandb() -> None:
    config = {"base": {"system": "Be kind.", "dtype": "bfloat16"}, "data": {"sft": [{"path": "x", "system": None}]}}
    assert wandb_run.without_system_texts(config) == {
        "base": {"system": "(a text of 8 characters)", "dtype": "bfloat16"},
        "data": {"sft": [{"path": "x", "system": None}]},
    }


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from llamachat.runs.artifacts import StepFolder
from tests.llamachat.tracking.test_tracking import opened
with opened(StepFolder(Path(sys.argv[1]))) as tracker:
    for step in range(1, 31):
        tracker.log(step, {"sft/loss": 100.0 + step})
    print("logged", flush=True)
    sys.stdin.read()
"""


def test_a_killed_step_leaves_a_readable_run_and_continues_it_without_a_zigzag(folder: StepFolder) -> None:
    command = [sys.executable, "-c", KILLED, str(folder.path), str(ROOT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(100):  # the file is written once a second
            if len(wandb_history(offline_runs(folder)[0]).get("sft/loss", {})) >= 29:
                break
            time.sleep(0.1)
        process.kill()
    (before,) = offline_runs(folder)
    assert wandb_history(before)["sft/loss"] == {step: 100.0 + step for step in range(1, 30)}, "the last row was open"
    with opened(folder, resume_step=20) as tracker:
        for step in range(21, 31):
            tracker.log(step, {"sft/loss": 200.0 + step})
    (after,) = offline_runs(folder)
    assert after.name == before.name, "the id, and so the run, is the same"
    wanted = {step: (100.0 if step <= 20 else 200.0) + step for step in range(1, 31)}
    assert wandb_history(after)["sft/loss"] == wanted
    assert {int(row["step"]): row["sft/loss"] for row in MetricsRecord(folder.metrics).read()} == wanted


def test_a_key_without_a_network_ends_offline_with_a_warning(
    folder: StepFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_run, "_INIT_TIMEOUT_S", 1.0)
    with caplog.at_level(logging.WARNING), opened(folder, mode="auto") as tracker:
        tracker.log(1, {"sft/loss": 1.0})
    assert "wandb cannot be reached; this step is recorded offline" in caplog.text
    (run,) = offline_runs(folder)
    assert wandb_history(run)["sft/loss"] == {1: 1.0}
    assert [path.name for path in run.parents[1].glob("run-*")] == [], "nothing is left of the vain attempt"


def test_a_key_in_the_environment_or_netrc_means_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert wandb_run._where(Tracking()) == wandb_run._where(Tracking(mode="online")) == "offline"
    assert "no wandb key is set; recording offline" in caplog.text
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "0" * 40 + "\n")
    assert wandb_run._where(Tracking()) == "online"
    assert wandb_run._where(Tracking(mode="offline")) == "offline"
    assert wandb_run._where(Tracking(mode="off")) is None
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_run._where(Tracking()) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_run._where(Tracking()) is None


def test_trouble_with_wandb_never_stops_a_step(
    folder: StepFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise OSError("the disk of wandb is full")

    with opened(folder) as tracker:
        monkeypatch.setattr(tracker._wandb._run, "log", broken)
        with caplog.at_level(logging.WARNING):
            tracker.log(1, {"sft/loss": 1.0})
            tracker.log(2, {"sft/loss": 0.5})
    assert caplog.text.count("metrics.jsonl has all figures") == 1
    assert [row["sft/loss"] for row in MetricsRecord(folder.metrics).read()] == [1.0, 0.5]
    monkeypatch.setattr(wandb_run, "_wandb", broken)
    with opened(folder, resume_step=2) as tracker:
        tracker.log(3, {"sft/loss": 0.25})
    assert len(MetricsRecord(folder.metrics).read()) == 3


def test_off_and_other_processes_write_nothing_to_wandb(folder: StepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(folder, mode="off") as tracker:
        tracker.log(1, {"sft/loss": 1.0})
    other = StepFolder(folder.path.parent / "other")
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    with opened(other, mode="auto") as tracker:
        tracker.log(1, {"sft/loss": 1.0})
        tracker.samples(1, [{"prompt": "a"}])
        tracker.summary({"sft/eval_loss": 1.0})
    assert not other.path.exists()
    assert not (folder.path.parents[1] / "wandb").exists()


def test_tensorboard_holds_the_curve_once_after_resuming(folder: StepFolder) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, offset in ((None, 0.0), (2, 10.0)):
        with opened(folder, mode="off", tensorboard=True, resume_step=resume_step) as tracker:
            for step in range((resume_step or 0) + 1, 5):
                tracker.log(step, {"sft/loss": offset + step})
    events = EventAccumulator(str(folder.tensorboard / "sft"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("sft/loss")] == [(1, 1), (2, 2), (3, 13), (4, 14)]


def test_the_dashboard_without_a_terminal_shows_each_run_and_how_to_sync(
    folder: StepFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = folder.path.parents[1]
    with pytest.raises(UsageError, match=r"no runs here.*make sft"):
        dashboard(runs, is_terminal=False)
    with hold(folder):
        MetricsRecord(folder.metrics).append(1, {"sft/loss": 2.0})
        assert f"tiny/sft  (running: process {os.getpid()}" in summary_text(runs)
    folder.curves.touch()
    (runs / "new").mkdir()
    (runs / "new" / "sft").symlink_to("../tiny/sft")
    MetricsRecord(runs / "tiny" / "rm" / "safety" / "metrics.jsonl").append(3, {"rm/safety/loss": 0.5})
    (runs / "wandb" / "offline-run-1-a").mkdir(parents=True)
    dashboard(runs)
    text = capsys.readouterr().out
    assert "new/sft  (reused from ../tiny/sft)" in text
    assert "tiny/sft  (not finished)" in text
    assert f"picture: {folder.curves}" in text
    assert "rm/safety/loss" in text
    assert f"wandb sync {runs}/wandb/offline-run-*" in text


def test_the_dashboard_in_a_terminal_opens_wandbs_own_on_the_offline_runs(
    folder: StepFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = folder.path.parents[1]
    MetricsRecord(folder.metrics).append(1, {"sft/loss": 2.0})
    dashboard(runs, is_terminal=True)  # no offline runs: the table
    assert "sft/loss" in capsys.readouterr().out
    (runs / "wandb" / "offline-run-1-a").mkdir(parents=True)
    calls = []

    def record_call(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(dashboard_module.subprocess, "run", record_call)
    dashboard(runs, is_terminal=True)
    assert calls == [[sys.executable, "-m", "wandb", "leet", "run", str(runs / "wandb")]]
    assert "sft/loss" not in capsys.readouterr().out
