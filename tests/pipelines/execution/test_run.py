"""Steps as work: what their fingerprint depends on, what they start from, when they run, and what the plan says.

The stage is a stand-in that publishes at once; everything around it is real.
"""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import sft
from llamachat.data.loading import read_records
from llamachat.errors import ArtifactError, BusyError, ChangedError, DataError, UsageError
from llamachat.runs.artifacts import MANIFEST, Artifact, StepFolder, read_artifact
from llamachat.runs.checkpoints import newest, writing
from llamachat.runs.code import changed_code
from llamachat.runs.locks import hold
from llamachat.tables import duration
from pipelines.execution.run import find_work, run_chosen
from pipelines.planning.plan import make_plan, sides_of_data
from pipelines.planning.text import plan_text
from pipelines.recipe.recipe import Recipe, load
from sft.config import VERSION as SFT_VERSION
from tests.recipes import publish_toy_policy, run_command, write_dialogs, write_recipe

TWO_STEPS = ["sft", {"sft": {"name": "sft-2", "learning_rate": 0.25, "tuning": {"method": "lora"}}}]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The inputs of every call of the stage."""
    seen: list[Any] = []

    def run(config: Any, inputs: Any) -> Artifact:
        seen.append(inputs)
        return publish_toy_policy(config, inputs)

    monkeypatch.setattr(sft, "run", run)
    yield seen


def fingerprint(recipe: Recipe, index: int = 0) -> str:
    return find_work(recipe, recipe.steps[index]).fingerprint


# -- fingerprints


def test_operational_keys_and_data_that_are_not_read_leave_the_fingerprint_alone(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "parent").mkdir()
    same = [
        "run.dir=elsewhere",
        f"run.parent={tmp_path}/parent",
        "sft.rows_per_microbatch=2",
        "sft.gradient_checkpointing=true",
        "tracking.log_every=7",
        "tracking.mode=off",
        "base.allow_unproved_tokenizer=true",
        "tuning.rank=4",
        "rollout.temperature=0.5",
        "data.split={judge: 0.2}",
        f"data.helpfulness=[{{path: {tmp_path}/dialogs.jsonl}}]",
    ]
    assert {fingerprint(load(path, [override])) for override in same} == {fingerprint(load(path))}


def test_every_identity_key_changes_the_fingerprint(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    others = [
        "run.seed=1",
        "base.dtype=float32",
        "base.max_tokens=128",
        "base.system=Be brief.",
        "tuning.method=lora",
        "data.sft.0.weight=2",
        "data.sft.0.limit=3",
        "data.split.test=0.1",
        "sft.learning_rate=1e-3",
        "sft.trainer.neftune_noise_alpha=5",
        "steps=[{sft: {name: other}}]",
    ]
    fingerprints = [fingerprint(load(path, [override])) for override in others]
    assert len({fingerprint(load(path)), *fingerprints}) == 1 + len(others)
    rank = [fingerprint(load(path, ["tuning.method=lora", f"tuning.rank={rank}"])) for rank in (8, 16)]
    assert rank[0] != rank[1]


def test_files_count_by_content_and_not_by_name(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    before = fingerprint(load(path))
    (tmp_path / "dialogs.jsonl").rename(tmp_path / "moved.jsonl")
    (tmp_path / "base").rename(tmp_path / "moved_base")
    moved = [f"data.sft.0.path={tmp_path}/moved.jsonl", f"base.model={tmp_path}/moved_base"]
    assert fingerprint(load(path, moved)) == before
    write_dialogs(tmp_path / "moved.jsonl", 41)
    edited = fingerprint(load(path, moved))
    (tmp_path / "moved_base" / "model.safetensors").write_bytes(b"others!")
    assert len({before, edited, fingerprint(load(path, moved))}) == 3


def test_the_version_of_the_stage_is_in_the_identity(tmp_path: Path) -> None:
    recipe = load(write_recipe(tmp_path))
    identity = find_work(recipe, recipe.steps[0]).identity
    assert (identity["step"], identity["command"], identity["stage_version"]) == ("sft", "sft", SFT_VERSION)
    assert len(identity["base"]["model"]) == len(identity["data"]["sft"][0]["path"]) == 64
    assert json.loads(json.dumps(identity)) == identity


# -- running


def test_a_step_gets_its_own_values_and_starts_from_the_nearest_earlier_policy(
    tmp_path: Path, calls: list[Any]
) -> None:
    recipe = load(write_recipe(tmp_path, steps=TWO_STEPS))
    first, second = run_command(recipe, "all")
    assert [inputs.step for inputs in calls] == ["sft", "sft-2"]
    assert calls[0].policy is None and calls[1].policy.digest == first.digest
    assert (calls[0].tuning.method, calls[1].tuning.method) == ("full", "lora")
    assert second.path == tmp_path / "runs" / "one" / "sft-2" / "artifact"
    assert calls[1].identity["inputs"] == {"policy": first.digest}
    lineage = json.loads((tmp_path / "runs" / "one" / "lineage.json").read_text())
    assert [step["step"] for step in lineage["steps"]] == ["sft", "sft-2"]


def test_the_resolved_recipe_is_there_before_the_stage_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(write_recipe(tmp_path), ["sft.epochs=7"])

    def run(config: Any, inputs: Any) -> Artifact:
        folder = inputs.folder
        assert yaml.safe_load(folder.config.read_text())["sft"]["epochs"] == 7
        assert load(folder.config) == recipe
        with pytest.raises(BusyError), hold(folder):
            pass
        return publish_toy_policy(config, inputs)

    monkeypatch.setattr(sft, "run", run)
    run_command(recipe, "sft")


def test_a_finished_unchanged_step_is_not_run_again(
    tmp_path: Path, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_recipe(tmp_path)
    (first,) = run_command(load(path), "sft")
    with caplog.at_level(logging.INFO):
        (second,) = run_command(load(path, ["tracking.log_every=5"]), "sft")
    assert len(calls) == 1 and second.digest == first.digest
    assert f"sft: done already ({tmp_path}/runs/one/sft/artifact), nothing to do" in caplog.messages


def test_a_finished_step_names_its_curves_and_drops_its_checkpoints_unless_they_are_to_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def run(config: Any, inputs: Any) -> Artifact:
        with writing(inputs.folder.checkpoints, 50) as side:
            (side / "weights").write_bytes(b"weights")
        inputs.folder.curves.touch()
        return publish_toy_policy(config, inputs)

    monkeypatch.setattr(sft, "run", run)
    path = write_recipe(tmp_path)
    folders = []
    for keys in ([f"run.dir={tmp_path}/runs/one"], [f"run.dir={tmp_path}/runs/two", "run.keep_checkpoints=true"]):
        recipe = load(path, keys)
        with caplog.at_level(logging.INFO):
            run_command(recipe, "sft")
        folders.append(recipe.folder(recipe.steps[0]))
        assert f"sft: curves: {folders[-1].curves}" in caplog.messages
    assert not folders[0].checkpoints.exists()
    assert newest(folders[1].checkpoints) is not None


def test_a_changed_step_is_refused_with_both_fixes_and_overwritten_on_request(tmp_path: Path, calls: list[Any]) -> None:
    path = write_recipe(tmp_path)
    run_command(load(path), "sft")
    changed = load(path, ["sft.learning_rate=0.5"])
    with pytest.raises(ChangedError) as caught:
        run_command(changed, "sft")
    text = str(caught.value)
    assert "sft.learning_rate: 2e-05 -> 0.5" in text
    assert f"`run.dir=NEW run.parent={tmp_path}/runs/one`" in text and "`--overwrite`" in text
    assert len(calls) == 1
    (artifact,) = run_command(changed, "sft", should_overwrite=True)
    assert len(calls) == 2 and (artifact.path / "model.safetensors").read_text() == "0.5 "


def test_overwrite_deletes_nothing_that_the_recipe_reads(tmp_path: Path, calls: list[Any]) -> None:
    path = write_recipe(tmp_path)
    (artifact,) = run_command(load(path), "sft")
    inside = artifact.path.parent / "mine.jsonl"
    (tmp_path / "dialogs.jsonl").rename(inside)
    (tmp_path / "link.jsonl").symlink_to(inside)
    for override in (f"data.sft.0.path={tmp_path}/link.jsonl", f"base.policy={artifact.path.parent}"):
        whole = load(path, [f"data.sft.0.path={inside}", override])
        with pytest.raises(UsageError, match="which the recipe reads"):
            run_command(whole, "sft", should_overwrite=True)
    assert inside.is_file() and read_artifact(artifact.path).digest == artifact.digest and len(calls) == 1


def test_a_child_run_reruns_only_what_changed(
    tmp_path: Path, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = write_recipe(tmp_path, steps=TWO_STEPS)
    run_command(load(path), "all")
    child = [f"run.dir={tmp_path}/runs/two", f"run.parent={tmp_path}/runs/one", "steps.1.sft.learning_rate=0.125"]
    verdicts = [step.verdict for step in make_plan(load(path, child))]
    with caplog.at_level(logging.INFO):
        run_command(load(path, child), "all")
    assert verdicts == ["reuse", "new"]
    assert [inputs.step for inputs in calls] == ["sft", "sft-2", "sft-2"]
    assert (tmp_path / "runs" / "two" / "sft").is_symlink()
    assert calls[2].policy.digest == calls[1].policy.digest
    assert f"sft: unchanged, taken from {tmp_path}/runs/one/sft" in caplog.messages
    assert any("sft-2: not taken from" in m and "sft.learning_rate: 0.25 -> 0.125" in m for m in caplog.messages)
    assert read_artifact(tmp_path / "runs" / "two").manifest.step == "sft-2"
    # One step alone takes what it reads from the parent too, as the plan says.
    recipe = load(path, [*child, f"run.dir={tmp_path}/runs/three"])
    run_chosen(recipe, [recipe.steps[-1]])
    assert (tmp_path / "runs" / "three" / "sft").is_symlink() and calls[-1].policy.digest == calls[1].policy.digest


def test_a_missing_input_names_the_command_that_makes_it(tmp_path: Path, calls: list[Any]) -> None:
    recipe = load(write_recipe(tmp_path, steps=TWO_STEPS))
    with pytest.raises(ArtifactError, match=r"'sft-2' reads a policy.*Run `make sft` with the same"):
        find_work(recipe, recipe.steps[1])
    assert calls == []
    with pytest.raises(UsageError, match=r"steps: the recipe has no step 'ppo', only sft, sft-2\."):
        run_command(recipe, "ppo")


def test_a_step_takes_the_nearest_finished_policy_and_says_what_it_passed_over(
    tmp_path: Path, calls: list[Any]
) -> None:
    path = write_recipe(tmp_path)
    (artifact,) = run_command(load(path), "sft")
    three = load(path, ["steps=[sft, {sft: {name: sft-2}}, {sft: {name: sft-3}}]"])
    words = find_work(three, three.steps[2]).taken.words
    assert words.startswith("policy of 'sft'") and "not finished: sft-2" in words
    # Without an earlier step base.policy is the input.
    run_command(load(path, [f"run.dir={tmp_path}/runs/two", f"base.policy={tmp_path}/runs/one"]), "sft")
    assert calls[1].policy.digest == artifact.digest


# -- the plan


def test_plan_says_new_then_resume_then_done_then_changed(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_recipe(tmp_path)
    assert make_plan(load(path))[0].verdict == "new"

    def interrupted(config: Any, inputs: Any) -> Artifact:
        assert make_plan(load(path))[0].verdict == "running"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "run", interrupted)
        run_command(load(path), "sft")
    planned = make_plan(load(path))[0]
    assert (planned.verdict, planned.why) == ("resume", "started, and stopped before its first checkpoint")
    run_command(load(path), "sft")
    assert make_plan(load(path))[0].verdict == "done"
    changed = make_plan(load(path, ["sft.epochs=1"]))[0]
    assert changed.verdict == "changed" and "sft.epochs: 2.0 -> 1" in changed.why


def test_a_step_made_by_other_code_is_named_and_left_as_it_is(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path = write_recipe(tmp_path)
    run_command(load(path), "sft")
    recorded = read_artifact(Path(load(path).run.dir)).manifest.code
    assert {"sft/train.py", "sft/loss.py", "llamachat/chat_format/llama2.py"} <= recorded.keys()
    assert not [name for name in recorded if name.startswith(("reward/", "pipelines/", "tests/"))]
    assert "other code" not in make_plan(load(path))[0].why
    edited = {**recorded, "sft/loss.py": "0 0"}
    monkeypatch.setattr("pipelines.execution.run.changed_code", lambda code: changed_code(edited) if code else [])
    planned = make_plan(load(path))[0]
    assert planned.verdict == "done" and "sft/loss.py" in planned.why and "--overwrite" in planned.why
    run_command(load(path), "sft")
    assert len(calls) == 1, "nothing runs again by itself"
    assert any("sft/loss.py" in message and "--overwrite" in message for message in caplog.messages)
    child = load(path, [f"run.dir={tmp_path}/child", f"run.parent={load(path).run.dir}"])
    assert "sft/loss.py" in make_plan(child)[0].why
    # Of a step that was made before the code was recorded nothing is known.
    manifest = StepFolder(Path(load(path).run.dir) / "sft").artifact / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"code": {}}))
    assert "other code" not in make_plan(load(path))[0].why


def test_a_step_that_resumes_keeps_the_record_of_the_code_that_began_it(
    tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_recipe(tmp_path)

    def interrupted(config: Any, inputs: Any) -> Artifact:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "run", interrupted)
        patch.setattr("pipelines.execution.run.code_of", lambda packages: {"sft/loss.py": "1 1"})
        run_command(load(path), "sft")
    run_command(load(path), "sft")
    assert any("begun by other code" in message and "sft/loss.py" in message for message in caplog.messages)
    assert read_artifact(Path(load(path).run.dir)).manifest.code == {"sft/loss.py": "1 1"}


def test_plan_and_log_tell_the_checkpoint_that_a_step_resumes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(config: Any, inputs: Any) -> Artifact:
        with writing(inputs.folder.checkpoints, 50) as side:
            (side / "state").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "run", interrupted)
    recipe = load(write_recipe(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run_command(recipe, "sft")
    assert make_plan(recipe)[0].why == "from step 50"
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        run_command(recipe, "sft")
    assert "sft: resumes from step 50" in caplog.messages


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_recipe_fixed_after_a_refusal_is_not_refused_as_changed(
    has_checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(config: Any, inputs: Any) -> Artifact:
        if has_checkpoint:
            with writing(inputs.folder.checkpoints, 50) as side:
                (side / "state").write_text("x")
        raise DataError("data.sft: no dialogs are left to validate with. Change data.split.")

    path = write_recipe(tmp_path)
    monkeypatch.setattr(sft, "run", refused)
    with pytest.raises(DataError):
        run_command(load(path), "sft")
    monkeypatch.setattr(sft, "run", publish_toy_policy)
    fixed = load(path, ["data.split.validation=0.1"])
    if has_checkpoint:  # there is work to lose
        with pytest.raises(ChangedError, match="half done"):
            run_command(fixed, "sft")
    else:
        assert run_command(fixed, "sft")


def test_plan_of_steps_that_wait_for_one_another(tmp_path: Path, calls: list[Any]) -> None:
    path = write_recipe(tmp_path, steps=TWO_STEPS)
    planned = make_plan(load(path))
    assert [(step.name, step.verdict) for step in planned] == [("sft", "new"), ("sft-2", "waits")]
    text = plan_text(load(path), planned)
    assert "sft-2: waits, needs policy of 'sft'" in text and "all together: about" in text
    run_command(load(path), "all")
    replan = make_plan(load(path, [f"run.dir={tmp_path}/runs/two"]))
    assert [step.verdict for step in replan] == ["new", "waits"]


def test_plan_of_a_step_that_cannot_run_says_why(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    planned = make_plan(load(write_recipe(tmp_path), [f"base.policy={tmp_path}/nothing"]))[0]
    assert planned.verdict == "blocked" and str(tmp_path / "nothing") in planned.why


def test_a_plan_remembers_the_sides_of_a_file_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    reads: list[Any] = []
    monkeypatch.setattr("pipelines.planning.plan.read_records", lambda *args: reads.append(args) or read_records(*args))
    path = write_recipe(tmp_path)

    def total(*overrides: str) -> int:
        line = next(line for line in sides_of_data(load(path, overrides)) if line.startswith("data.sft"))
        return sum(int(number) for number in re.findall(r"(\d+) (?:train|validation|test|judge)", line))

    assert (total(), total(), len(reads)) == (40, 40, 1)
    write_dialogs(tmp_path / "dialogs.jsonl", 41)
    assert (total(), len(reads)) == (41, 2)
    assert (total("data.sft.0.limit=7"), len(reads)) == (7, 3)
    first = next(iter(sides_of_data(load(path))))
    assert next(iter(sides_of_data(load(path, ["data.split.test=0.5"])))) != first and len(reads) == 4
    # Other code may read the same file otherwise; a folder that cannot be written to costs time alone.
    monkeypatch.setattr("pipelines.planning.plan.digest_of_code", lambda *folders: "other")
    assert (total(), len(reads)) == (41, 5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "dialogs.jsonl"))
    assert (total(), total(), len(reads)) == (41, 41, 7)


def test_plan_counts_optimizer_steps_and_warns(tmp_path: Path) -> None:
    path = write_recipe(
        tmp_path,
        sft={"epochs": 3, "examples_per_step": 4, "warmup_fraction": 0.25, "learning_rate": 2e-5},
        tuning={"method": "lora", "rank": 8},
        data={
            "sft": [{"path": str(write_dialogs(tmp_path / "more.jsonl", 100)), "weight": 2.0, "limit": 50}],
            "split": {"test": 0.1, "validation": 0.1, "judge": 0.0},
        },
    )
    planned = make_plan(load(path))[0]
    assert planned.estimate is not None
    # 50 of 100 dialogs twice, 80% for training: 80; three passes of 4 a step: 60.
    assert planned.estimate.optimizer_steps == 60
    warnings = "\n".join(planned.warnings)
    assert "only about 60 optimizer steps, fewer than 100" in warnings
    assert "warm-up takes 25% of the steps, more than a fifth" in warnings
    assert "sft.learning_rate 2e-05 suits full tuning, but tuning.method is lora" in warnings
    assert all(warning in plan_text(load(path), [planned]) for warning in planned.warnings)


def test_a_sound_plan_has_no_warnings(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, sft={"examples_per_step": 1, "epochs": 6, "learning_rate": 1e-3})
    assert make_plan(load(path))[0].warnings == ()


def test_another_architecture_is_not_estimated(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2", "n_embd": 64}')
    assert make_plan(load(path))[0].estimate is None


def test_durations_in_words() -> None:
    assert [duration(seconds) for seconds in (5, 120, 7200)] == ["5 s", "2 min", "2.0 h"]
