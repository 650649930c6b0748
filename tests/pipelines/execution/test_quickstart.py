"""The notebook `examples/quickstart.ipynb`, executed on a CPU cell by cell, with a smoke recipe that takes seconds."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
import yaml

from pipelines.cli.main import main
from tests.pipelines.cli.test_documented_commands import check

ROOT = Path(__file__).resolve().parents[3]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
COMMAND = re.compile(r"^( *)!(llamachat .*)$", re.MULTILINE)

# The notebook's own recipe takes two minutes; every command of it runs, on fewer steps and shorter ones.
SHORTER = {
    "steps": ["sft", {"rm": {"only": ["helpfulness"]}}, "ppo", "report"],
    "sft": {"epochs": 0.2, "sample_prompts": 1},
    "reward": {"epochs": 0.5, "pairs_per_step": 8, "contrast": {"share": 0.0}},
    "scoring": {"combine": "single"},
    "ppo": {"iterations": 1, "responses_per_iteration": 8, "responses_per_minibatch": 8, "validation_prompts": 2}
    | {"test_prompts": 4, "validation_every": 1},
    "rollout": {"max_new_tokens": 32},
}


def cells() -> list[str]:
    """The sources of the notebook's code cells."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and all(not cell.get("outputs") for cell in notebook["cells"])
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_every_command_of_the_notebook_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    commands = [match[2] for cell in cells() for match in COMMAND.finditer(cell)]
    assert len(commands) >= 6
    for command in commands:
        check(shlex.split(command.format(dtype="float32")))


def test_the_notebook_runs_from_the_plan_to_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("data", "assets"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    for folder in ("configs", "examples"):
        (tmp_path / folder).mkdir()
    (tmp_path / "configs" / "tiny.yaml").symlink_to(ROOT / "configs" / "tiny.yaml")
    smoke = yaml.safe_load((ROOT / "configs" / "smoke.yaml").read_text())
    merged = {key: smoke.get(key, {}) | value if isinstance(value, dict) else value for key, value in SHORTER.items()}
    (tmp_path / "configs" / "smoke.yaml").write_text(yaml.safe_dump(smoke | merged))
    monkeypatch.chdir(tmp_path / "examples")
    monkeypatch.setenv("PATH", os.environ["PATH"])  # a cell extends it
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def run(command: str) -> None:
        assert main(shlex.split(command)[1:]) == 0, command

    names: dict[str, object] = {"_run": run}
    for cell in cells():
        exec(COMMAND.sub(r"\1_run(f'''\2''')", cell), names)
    said = capsys.readouterr().out
    assert "sft" in said and "no GPU here" in said
    assert (tmp_path / "runs" / "quickstart" / "report" / "report.html").is_file()
