"""A gate on a safety model that is trained without labels: the plan and the start of a run warn of it before training."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.execution.run import lacks_labels
from pipelines.planning.plan import make_plan
from pipelines.planning.text import plan_text
from pipelines.recipe.recipe import load
from tests.recipes import preference_data, run_command, write_recipe

STEPS = ["sft", "rm/helpfulness", "rm/safety", "ppo"]
LABELLED = {
    "prompt": [{"role": "user", "content": "q"}],
    "chosen": [{"role": "assistant", "content": "no"}],
    "rejected": [{"role": "assistant", "content": "how"}],
    "rejected_is_safe": False,
}


def warning(path: Path, *overrides: str) -> str | None:
    recipe = load(path, overrides)
    warnings = [lacks_labels(recipe, step) for step in recipe.steps]
    assert not any(warnings[:-1]), "it is the step with the gate that is warned of"
    return warnings[-1]


def recipe_of(folder: Path, steps: list[Any] | None = None, **data: Any) -> Path:
    return write_recipe(folder, steps=steps or STEPS, data=preference_data(folder) | data)


def test_plan_warns_of_a_gate_whose_safety_model_will_learn_no_labels(tmp_path: Path) -> None:
    recipe = load(recipe_of(tmp_path))
    text = plan_text(recipe, make_plan(recipe))
    assert "warning: scoring.combine: llama2_gate will be refused in 'ppo': the safety model of 'rm/safety'" in text
    assert "data.labels is empty" in text and "scoring.combine=weighted or single" in text


def test_the_start_warns_before_any_step_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.execution.run.run_step", lambda *arguments, **more: (None, False))
    recipe = load(recipe_of(tmp_path))
    for command, warns in (("sft", False), ("rm", True), ("all", True)):
        caplog.clear()
        run_command(recipe, command)
        assert ("warning: scoring.combine: llama2_gate will be refused" in caplog.text) == warns


def test_labels_in_any_source_of_the_model_count(tmp_path: Path) -> None:
    path = recipe_of(tmp_path)
    assert warning(path)
    labels = tmp_path / "labels.jsonl"
    labels.write_text(json.dumps({"messages": [*LABELLED["prompt"], *LABELLED["chosen"]], "is_safe": True}) + "\n")
    assert warning(path, f"data.labels=[{{path: {labels}}}]") is None
    assert warning(path, "data.open=[{path: owner/pairs}]") is None, "a set that is not here may have labels"
    for key in ("safety", "helpfulness"):
        file = tmp_path / f"{key}.jsonl"
        before = file.read_text()
        file.write_text(before + json.dumps(LABELLED) + "\n")
        assert warning(path) is None
        assert warning(path, f"data.{key}.0.limit=5"), "the label stands behind the limit"
        file.write_text(before)
    columns = {**{name: value for name, value in LABELLED.items() if name != "rejected_is_safe"}, "harmless": False}
    (tmp_path / "safety.jsonl").write_text(json.dumps(columns) + "\n")
    assert warning(path, "data.safety.0.columns={rejected_is_safe: harmless}") is None


def test_a_weight_of_0_learns_no_labels(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, steps=["sft", {"rm/safety": {"safety_auxiliary_weight": 0}}, "ppo"])
    (tmp_path / "safety.jsonl").write_text(json.dumps(LABELLED) + "\n")
    text = warning(path)
    assert text is not None and "reward.safety_auxiliary_weight is 0" in text


def test_what_is_not_the_recipes_gate_is_not_warned_of(tmp_path: Path) -> None:
    path = recipe_of(tmp_path)
    (tmp_path / "model").mkdir()
    assert warning(path, "scoring.combine=weighted") is None
    assert warning(path, f"scoring.safety={tmp_path}/model") is None
    assert warning(path, "steps=[sft, rm/helpfulness, ppo]") is None, "no model at all is refused in other words"
    (tmp_path / "safety.jsonl").write_text("{broken\n")
    assert warning(path) is None, "the file is reported where it is read"
    pku = {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": True}
    pku |= {"better_response_id": 0, "safer_response_id": 0}
    (tmp_path / "safety.jsonl").write_text(json.dumps(pku) + "\n")
    assert warning(path) is None, "which of two meanings is asked there too"
