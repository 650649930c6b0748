"""The comparison of a killed run with a whole one sees what differs, and a small recipe under two kills differs in nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.random_kills import differences_of, main
from tests.sft.tiny_sft import toy_dialogs, write_base, write_dialogs, write_recipe


def write_run(run: Path) -> Path:
    artifact = run / "sft" / "artifact"
    artifact.mkdir(parents=True)
    (artifact / "model.safetensors").write_bytes(b"weights")
    (artifact / "manifest.json").write_text(json.dumps({"created": run.name, "git_commit": run.name, "seed": 1}))
    summary = {"sft/eval_loss": 2.0, "time/train_s": float(len(run.name)), "memory/peak_gib": float(len(run.name))}
    (run / "sft" / "summary.json").write_text(json.dumps(summary))
    return run


def test_times_and_commits_are_no_differences_and_weights_and_figures_are(tmp_path: Path) -> None:
    one, other = write_run(tmp_path / "whole"), write_run(tmp_path / "killed")
    assert differences_of(one, other) == []
    (other / "sft" / "artifact" / "model.safetensors").write_bytes(b"weightz")
    (other / "sft" / "summary.json").write_text(json.dumps({"sft/eval_loss": 2.5}))
    shutil.copytree(one / "sft", one / "rs")
    assert [line.split("  ", 1)[1].strip() for line in differences_of(one, other)] == [
        "only in the run nobody killed",
        "model.safetensors: other bytes",
        "only in the run nobody killed",
        "sft/eval_loss: 2.0 and 2.5",
    ]


def test_a_small_recipe_under_two_kills(
    tmp_path: Path, tiny_sentencepiece: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_base(tmp_path / "base", tiny_sentencepiece, dtype=torch.bfloat16)
    recipe = write_recipe(tmp_path / "one.yaml", base, write_dialogs(tmp_path / "dialogs.jsonl", toy_dialogs(40)))
    assert main(["--kills", "2", "--seed", "1", "--folder", str(tmp_path / "runs"), str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "seed 1: kills after" in printed and printed.endswith("same figures\n")
