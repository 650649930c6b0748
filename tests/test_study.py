"""Studies: what runs where, what is shared, what is not run twice, and the tables with their intervals.

The stages are stand-ins that publish at once: a model's accuracy is 0.5, 0.6 or 0.65 by margin, and a hundredth a seed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import reward
import sft
from llamachat.errors import ConfigError
from llamachat.runs.artifacts import Artifact, read_artifact
from pipelines.cli import main
from pipelines.study import load_study, run_study, study_plan_text
from pipelines.study_tables import paired_difference
from tests.recipes import (
    preference_data,
    publish_toy_policy,
    publish_toy_reward_model,
    write_recipe,
    write_yaml,
)

ACCURACY = "rm/helpfulness/test/helpfulness/accuracy"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The step, seed and policy of every call of a stage."""
    seen: list[Any] = []

    def counted(stage: Any) -> Any:
        def run(config: Any, inputs: Any) -> Artifact:
            seen.append((inputs.step, inputs.run.seed, inputs.policy and inputs.policy.digest, config))
            return stage(config, inputs)

        return run

    monkeypatch.setattr(sft, "run", counted(publish_toy_policy))
    monkeypatch.setattr(reward, "run", counted(publish_toy_reward_model))
    yield seen


def study_values(**changes: Any) -> dict[str, Any]:
    return {
        "extends": "recipe.yaml",
        "command": "rm",
        "seeds": [0, 3],
        "variants": {
            "none": {"only": ["helpfulness"], "values": {"reward.margin": "none"}},
            "large": {"only": ["helpfulness"], "values": {"reward.margin": "large"}},
            "plain": {"only": ["safety"]},
        },
        "tables": [
            {"title": "Margins", "variants": ["none", "large"], "margins": True},
            {"title": "Accuracy", "variants": ["none", "large", "plain"], "columns": {"all": ACCURACY, "best": "none"}},
        ],
        **changes,
    }


def write_study(folder: Path, **changes: Any) -> Path:
    write_recipe(folder, data=preference_data(folder), steps=["sft", {"rm": {"epochs": 2, "margin": "small"}}])
    return write_yaml(folder / "study.yaml", study_values(**changes))


def test_each_variant_runs_with_each_seed_from_one_policy(tmp_path: Path, calls: list[Any]) -> None:
    run_study(load_study(write_study(tmp_path)))
    assert [(step, seed) for step, seed, _, _ in calls] == [
        ("sft", 0),
        *[(f"rm/{which}", seed) for seed in (0, 3) for which in ("helpfulness", "helpfulness", "safety")],
    ]
    run_dir = tmp_path / "runs" / "one"
    policy = read_artifact(run_dir / "shared" / "sft")
    assert {digest for _, _, digest, _ in calls[1:]} == {policy.digest}
    # A variant's values go over those of the recipe's step; the step's other values stay.
    assert [(config.margin, config.epochs) for *_, config in calls[1:4]] == [("none", 2), ("large", 2), ("small", 2)]
    place = run_dir / "large" / "seed-3"
    assert (place / "sft").resolve() == run_dir / "shared" / "sft"
    assert read_artifact(place / "rm" / "helpfulness").manifest.kind == "reward_model"


def test_a_study_goes_on_where_it_was_stopped_with_tables_of_what_is_done(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path)
    going = reward.run

    def stopped(config: Any, inputs: Any) -> Artifact:
        if inputs.run.seed == 3 and config.margin == "large":
            raise KeyboardInterrupt
        return going(config, inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reward, "run", stopped)
        run_study(load_study(path))
    assert "4 of 6 runs" in (tmp_path / "runs" / "one" / "study.md").read_text()
    assert "6 runs, 4 of them done" in study_plan_text(load_study(path))
    del calls[:]
    assert "6 of 6 runs" in run_study(load_study(path))
    assert [(step, seed) for step, seed, _, _ in calls] == [("rm/helpfulness", 3), ("rm/safety", 3)]


def test_the_tables_hold_means_over_seeds_and_differences_seed_by_seed(tmp_path: Path, calls: list[Any]) -> None:
    text = run_study(load_study(write_study(tmp_path)))
    # 0.5 and 0.53 against 0.65 and 0.68: means 0.515 and 0.665, the difference 0.15 with each seed, so without width.
    assert "| none | 51.5 | - |" in text
    assert "| large | 66.5 (+15.0, +15.0 to +15.0) | - |" in text
    assert "| plain | - | - |" in text
    assert "| variant | significantly better | better | slightly better | negligibly better |" in text
    assert "| none | 0 | 0 | 0 | 0 |" in text and "| large | 3 | 2 | 1 | 0 |" in text
    assert text == (tmp_path / "runs" / "one" / "study.md").read_text()
    index = json.loads((tmp_path / "runs" / "one" / "study.json").read_text())
    assert index["variants"]["large"]["figures"]["3"][ACCURACY] == pytest.approx(0.68)
    found = index["tables"][1]["rows"]["large"]["all"]
    assert found["by_seed"] == {"0": 0.65, "3": 0.68} and found["difference"]["mean"] == pytest.approx(0.15)


