"""Studies: what runs where, what is shared, what is not run twice, and the tables with their intervals.

The stages are stand-ins that publish at once: a model's accuracy is 0.5, 0.6 or 0.65 by margin, and a hundredth a seed.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import reward
import sft
from llamachat.errors import ConfigError, UsageError
from llamachat.runs.artifacts import Artifact, read_artifact
from pipelines.cli.main import main
from pipelines.studies import pictures as study_pictures
from pipelines.studies.definition import Study, load_study
from pipelines.studies.run import run_study, study_plan_text
from pipelines.studies.tables import paired_difference
from tests.recipes import (
    preference_data,
    publish_toy_policy,
    publish_toy_reward_model,
    recipe_values,
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

    def with_a_loss(config: Any, inputs: Any) -> Artifact:
        (inputs.folder.summary).write_text(json.dumps({"sft/eval_loss": config.learning_rate}))
        return publish_toy_policy(config, inputs)

    monkeypatch.setattr(sft, "run", counted(with_a_loss))
    monkeypatch.setattr(reward, "run", counted(publish_toy_reward_model))
    yield seen


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch, stage: Any, is_stopped: Callable[[Any, Any], bool]) -> Iterator[None]:
    """The block ends as such a call of the stage is interrupted."""
    going = stage.run

    def run(config: Any, inputs: Any) -> Artifact:
        if is_stopped(config, inputs):
            raise KeyboardInterrupt
        return going(config, inputs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stage, "run", run)
        yield


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
    run_dir = tmp_path / "runs" / "one-study"
    policy = read_artifact(run_dir / "shared" / "sft")
    assert {digest for _, _, digest, _ in calls[1:]} == {policy.digest}
    # A variant's values go over those of the recipe's step; the step's other values stay.
    assert [(config.margin, config.epochs) for *_, config in calls[1:4]] == [("none", 2), ("large", 2), ("small", 2)]
    place = run_dir / "large" / "seed-3"
    assert (place / "sft").resolve() == run_dir / "shared" / "sft"
    assert read_artifact(place / "rm" / "helpfulness").manifest.kind == "reward_model"


def test_a_stopped_study_resumes_with_tables_of_what_is_done(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_study(tmp_path)
    with stopped(monkeypatch, reward, lambda config, inputs: (inputs.run.seed, config.margin) == (3, "large")):
        run_study(load_study(path))
    assert "4 of 6 runs" in (tmp_path / "runs" / "one-study" / "study.md").read_text()
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
    assert text == (tmp_path / "runs" / "one-study" / "study.md").read_text()
    index = json.loads((tmp_path / "runs" / "one-study" / "study.json").read_text())
    assert index["variants"]["large"]["figures"]["3"][ACCURACY] == pytest.approx(0.68)
    row = index["tables"][1]["rows"]["large"]["all"]
    assert row["by_seed"] == {"0": 0.65, "3": 0.68} and row["difference"]["mean"] == pytest.approx(0.15)


def test_the_interval_of_a_difference_is_students(tmp_path: Path) -> None:
    from scipy.stats import ttest_rel

    values, others = [0.61, 0.66, 0.58, 0.64, 0.70], [0.60, 0.61, 0.59, 0.60, 0.62]
    difference, oracle = paired_difference(values, others), ttest_rel(values, others)
    interval = oracle.confidence_interval(0.95)
    assert difference.mean == pytest.approx(0.034)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))
    # By hand: differences 0 and 2, deviation sqrt(2), over sqrt(2): 1; t of one degree of freedom: 12.706.
    by_hand = paired_difference([1.0, 3.0], [1.0, 1.0])
    assert (by_hand.low, by_hand.high) == pytest.approx((1 - 12.706, 1 + 12.706), abs=1e-3)
    assert (paired_difference([2.0], [1.0]).mean, paired_difference([2.0], [1.0]).low) == (1.0, None)


def test_the_command_line_goes_over_the_study_and_over_its_recipe(tmp_path: Path, calls: list[Any]) -> None:
    path = write_study(tmp_path, values={"reward.epochs": 4, "run.dir": str(tmp_path / "runs" / "study")})
    overrides = ["seeds=[7]", "reward.learning_rate=0.5", "reward.margin=small"]
    assert main(["rm", "--config", str(path), *overrides]) == 0
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
    assert re.search(r'large: rm/helpfulness \(about .*\) per seed, with reward.margin="large"', plan)
    assert "sft: new" in plan and "all together: about" in plan
    assert calls == [] and not (tmp_path / "runs").exists()


def test_what_a_variant_changes_before_the_command_runs_once_for_all_that_make_it_alike(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = {"sft.learning_rate": 0.5}
    variants = {"own": {}, "fast": {"values": fast}, "fast-large": {"values": {**fast, "reward.margin": "large"}}}
    path = write_study(tmp_path, variants=variants, tables=[])
    plan = study_plan_text(load_study(path))
    assert "sft: new" in plan and re.search(
        r"  own: rm/helpfulness, rm/safety, rm/judge \(about .*\) per seed, with", plan
    )
    assert re.search(r"  fast: once sft \(about .*\), then rm/helpfulness, .* \(about .*\) per seed, with", plan)
    assert re.search(r"  fast-large: rm/helpfulness, .* per seed, from steps of fast, with", plan)
    with stopped(monkeypatch, sft, lambda config, _: config.learning_rate == 0.5):
        run_study(load_study(path))
    run_study(load_study(path))
    # With the recipe's own seed, 0, whatever the variants' seeds: one policy for `own`, one for the two fast ones.
    assert [(seed, config.learning_rate == 0.5) for step, seed, _, config in calls if step == "sft"] == [
        (0, False),
        (0, True),
    ]
    run_dir = tmp_path / "runs" / "one-study"
    policies = [read_artifact(run_dir / place / "sft").digest for place in ("shared", "fast/shared")]
    read = [(policy, config.margin) for step, _, policy, config in calls if step == "rm/safety"]
    assert read == 2 * [(policies[0], "small"), (policies[1], "small"), (policies[1], "large")]
    assert (run_dir / "fast-large" / "seed-3" / "sft").resolve() == run_dir / "fast" / "shared" / "sft"
    again = study_plan_text(load_study(path))
    assert "6 runs, 6 of them done" in again and ", 0 s left" in again


def test_recipe_variants_and_seeds_are_enough(tmp_path: Path, calls: list[Any]) -> None:
    """Run is what follows from the first step that a variant changes; shown are the main figures."""
    write_study(tmp_path)
    values = {"extends": "recipe.yaml", "variants": {"a": {}, "b": {"values": {"reward.margin": "none"}}}, "seeds": [5]}
    path = write_yaml(tmp_path / "margins.yaml", values)
    assert main(["all", "--config", str(path)]) == 0
    assert [(step, seed) for step, seed, *_ in calls] == [
        ("sft", 0),
        *2 * [(f"rm/{which}", 5) for which in ("helpfulness", "safety", "judge")],
    ]
    text = (tmp_path / "runs" / "one-margins" / "study.md").read_text()
    assert text.startswith("# Study of `all from 'rm/helpfulness' on`")
    assert f"| variant | {ACCURACY.replace('_', ' ')} (%) | rm/safety/test/safety/accuracy (%) |" in text
    assert "| a | 65.0 | 65.0 |" in text and "| b | 55.0 (-10.0) | 55.0 (-10.0) |" in text
    # Variants that change nothing compare seeds, of the whole recipe; one without last steps ends where all end.
    for variants, first in (
        ({"a": {}}, "all from 'sft' on"),
        ({"a": {}, "b": {"values": {"steps": ["sft", {"rm": {"epochs": 2, "margin": "small", "only": ["helpfulness"]}}]}}},
         "all from 'rm/helpfulness' on"),
    ):  # fmt: skip
        assert load_study(write_yaml(path, {**values, "variants": variants})).commands == first


def test_figures_of_several_commands_stand_side_by_side_in_their_units(tmp_path: Path, calls: list[Any]) -> None:
    columns = {"loss": "sft/eval_loss", "first loss": "sft:sft/eval_loss", "n": ACCURACY.replace("accuracy", "pairs")}
    table = {"title": "All", "columns": {**columns, "typo": f"{ACCURACY}y", "later": "eval/sft/anything"}}
    path = write_study(
        tmp_path,
        command=["rm", "sft"],
        variants={"slow": {"values": {"sft.learning_rate": 0.25}}, "fast": {"values": {"sft.learning_rate": 0.5}}},
        tables=[table],
    )
    recipe = recipe_values(
        tmp_path, data=preference_data(tmp_path), steps=["sft", "rm", {"sft": {"name": "sft-2", "learning_rate": 2.0}}]
    )
    write_yaml(tmp_path / "recipe.yaml", recipe)
    text = run_study(load_study(path))
    assert len([step for step, *_ in calls if step == "rm/safety"]) == len([s for s, *_ in calls if s == "sft"]) == 4
    assert "| variant | loss (nats/token) | first loss (nats/token) | n (pairs) | typo | later |" in text
    # The variant's rate goes over that of the step, too: the losses, which are the rates here, are the same twice.
    assert "| slow | 0.25 | 0.25 | 100 | - | - |" in text
    assert "| fast | 0.5 (+0.25, +0.25 to +0.25) | 0.5 (+0.25, +0.25 to +0.25) | 100 (+0, +0 to +0) | - | - |" in text
    assert f"No run has the figure `{ACCURACY}y`. Did you mean `{ACCURACY}`?" in text
    assert "No run has the figure `eval/sft/anything`. Its step was not run." in text


def test_the_picture_shows_each_figure_against_the_number_that_is_changed(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(study_pictures, "save_png", lambda figure, path: drawn.append((figure, path)))
    variants = {"c": {"values": {"sft.learning_rate": 0.5}}, "a": {"values": {"sft.learning_rate": 4.0}}, "own": {}}
    tables = [{"title": "All", "columns": {"loss": "sft/eval_loss", "accuracy": ACCURACY}}]
    path = write_study(tmp_path, command="all", variants=variants, tables=tables, axis="rate")
    text = run_study(load_study(path, ["seeds=[1,3]", "sft.learning_rate=2.0"]))
    assert "![figures by variant](study.png)" in text
    figure, place = drawn[-1]
    assert place == tmp_path / "runs" / "one-study" / "study.png"
    loss, accuracy = figure.axes[:2]
    assert (loss.get_title("left"), loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "nats/token", "%")
    assert {axes.get_xlabel() for axes in (loss, accuracy)} == {"rate"} and loss.get_xscale() == "log"
    ((line, _, _),) = loss.containers
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.5, 2.0, 4.0], [0.5, 2.0, 4.0])
    # Accuracies 61 and 63 percent: mean 62, deviation sqrt(2), over sqrt(2): 1; t of one degree of freedom: 12.706.
    ((line, _, (bars,)),) = accuracy.containers
    assert list(line.get_ydata()) == pytest.approx([62.0] * 3)
    assert bars.get_segments()[0][:, 1] == pytest.approx([62 - 12.706, 62 + 12.706], abs=1e-3)
    run_study(load_study(path, ["seeds=[1]", "sft.learning_rate=2.0"]))
    ((_, _, (bars,)),) = drawn[-1][0].axes[1].containers
    assert not any(len(segment) for segment in bars.get_segments())  # one seed has no interval, not one of 0


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([{"a.b": 1}, {"a.b": 0.5}], {"v0": 1.0, "v1": 0.5}),
        ([{"a.b": 1, "list.0": 1}, {"a.b": 2, "list.0": 2}], {"v0": 1.0, "v1": 2.0}),
        ([{"a.b": 1, "list.0": 1}, {"a.b": 2, "list.0": 3}], {}),
        ([{"a.b": 1}, {}], {"v0": 1.0, "v1": 9.0}),
        ([{"list.0": 1}, {}], {"v0": 1.0, "v1": 7.0}),
        ([{"list.4": 1}, {}], {}),
        ([{"a.b": True}, {"a.b": False}], {}),
        ([{"a.b": "none"}, {"a.b": "large"}], {}),
        ([{}, {}], {}),
    ],
)
def test_a_variant_stands_for_a_number_where_all_that_it_changes_is_one(values: list[Any], numbers: Any) -> None:
    variants = {f"v{index}": {"values": changes} for index, changes in enumerate(values)}
    study = Study.model_validate({"extends": "x.yaml", "variants": variants, "seeds": (0,)})
    assert study_pictures.numbers_of(study, list(variants), {"a": {"b": 9}, "list": [7]}) == numbers


def test_work_of_a_run_is_never_replaced_by_a_reference(tmp_path: Path, calls: list[Any]) -> None:
    path = write_study(tmp_path, tables=[])
    run_study(load_study(path, ["command=[sft,rm]"]))
    with pytest.raises(UsageError, match=r"seed-0/sft contains its own work, .* run.dir=NEW, or remove"):
        run_study(load_study(path))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"command": "rms"}, "command: there is no command 'rms'. Known: sft, rm, rs,"),
    ({"command": ["rm", "evil"]}, "command: there is no command 'evil'."),
    ({"command": []}, "command: an empty list. Known: sft,"),
    ({"command": 3}, "command: found the number 3, but"),
    ({"command": ["sft", "rs"], "variants": {"x": {"only": ["safety"]}}, "tables": []}, "models are: none, it is"),
    ({"seeds": []}, "seeds: "),
    ({"seeds": [1, 1]}, "seeds: a seed is listed twice"),
    ({"variants": {"shared": {}}, "tables": []}, "variants.shared: 'shared' cannot be the folder of a variant."),
    ({"variants": {"x": {"only": ["safe"]}}, "tables": []}, "variants.x.only: 'safe' is not a model of 'rm'"),
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
    other, absent = study_values(command=["rm", "ppo"]), study_values(extends="other.yaml")
    for values, command, words in (
        (study_values(), "sft", "this is a study of 'rm'; its variants say what is run"),
        (study_values(), "rm --only safety", "Run `llamachat all --config"),
        (study_values(), "dashboard", "variants: a study's key, but this command runs a recipe."),
        (other, "all --dry-run", "steps: the recipe has no step 'ppo', only sft, rm/helpfulness,"),
        (absent, "rm", "does not exist"),
    ):
        write_yaml(tmp_path / "study.yaml", values)
        name, *options = command.split()
        assert main([name, "--config", path, *options]) == 2
        assert words in capsys.readouterr().err


def test_a_study_is_not_cut_by_the_hours_of_a_command(tmp_path: Path, calls: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"run\.max_hours: 2, but a study compares trainings .*Remove run\.max_hours"):
        run_study(load_study(write_study(tmp_path), ["run.max_hours=2"]))
    assert not calls
