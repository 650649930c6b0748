"""The steps of `rm`: what they start from and depend on, when they run, `--only`, and what the plan says of them.

The stages are stand-ins that publish at once; everything around them is real.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import reward
import sft
from llamachat.errors import ArtifactError, UsageError
from llamachat.runs.artifacts import Artifact
from pipelines.cli.main import main
from pipelines.execution.run import find_work, take_inputs
from pipelines.planning.estimates import TOKENS_OF_A_PAIR_ON_A_CPU, bytes_per_token, estimate_step
from pipelines.planning.plan import make_plan
from pipelines.recipe.recipe import Recipe, Step, load
from pipelines.recipe.stages import POLICY, Product, Role, Stage
from reward.config import VERSION
from tests.recipes import (
    preference_data,
    publish_toy_policy,
    publish_toy_reward_model,
    run_command,
    write_pairs,
    write_recipe,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The inputs of every call of a stage."""
    seen: list[Any] = []

    def policy(config: Any, inputs: Any) -> Artifact:
        seen.append(inputs)
        return publish_toy_policy(config, inputs)

    def reward_model(config: Any, inputs: Any) -> Artifact:
        seen.append(inputs)
        return publish_toy_reward_model(config, inputs)

    monkeypatch.setattr(sft, "run", policy)
    monkeypatch.setattr(reward, "run", reward_model)
    yield seen


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, data=preference_data(tmp_path), steps=["sft", "rm"])


def fingerprints(recipe: Recipe) -> dict[str, str]:
    return {step.name: find_work(recipe, step).fingerprint for step in recipe.steps}


def test_each_reward_model_starts_from_the_policy_before_it_and_never_from_a_reward_model(
    path: Path, tmp_path: Path, calls: list[Any]
) -> None:
    policy, *models = run_command(load(path), "all")
    assert [inputs.step for inputs in calls] == ["sft", "rm/helpfulness", "rm/safety", "rm/judge"]
    assert [inputs.which for inputs in calls[1:]] == ["helpfulness", "safety", "judge"]
    assert {inputs.policy.digest for inputs in calls[1:]} == {policy.digest}
    assert [model.path for model in models] == [
        tmp_path / "runs" / "one" / "rm" / which / "artifact" for which in ("helpfulness", "safety", "judge")
    ]
    assert calls[2].identity["inputs"] == {"policy": policy.digest}
    lineage = json.loads((tmp_path / "runs" / "one" / "lineage.json").read_text())
    assert [(step["step"], step["kind"]) for step in lineage["steps"]][1:] == [
        (f"rm/{which}", "reward_model") for which in ("helpfulness", "safety", "judge")
    ]


def test_a_policy_after_reward_models_is_taken_from_the_policy_before_them(path: Path, calls: list[Any]) -> None:
    recipe = load(path, ["steps=[sft, rm, {sft: {name: sft-2}}]"])
    policy, *_ = run_command(recipe, "all")
    assert calls[-1].step == "sft-2" and calls[-1].policy.digest == policy.digest


def test_a_step_takes_each_kind_that_it_reads_from_the_nearest_step_that_made_it(path: Path, calls: list[Any]) -> None:
    """As a later stage will: a policy and two reward models, of which the recipe trains one twice and one not at all."""
    recipe = load(path, ["steps=[sft, rm/safety, {sft: {name: sft-2}}, {rm/safety: {name: rm-2}}]"])
    reader = Stage(
        command="reader",
        section="sft",
        package=sft,
        products=(Product(makes=POLICY, data=(), needs=()),),
        reads=(POLICY, Role("reward_model", "safety"), Role("reward_model", "judge")),
    )
    first = recipe.steps[0]
    last = Step("last", reader, reader.products[0], first.config, first.tuning, first.rollout, first.scoring)
    recipe = replace(recipe, steps=(*recipe.steps, last))
    with pytest.raises(ArtifactError, match=r"'last' reads a policy, and no .* \(sft, sft-2\)\. Run `make sft`"):
        take_inputs(recipe, last)
    run_command(recipe, "sft")
    with pytest.raises(ArtifactError, match=r"'last' reads a safety reward model, .* \(rm/safety, rm-2/.*`make rm`"):
        take_inputs(recipe, last)
    run_command(recipe, "rm")
    taken = take_inputs(recipe, last)
    assert taken.policy is not None and taken.policy.manifest.step == "sft-2"
    assert {which: model.manifest.step for which, model in taken.reward_models.items()} == {"safety": "rm-2/safety"}
    assert sorted(taken.by_key) == ["policy", "reward_model/safety"]
    assert "policy of 'sft-2'" in taken.words and "safety reward model of 'rm-2/safety'" in taken.words


def test_a_fingerprint_hangs_on_what_its_model_reads_and_on_nothing_else(
    path: Path, tmp_path: Path, calls: list[Any]
) -> None:
    run_command(load(path), "sft")
    labels = f"data.labels=[{{path: {tmp_path}/dialogs.jsonl}}]"
    more = f"data.open=[{{path: {tmp_path}/helpfulness.jsonl}}]"
    changes = {
        labels: {"rm/helpfulness", "rm/safety", "rm/judge"},  # learnt from by one, and all are tested with them
        "reward.safety_auxiliary_weight=0": {"rm/safety"},
        "reward.balance_labels=false": {"rm/safety"},
        "reward.helpfulness_share=0.2": {"rm/safety"},
        "reward.other_share=0.2": {"rm/helpfulness"},
        more: {"rm/helpfulness", "rm/safety", "rm/judge"},
        "reward.margin=large": {"rm/helpfulness", "rm/safety", "rm/judge"},
        "reward.gradient_checkpointing=true": set(),
        "reward.row_tokens=64": set(),
    }
    before = fingerprints(load(path))
    for override, expected in changes.items():
        after = fingerprints(load(path, [override]))
        assert {name for name in after if after[name] != before[name]} == expected, override
    steps = load(path).steps
    identity = find_work(load(path), steps[1]).identity
    assert (identity["command"], identity["stage_version"]) == ("rm", VERSION)


