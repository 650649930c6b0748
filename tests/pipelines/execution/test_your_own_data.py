"""The tutorial `docs/your-own-data.md`, run command by command in a fresh folder: it works, says what the page says it says,
and no record goes missing without a count.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from llamachat.config.sections import Split
from llamachat.data.loading import fraction, split_of
from pipelines.cli.main import main
from pipelines.planning.estimates import card
from pipelines.planning.fit import fits
from pipelines.recipe.recipe import load

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "your-own-data.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BAD_LINES = "|| test $? = 2"


@dataclass(slots=True)
class Ran:
    """A command and what it printed and logged."""

    command: str
    output: str


class Shell:
    """Runs a page's blocks, in one process as far as they are llamachat's: what a library takes to load is paid once."""

    def __init__(self, capture: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
        self.capture, self.caplog, self.ran = capture, caplog, list[Ran]()

    def block(self, text: str) -> str:
        """What all of a block's commands say."""
        return "".join(self._line(line) for line in text.splitlines())

    def _line(self, line: str) -> str:
        command = line.partition("    #")[0]
        if not command.startswith("llamachat "):
            done = subprocess.run(["bash", "-ec", command], capture_output=True, text=True, check=True)
            return done.stdout
        due = 2 if BAD_LINES in command else 0
        self.caplog.clear()
        status = main(shlex.split(command.partition(BAD_LINES)[0])[1:])
        captured = self.capture.readouterr()
        output = captured.out + "".join(f"{message}\n" for message in self.caplog.messages)
        assert status == due, f"{command}\n{output}\n{captured.err}"
        self.ran.append(Ran(command, output))
        return output

    def said(self, words: str) -> str:
        """What the one command that begins so said."""
        (output,) = [ran.output for ran in self.ran if ran.command.startswith(f"llamachat {words}")]
        return output


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page reads of the repository, and nothing else."""
    for name in ("data/own_logs", "assets/base"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return tmp_path


def records(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text, re.MULTILINE)
    assert match, f"{pattern} in:\n{text}"
    return int(match[1])


def on_side(path: str, side: str, split: Split) -> int:
    """Records of a file on one side of the split, by their first user turn."""
    talks = [record["messages"] if "messages" in record else record["prompt"] for record in records(path)]
    first = [next(turn["content"] for turn in talk if turn["role"] == "user") for talk in talks]
    return sum(split_of(fraction(text), split) == side for text in first)


def test_the_page_runs_from_messy_logs_to_an_exported_model(
    fresh: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shell, output, python = Shell(capsys, caplog), "", ""
    for kind, text in BLOCK.findall(PAGE.read_text()):
        if kind == "bash":
            if text.startswith("llamachat sft "):
                check_plan(shell)
                shorten(Path("my/rehearsal.yaml"))
            output = shell.block(text)
        elif kind == "text":
            lacking = [line for line in text.splitlines() if line not in output]
            assert not lacking, f"the page promises what was not said: {lacking}\n{output}"
        elif kind == "python":
            python = text
    check_conversion(shell, "data/own_logs/chats.jsonl", "my/dialogs.jsonl")
    check_conversion(shell, "data/own_logs/preferences.jsonl", "my/pairs.jsonl")
    check_training(shell)
    # What was exported is a folder of transformers: nothing of ours is on the path.
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = python + "\nimport sys\nassert not [name for name in sys.modules if name.startswith('llamachat')]\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 3, "it answers in words"


# All records are read and counted; what is sampled and trained on is little.
SHORTER = {
    "sft": {"epochs": 0.2},
    "reward": {"epochs": 0.2},
    "rejection_sampling": {"prompts": 8, "samples_per_prompt": 4, "sweep_prompts": 2, "sweep_samples": 2}
    | {"validation_prompts": 4, "test_prompts": 8},
    "gatt": {"dialogs": 12, "evaluation_dialogs": 6},
    "ppo": {"iterations": 1, "responses_per_iteration": 8, "responses_per_minibatch": 4, "validation_prompts": 4}
    | {"test_prompts": 8},
    "evaluation": {"test_prompts": 8, "dialogs": 6, "curve_prompts": 2, "curve_samples": 2},
}


def shorten(recipe: Path) -> None:
    """Keep the recipe's steps and data, and give it lengths that take seconds."""
    values = yaml.safe_load(recipe.read_text())
    values |= {section: values[section] | shorter for section, shorter in SHORTER.items()}
    recipe.write_text(yaml.safe_dump(values))


