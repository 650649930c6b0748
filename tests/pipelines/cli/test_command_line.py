"""The command line: exit statuses, what is printed where, options, and what must not be imported."""

import errno
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import sft
from llamachat.errors import ArtifactError, UsageError
from llamachat.runs.artifacts import Manifest, StepFolder, publish
from llamachat.runs.reader import Evaluation
from pipelines.cli.launch import repeated
from pipelines.cli.main import main
from pipelines.planning.hardware import shortfalls
from pipelines.recipe.recipe import load
from tests.recipes import preference_data, publish_toy_policy, write_dialogs, write_recipe

REPOSITORY = Path(__file__).resolve().parents[3]
HEAVY = ("torch", "trl", "transformers", "datasets", "wandb", "peft", "matplotlib")


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("LLAMACHAT_DIE_WITH_PARENT", raising=False)


def fail(error: BaseException) -> Any:
    def run(config: Any, inputs: Any) -> Any:
        raise error

    return run


# -- what is set up


@pytest.mark.parametrize(
    ("environment", "allocator"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, None),
    ],
)
def test_a_gpus_allocator_grows_its_blocks_unless_it_is_configured(
    environment: dict[str, str], allocator: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, environment.get(name, ""))
        if name not in environment:
            monkeypatch.delenv(name)
    assert main(["--help"]) == 0
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == allocator


def test_a_resumed_training_on_a_gpu_logs_nothing_of_accelerate(caplog: pytest.LogCaptureFixture) -> None:
    from accelerate import Accelerator
    from torch import tensor
    from torch.utils.data import DataLoader

    assert main(["--help"]) == 0
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(range(4)))  # type: ignore[arg-type]
    with caplog.at_level(logging.INFO):
        for _ in accelerator.skip_first_batches(loader, 1):
            accelerator.gather_for_metrics(tensor(1.0))  # as TRL does on a GPU
    assert caplog.messages == []


# -- exit statuses


def test_done_is_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sft, "run", publish_toy_policy)
    assert main(["all", "--config", str(write_recipe(tmp_path))]) == 0
    assert f"make chat ARGS='{tmp_path}/runs/one -m \"Hello, who are you?\"'" in capsys.readouterr().out


def test_a_command_ends_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sft, "run", publish_toy_policy)
    path = write_recipe(tmp_path, data=preference_data(tmp_path), steps=["sft", "rm"])
    keys = ["sft.epochs=1", "base.system=Pay $5, it's fair."]
    for _ in range(2):  # also where nothing is left to do
        assert main(["sft", "--config", str(path), *keys]) == 0
        said = capsys.readouterr().out.splitlines()[-1]
        make, *settings = shlex.split(said.removeprefix("Next: "))
        assert (make, settings[0], settings[1]) == ("make", "rm", f"CONFIG={path}")
        assert shlex.split(settings[2].removeprefix("ARGS=").replace("$$", "$")) == keys