def test_the_interval_of_a_difference_is_students(tmp_path: Path) -> None:
    from scipy.stats import ttest_rel

    values, others = [0.61, 0.66, 0.58, 0.64, 0.70], [0.60, 0.61, 0.59, 0.60, 0.62]
    found, oracle = paired_difference(values, others), ttest_rel(values, others)
    interval = oracle.confidence_interval(0.95)
    assert found.mean == pytest.approx(0.034)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    # By hand: differences 0 and 2, deviation sqrt(2), over sqrt(2): 1; t of one degree of freedom: 12.706.
    by_hand = paired_difference([1.0, 3.0], [1.0, 1.0])
    assert (by_hand.low, by_hand.high) == pytest.approx((1 - 12.706, 1 + 12.706), abs=1e-3)
    assert (paired_difference([2.0], [1.0]).mean, paired_difference([2.0], [1.0]).low) == (1.0, None)


def test_the_command_line_goes_over_the_study_and_over_its_recipe(tmp_path: Path, calls: list[Any]) -> None:
    path = write_study(tmp_path, values={"reward.epochs": 4, "run.dir": str(tmp_path / "runs" / "study")})
    given = ["seeds=[7]", "reward.learning_rate=0.5", "reward.margin=small"]
    assert main(["rm", "--config", str(path), *given]) == 0
    assert {seed for step, seed, *_ in calls if step != "sft"} == {7}
    assert {(config.epochs, config.learning_rate) for step, *_, config in calls if step != "sft"} == {(4, 0.5)}
    assert [config.margin for step, *_, config in calls if step != "sft"] == ["none", "large", "small"]
    assert (tmp_path / "runs" / "study" / "none" / "seed-7" / "rm" / "helpfulness" / "artifact").is_dir()


def test_a_study_takes_the_policy_of_a_parent_run(tmp_path: Path, calls: list[Any]) -> None:
    path = write_study(tmp_path, values={"run.dir": str(tmp_path / "runs" / "study")})
    assert main(["sft", "--config", str(tmp_path / "recipe.yaml")]) == 0
    run_study(load_study(path, [f"run.parent={tmp_path}/runs/one"]))
    assert [step for step, *_ in calls].count("sft") == 1
    assert (tmp_path / "runs" / "study" / "shared" / "sft").resolve() == tmp_path / "runs" / "one" / "sft"


def test_plan_and_dry_run_of_a_study_run_nothing(
    tmp_path: Path, calls: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_study(tmp_path))
    assert main(["plan", "--config", path]) == 0
    plan = capsys.readouterr().out
    assert main(["rm", "--config", path, "--dry-run"]) == 0
    assert capsys.readouterr().out == plan
    assert "3 variants with 2 seeds each, 6 runs, 0 of them done" in plan
    assert 'large: rm/helpfulness with reward.margin="large"; about' in plan
    assert "sft: new" in plan and "all together" in plan
    assert calls == [] and not (tmp_path / "runs").exists()


BAD: list[tuple[dict[str, Any], str]] = [
    (
        {"command": "rms"},
        "command: there is no command 'rms' to compare variants of. Known: sft, rm, rs, gatt, distill, ppo.",
    ),
    ({"seeds": []}, "seeds: "),
    ({"seeds": [1, 1]}, "seeds: a seed stands twice"),
    ({"variants": {"shared": {}}, "tables": []}, "variants.shared: 'shared' cannot be the folder of a variant."),
    (
        {"variants": {"x": {"only": ["safe"]}}, "tables": []},
        "variants.x.only: 'safe' is no model of 'rm', whose models",
    ),
    ({"variants": {"x": {"value": {}}}, "tables": []}, "variants.x.value: unknown key. Did you mean 'values'?"),
    ({"variants": {"x": {}}}, "tables.0.variants: there is no variant 'none'. The variants: x."),
    ({"command": "sft", "variants": {"none": {}, "large": {}, "plain": {}}}, "tables.0.margins: 'sft' has no margins"),
    ({"variants": {"x": {"values": {"reward.margn": 1}}}, "tables": []}, "command line: reward.margn: unknown key."),
]


@pytest.mark.parametrize(("changes", "expected"), BAD)
def test_a_bad_study_is_refused_in_words(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(write_study(tmp_path, **changes))
    assert expected in str(caught.value)


def test_other_commands_say_what_a_study_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_study(tmp_path))
    assert main(["sft", "--config", path]) == 2
    assert "is a study of 'rm', whose variants say what is run" in capsys.readouterr().err
    assert main(["rm", "--config", path, "--only", "safety"]) == 2
    assert "Run `llamachat rm --config" in capsys.readouterr().err
    assert main(["dashboard", "--config", path]) == 2
    assert "variants: a study's key, and this command runs a recipe." in capsys.readouterr().err
    write_yaml(tmp_path / "study.yaml", {**study_values(), "extends": "other.yaml"})
    assert main(["rm", "--config", path]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_study_is_not_cut_by_the_hours_of_a_command(tmp_path: Path, calls: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"run\.max_hours: 2, but a study compares trainings .*Remove run\.max_hours"):
        run_study(load_study(write_study(tmp_path), ["run.max_hours=2"]))
    assert not calls