def test_only_runs_the_models_that_it_names(path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--config", str(path)]) == 0
    assert main(["rm", "--config", str(path), "--only", "safety"]) == 0
    together = ["rm", "--config", str(path), "--only", "safety,judge", "--only", "helpfulness", "run.jobs=1"]
    assert main(together) == 0
    assert [inputs.step for inputs in calls] == ["sft", "rm/safety", "rm/helpfulness", "rm/judge"]
    assert main(["rm", "--config", str(path), "--only", "saftey"]) == 2
    assert (
        "--only saftey: the recipe has no such step of 'rm', only rm/helpfulness, rm/safety" in capsys.readouterr().err
    )
    assert main(["rm", "--config", str(path), "--only", "judge", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "rm/judge: done" in out and "rm/safety: done" not in out
    with pytest.raises(UsageError, match="--only safety"):
        run_command(load(path, ["data.safety=[]"]), "rm", only=["safety"])


def test_the_tables_show_every_finished_model_beside_the_chosen_one(
    path: Path, tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tables = tmp_path / "runs" / "one" / "rm" / "tables.md"
    assert main(["sft", "--config", str(path)]) == 0 and not tables.exists()
    assert main(["rm", "--config", str(path), "--only", "helpfulness"]) == 0
    first = tables.read_text()
    assert "\n| helpfulness" in first and "\n| safety" not in first and first in capsys.readouterr().out
    assert main(["rm", "--config", str(path), "--only", "safety"]) == 0
    assert "\n| helpfulness" in tables.read_text() and "\n| safety" in tables.read_text()


def test_without_a_policy_the_base_is_taken_with_a_warning(
    path: Path, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    alone = load(path, ["steps=[rm/safety]"])
    (planned,) = make_plan(alone)
    assert planned.verdict == "new" and "no step before 'rm/safety' makes a policy" in planned.warnings[0]
    with caplog.at_level(logging.WARNING):
        run_command(alone, "rm")
    assert calls[0].policy is None and any("base.model itself" in message for message in caplog.messages)
    run_command(load(path, ["steps=[sft]"]), "sft")
    policy = f"base.policy={Path(alone.run.dir)}/sft"
    (planned,) = make_plan(load(path, ["steps=[rm/judge]", policy]))
    assert not any("makes a policy" in warning for warning in planned.warnings)


def test_the_mixes_are_counted_as_the_paper_has_them(tmp_path: Path) -> None:
    """400 and 100 pairs, of which 0.5 train and 0.25 are the judge's; all files have lines of the same length."""
    data = {
        **preference_data(tmp_path),
        "helpfulness": [{"path": str(write_pairs(tmp_path / "a.jsonl", 100)), "weight": 4.0}],
        "safety": [{"path": str(write_pairs(tmp_path / "b.jsonl", 100))}],
        "split": {"test": 0.125, "validation": 0.125, "judge": 0.25},
    }
    reward = {"pairs_per_step": 1, "other_share": 0.1, "contrast": {"share": 0}}
    recipe = load(write_recipe(tmp_path, data=data, steps=["rm"], reward=reward))
    estimates = [estimate_step(recipe, step) for step in recipe.steps]
    # Helpfulness: 200, and 200 / 9 of safety's 50. Safety: 50, and 50 / 9 of helpfulness. Judge: a quarter of 500.
    assert [estimate and estimate.optimizer_steps for estimate in estimates] == [222, 56, 125]
    # A quarter of the pairs are contrast pairs: a third more.
    reward["contrast"] = {"share": 0.25}
    recipe = load(write_recipe(tmp_path, data=data, steps=["rm"], reward=reward))
    estimates = [estimate_step(recipe, step) for step in recipe.steps]
    assert [estimate and estimate.optimizer_steps for estimate in estimates] == [296, 74, 167]
    wider = load(
        write_recipe(tmp_path, data=data, steps=["rm"], reward={"pairs_per_step": 1, "contrast": {"share": 0}})
    )
    estimate = estimate_step(wider, wider.steps[0])
    assert estimate is not None and estimate.optimizer_steps == 250  # an equal part would be 200; there are 50
    pieces = json.loads((Path(wider.base.model) / "config.json").read_text())["vocab_size"]
    tokens = (tmp_path / "a.jsonl").stat().st_size / 100 / bytes_per_token(pieces) * TOKENS_OF_A_PAIR_ON_A_CPU
    assert f"{tokens:.0f} tokens per pair" in estimate.assumed


def test_pairs_that_are_not_here_are_not_counted(path: Path) -> None:
    recipe = load(path, ["data.open=[{path: owner/name}]"])
    estimates = [estimate_step(recipe, step) for step in recipe.steps]
    assert [estimate is not None and estimate.optimizer_steps is None for estimate in estimates] == [
        False,
        True,
        True,
        True,
    ]