def test_a_bad_recipe_is_2_and_a_text_without_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--config", str(write_recipe(tmp_path)), "sft.epoch=1"]) == 2
    captured = capsys.readouterr()
    assert "llamachat: The configuration has 1 problem:" in captured.err
    assert "command line: sft.epoch: unknown key. Did you mean 'epochs'?" in captured.err
    assert "Traceback" not in captured.err and captured.out == ""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ArtifactError("the artifact: found. required. do."), 1),
        (UsageError("bad usage"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_how_a_step_ends_is_the_status(
    error: BaseException,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sft, "run", fail(error))
    assert main(["sft", "--config", str(write_recipe(tmp_path))]) == status
    kept = "interrupted. The state is kept; the same command resumes." in capsys.readouterr().err
    assert kept == (status == 130)


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sft, "run", fail(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError):
        main(["sft", "--config", str(write_recipe(tmp_path))])


@pytest.mark.parametrize("code", [0, None])
def test_a_library_that_ends_the_process_is_no_success(
    code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sft, "run", fail(SystemExit(code)))
    assert main(["sft", "--config", str(write_recipe(tmp_path))]) == 1
    assert re.search(r"llamachat: .*sys\.exit\(\) in .*test_command_line\.py:\d+ ended", capsys.readouterr().err)


def test_a_file_that_cannot_be_opened_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (errno.ENOENT, errno.EINVAL, errno.EIO, errno.EMFILE, errno.ECONNREFUSED):
        monkeypatch.setattr(sft, "run", fail(OSError(number, os.strerror(number), "/some/file")))
        assert main(["sft", "--config", str(write_recipe(tmp_path))]) == 1
        assert f"llamachat: /some/file: {os.strerror(number)}. " in capsys.readouterr().err
    assert main(["sft", "--config", "x" * 300]) == 2
    assert "File name too long. " in capsys.readouterr().err


def test_hours_that_end_a_recipe_before_its_last_step_are_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sft, "run", publish_toy_policy)
    recipe = str(write_recipe(tmp_path, steps=["sft", {"sft": {"name": "sft-2"}}]))
    assert main(["all", "--config", recipe, "run.max_hours=1e-9"]) == 3
    assert "Not started: sft-2." in capsys.readouterr().out
    assert main(["all", "--config", recipe]) == 0


def test_a_library_that_turns_an_interrupt_into_an_error_of_its_own_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(config: Any, inputs: Any) -> Any:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
        except KeyboardInterrupt:
            raise RecursionError from None

    monkeypatch.setattr(sft, "run", run)
    assert main(["sft", "--config", str(write_recipe(tmp_path))]) == 130
    assert "llamachat: interrupted." in capsys.readouterr().err


def test_the_home_folder_is_read_in_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_recipe(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["sft", "--dry-run", "--config", "~/recipe.yaml", "run.dir=~/my runs/x"]) == 0
    assert f"dir: {tmp_path}/my runs/x\n" in capsys.readouterr().out
    for command in (["data", "check"], ["data", "convert"], ["init", "--base", "assets/base", "--sft"]):
        out = {"convert": [f"{tmp_path}/out.jsonl"], "--sft": ["--out", f"{tmp_path}/out.yaml"]}.get(command[-1], [])
        assert main([*command, "~nobody-of-this-name/a.jsonl", *out]) == 2
        assert "does not exist" in "".join(capsys.readouterr())


def test_make_gives_every_name_of_a_recipe_to_the_shell_as_it_is(tmp_path: Path) -> None:
    name = 'my re$cipe\'s "one" & `two`.yaml'
    command = ["make", "sft", f"CONFIG={name}", "ARGS=run.dir='my run'", "PY=printf '<%s>'", "VENV=/nowhere"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert f"<--config><{name}><run.dir=my run>" in done.stdout


def test_an_interrupted_tool_promises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check_path(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("llamachat.data.check.check_path", check_path)
    assert main(["data", "check", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "\nllamachat: interrupted.\n"


def test_sigterm_is_130_and_the_handler_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(config: Any, inputs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(sft, "run", run)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["sft", "--config", str(write_recipe(tmp_path))]) == 130
    assert signal.getsignal(signal.SIGTERM) == before


def test_unknown_commands_and_options_are_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["nope"]) == 2
    assert main(["sft", "--nope"]) == 2
    assert main(["sample", "--policy", "x"]) == 2
    assert "No such command 'nope'" in capsys.readouterr().err


# -- what is printed


def test_dry_run_prints_the_resolved_recipe_and_the_plan_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sft, "run", fail(AssertionError("it ran")))
    assert main(["sft", "--config", str(write_recipe(tmp_path)), "--dry-run", "sft.epochs=7"]) == 0
    out = capsys.readouterr().out
    assert "epochs: 7" in out and f"Plan of {tmp_path}/runs/one:" in out and "sft: new" in out
    assert not (tmp_path / "runs").exists()


def test_data_convert_and_check_count_and_name_and_end_with_2_where_something_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    path.write_text(f'{json.dumps({"conversations": turns})}\n{{"messages": []}}\n')
    assert main(["data", "convert", str(path), str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"{path}:2: messages: holds no answer" in printed
    assert main(["data", "check", str(path), "--kind", "dialog"]) == 2
    assert f"{out}: 1 dialog (0 untouched, 1 repaired)\n" in printed and "role renamed" in printed
    assert main(["data", "check", str(out)]) == 0
    assert "tokens: not counted" in capsys.readouterr().out
    assert main(["data", "check", str(out), "--config", "configs/tiny.yaml"]) == 0
    limit = load("configs/tiny.yaml").base.max_tokens
    assert re.search(rf"tokens: median \d+, .*; at most {limit} are read", capsys.readouterr().out)
    assert main(["data", "convert", str(path), str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["data", "convert", str(path), str(out), "--overwrite", "--strict"]) == 2
    assert "1 record cannot be repaired" in capsys.readouterr().err
    assert main(["data", "convert", str(path), str(tmp_path / "b.jsonl"), "--kind", "preference"]) == 2
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_tokens_writes_a_line_a_dialog(tmp_path: Path) -> None:
    dialogs, out = write_dialogs(tmp_path / "in.jsonl", 3), tmp_path / "out.jsonl"
    assert main(["tokens", "--tokenizer", "assets/base", "--in", str(dialogs), "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 3 and all(len(row["input_ids"]) == len(row["loss_mask"]) for row in rows)


def test_chat_wants_a_policy_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_recipe(tmp_path))
    assert main(["chat", "--config", path, "-m", "Hello"]) == 1
    assert "make sft" in capsys.readouterr().err
    assert main(["chat", "a", "b", "c"]) == 2
    assert main(["chat", "a", "run.seed=1"]) == 2
    assert "Name at most two artifacts." in capsys.readouterr().err


def test_chat_takes_the_policy_of_the_run_that_its_evaluation_recommends_or_the_last(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import serving.chat
    import serving.merging
    from llamachat.models import loading

    def chat_once(policy: Any, text: str, *, system: str | None, sampling: Any, write: Any) -> None:
        write(f"{policy} {text} {system} {sampling.temperature} {sampling.seed}\n")

    monkeypatch.setattr(sft, "run", publish_toy_policy)
    monkeypatch.setattr(loading, "load_policy", lambda path, device: str(path))
    monkeypatch.setattr(serving.merging, "as_exported", lambda policy: policy)
    monkeypatch.setattr(serving.chat, "chat_once", chat_once)
    caplog.set_level(logging.INFO)
    path = str(write_recipe(tmp_path, steps=["sft", {"sft": {"name": "sft-2"}}]))
    assert main(["all", "--config", path]) == 0
    assert main(["chat", "--config", path, "-m", "Hello", "--temperature", "0.1", "--seed", "3"]) == 0
    said = capsys.readouterr()
    assert f"{tmp_path}/runs/one/sft-2/artifact Hello None 0.1 3\n" in said.out
    assert (
        "sft-2: the last policy; no evaluation compared the policies" in caplog.text and "name its step" in caplog.text
    )
    evaluation = Evaluation.model_validate({"reference": "sft", "policies": ["sft", "sft-2"], "figures": {
        "sft": {}, "sft-2": {"difference/judge": {"value": -1.0, "low": -2.0, "high": -0.5}}}})  # fmt: skip
    step = StepFolder(tmp_path / "runs" / "one" / "eval")
    manifest = Manifest(kind="evaluation", step="eval", fingerprint="0" * 64, identity={}, inputs={}, seed=0)
    publish(step, manifest, lambda side: (side / "evaluation.json").write_text(evaluation.model_dump_json()))
    for named in ([str(tmp_path / "runs" / "one")], ["--config", path]):
        assert main(["chat", *named, "-m", "Hello"]) == 0
        said = capsys.readouterr()
        assert f"{tmp_path}/runs/one/sft/artifact Hello" in said.out
        assert "not sft-2: the judge rates it below sft (-1.00 [-2.00, -0.50])" in caplog.text
        caplog.clear()


# -- processes


def python(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, **options)


def test_recipes_plans_help_and_a_finished_step_import_nothing_heavy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sft, "run", publish_toy_policy)
    path = write_recipe(tmp_path)
    assert main(["sft", "--config", str(path)]) == 0
    code = f"""
import sys
from pipelines.cli.main import main
assert main(["--help"]) == 0
assert main(["plan", "--config", {str(path)!r}]) == 0
assert main(["sft", "--dry-run", "--config", {str(path)!r}]) == 0
assert main(["chat", "--config", {str(path)!r}, "run.dir={tmp_path}/none"]) == 1
assert main(["sft", "--config", {str(path)!r}]) == 0
print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"
    assert "sft: done already" in done.stderr and "nothing to do" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the death signal of a parent is Linux's")
def test_a_command_started_by_make_dies_with_it(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    child = f"""
import os, sys, time
from pathlib import Path
import sft
from pipelines.cli.main import main
def run(config, inputs):
    Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
    time.sleep(60)
sft.run = run
main(["sft", "--config", {str(path)!r}])
"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    started = subprocess.Popen(
        [sys.executable, "-c", parent], cwd=REPOSITORY, env={**os.environ, "LLAMACHAT_DIE_WITH_PARENT": "1"}
    )
    pid_file, ends = tmp_path / "pid", time.monotonic() + 30
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < ends:
        time.sleep(0.05)
    command = psutil.Process(int(pid_file.read_text()))
    started.kill()
    started.wait()
    _, alive = psutil.wait_procs([command], timeout=30)
    assert not alive, "the command outlived the process that started it"


# -- an existing environment


def test_this_environment_meets_the_lower_bounds() -> None:
    assert shortfalls(REPOSITORY / "pyproject.toml") == []


def test_missing_packages_are_named(tmp_path: Path) -> None:
    project = '[project]\ndependencies = ["torch>=99.1", "numpy>=1", "no-such-package>=2", "rich[jupyter] >= 1.0"]\n'
    (tmp_path / "pyproject.toml").write_text(project)
    messages = shortfalls(tmp_path / "pyproject.toml")
    assert len(messages) == 2 and "99.1 or newer is needed" in messages[0]
    assert messages[1] == "no-such-package is not installed; 2 or newer is needed"


def test_several_values_after_one_option() -> None:
    options = {"--temperature", "--policy"}
    expected = ["--temperature", "0.7", "--temperature", "1.0", "--in", "p.jsonl"]
    assert repeated(["--temperature", "0.7", "1.0", "--in", "p.jsonl"], options) == expected
    assert repeated(expected, options) == expected
    assert repeated(["--temperature=0.7", "1.0"], options) == ["--temperature=0.7", "--temperature", "1.0"]
    assert repeated(["--in", "p.jsonl", "x"], options) == ["--in", "p.jsonl", "x"]
    assert repeated(["--policy", "a", "b", "--in", "p"], options) == ["--policy", "a", "--policy", "b", "--in", "p"]