def check_conversion(shell: Shell, source: str, written: str) -> None:
    """Records in = records out + counted drops, and each drop but a repeat is named with its line."""
    said = shell.said(f"data convert {source}")
    lines = Path(source).read_text().splitlines()
    losses = said.partition("dropped because it")[2]
    counts = [int(count) for count in re.findall(r"(\d+)$", losses, re.MULTILINE)]
    repeated = [int(count) for count in re.findall(r"repeats a record before it +(\d+)$", losses, re.MULTILINE)]
    blank = sum(not line.strip() for line in lines)
    assert len(lines) - blank == len(records(written)) + sum(counts)
    named = {int(line) for line in re.findall(rf"^{source}:(\d+): ", said, re.MULTILINE)}
    assert len(named) == sum(counts) - sum(repeated)


def check_plan(shell: Shell) -> None:
    """Both recipes plan without a warning, within the hours they were made for, and the card holds the large one."""
    for name, hours in (("my/rehearsal.yaml", 0.03), ("my/llama2-7b.yaml", 60)):
        said = shell.said(f"plan --config {name}")
        assert "warning" not in said and "does not fit" not in said
        recipe = load(name)
        fit = fits(recipe, card(recipe))
        assert fit is not None and fit.hours is not None and fit.hours <= hours == recipe.run.max_hours


def check_training(shell: Shell) -> None:
    """Records of a file = learnt + held out + of the test side + left out; the manifests hold what was left out."""
    split = load("my/rehearsal.yaml").data.split
    for command, path, noun in (("sft", "my/dialogs.jsonl", "dialogs"), ("rm", "my/pairs.jsonl", "pairs")):
        said = shell.said(f"{command} ")
        learnt = number(rf"^(\d+) training {noun}", said)
        held_out = number(rf"(\d+) (?:{noun} )?held out", said)
        if command == "rm":  # contrast pairs are made of the dialogs
            learnt -= number(r"held out, (\d+) and \d+ of them contrast", said)
            held_out -= number(r"held out, \d+ and (\d+) of them contrast", said)
        step = {"sft": "sft", "rm": "rm/helpfulness"}[command]
        dropped = json.loads(Path(f"runs/rehearsal/{step}/artifact/manifest.json").read_text())["dropped_records"]
        left_out = sum(count for reason, count in dropped.items() if reason.startswith("left out"))
        assert learnt + held_out + left_out + on_side(path, "test", split) == len(records(path))
        counted = "dialog" if command == "sft" else "record"  # pairs, and labelled answers
        assert all(f"{count} {counted}{'s' * (count > 1)}: {reason}" in said for reason, count in dropped.items())
        assert command != "sft" or sum(dropped.values()) > 0, "the logs have dialogs that are too long"


def test_the_bundled_logs_are_what_the_script_makes_and_as_its_page_says(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "tools.mess_up", "--to", tmp_path], env=environment, check=True)
    for path in (ROOT / "data/own_logs").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    page = (tmp_path / "SOURCE.md").read_text()
    for name in ("chats.jsonl", "preferences.jsonl"):
        raw = (tmp_path / name).read_bytes()
        assert f"| `{name}` | {len(raw.splitlines())} | {len(raw)} |" in page
        mess = re.findall(rf"^- `{name}`: (.*)\.$", page, re.MULTILINE)[0]
        assert sum(int(part.split()[0]) for part in mess.split(", ")) == len(raw.splitlines())
    for licence in re.findall(r"`(data/licences/[\w.-]+)`", page):
        assert (ROOT / licence).is_file()
