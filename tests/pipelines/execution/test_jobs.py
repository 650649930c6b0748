"""Independent steps side by side: which ones, that they overlap, what a failure or a kill leaves, equal results."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llamachat.errors import LlamachatError
from llamachat.runs.artifacts import StepFolder, read_artifact
from llamachat.runs.checkpoints import newest
from pipelines.execution import jobs
from pipelines.execution.jobs import Group, StepsFailedError, independent_steps, one_by_one, run_groups
from pipelines.planning.hardware import usable_cores
from pipelines.recipe.recipe import Recipe, load
from tests.killed_steps import ENVIRONMENT, ROOT, results
from tests.recipes import preference_data, write_recipe
from tests.reward.tiny_reward import data_of, toy_labels, toy_pairs
from tests.sft.tiny_sft import write_base
from tests.tiny_steps import step_of, write_values

KEEP = "run.keep_checkpoints=true"  # also of the step that ends first
MODELS = ("rm/helpfulness", "rm/safety", "rm/judge")

# In place of the stages, in every process of the command. What a step does is in its file `<step name>.json` next to the
# run: {"waits_for": a step that must have begun, "ends": "exit 7", "sleeps": seconds}. Each step writes when it begins and ends.
TOYS = """
import json, os, sys, time
from pathlib import Path
from types import SimpleNamespace
import rejection_sampling, reward, sft
from llamachat.errors import DataError
from tests.recipes import publish_toy_policy, publish_toy_reward_model

def toy(publish):
    def run(config, inputs):
        events = Path(inputs.run.dir).parent / "events"
        events.mkdir(exist_ok=True)
        name = inputs.step.replace("/", "-")
        path = events / f"{name}.json"
        orders = json.loads(path.read_text()) if path.exists() else {}
        note = {"began": time.monotonic(), "threads": os.environ.get("OMP_NUM_THREADS"), "pid": os.getpid(),
                "card": os.environ.get("CUDA_VISIBLE_DEVICES"), "deadline": inputs.deadline}
        (events / f"{name}.began").write_text(json.dumps(note))
        print(f"{inputs.step} 1/2  loss 0.5  0:02 elapsed, 0:03 left\\nat work", file=sys.stderr, flush=True)
        limit = time.monotonic() + 600
        while "waits_for" in orders and not (events / orders["waits_for"]).exists():
            assert time.monotonic() < limit, "the other step did not begin while this one ran"
            time.sleep(0.01)
        time.sleep(orders.get("sleeps", 0))
        if "fails" in orders:
            raise DataError(orders["fails"])
        if "signal" in orders:
            os.kill(os.getpid(), orders["signal"])
        artifact = publish(config, inputs)
        (events / f"{name}.ended").write_text(str(time.monotonic()))
        return artifact
    return run

sft.run, reward.run = toy(publish_toy_policy), toy(publish_toy_reward_model)
rejection_sampling.run = toy(lambda _, inputs: publish_toy_policy(SimpleNamespace(learning_rate=1.0), inputs))
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """An sft step, three reward models that read it, and a step that reads them; their stages are toys in every process."""
    toys = tmp_path / "toys"
    toys.mkdir()
    (toys / "sitecustomize.py").write_text(TOYS)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(toys))
    for name in ("sft", "reward", "rejection_sampling"):
        monkeypatch.setattr(f"{name}.run", None)  # put back after the test
    exec(TOYS, {})
    (tmp_path / "runs").mkdir()
    path = write_recipe(tmp_path, data=preference_data(tmp_path), steps=["sft", "rm", "rs"])
    return load(path)


def order(recipe: Recipe, step: str, **what: Any) -> None:
    """What a toy step does."""
    folder = Path(recipe.run.dir).parent / "events"
    folder.mkdir(exist_ok=True)
    (folder / f"{step.replace('/', '-')}.json").write_text(json.dumps(what))


def note(recipe: Recipe, step: str) -> dict[str, Any]:
    """What a toy step noted as it began."""
    return json.loads((Path(recipe.run.dir).parent / "events" / f"{step.replace('/', '-')}.began").read_text())


def ended(recipe: Recipe, step: str) -> float:
    return float((Path(recipe.run.dir).parent / "events" / f"{step.replace('/', '-')}.ended").read_text())


def began(recipe: Recipe, step: str) -> bool:
    return (Path(recipe.run.dir).parent / "events" / f"{step.replace('/', '-')}.began").exists()


def side_by_side(recipe: Recipe, jobs: int = 2, **more: Any) -> list[Group]:
    return [
        Group(tuple(steps), jobs, 3, **more) if len(steps) > 1 else Group(tuple(steps))
        for steps in independent_steps(recipe.steps)
    ]


# -- which steps


def test_the_reward_models_of_the_bundled_recipe_do_not_read_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    steps = load("configs/tiny.yaml").steps
    assert [[step.name for step in group] for group in independent_steps(steps)] == [
        ["sft"],
        list(MODELS),
        *(["rs"], ["ppo"], ["gatt"], ["distill"], ["eval"], ["report"]),
    ]


def test_a_step_that_reads_no_reward_model_runs_beside_them_and_later_rounds_wait(tmp_path: Path) -> None:
    data = {**preference_data(tmp_path), "split": {"test": 0.05, "validation": 0.05, "judge": 0}}
    steps = ["rm/safety", "sft", "rm/helpfulness", {"gatt": {"ranks_by_reward": False}}, "rs", {"rs": {"name": "rs-2"}}]
    recipe = load(write_recipe(tmp_path, data=data, steps=steps))
    assert [[step.name for step in group] for group in independent_steps(recipe.steps)] == [
        ["rm/safety", "sft"],
        ["rm/helpfulness", "gatt"],
        ["rs"],
        ["rs-2"],
    ]


# -- order and overlap


def test_independent_steps_overlap_and_every_step_waits_for_what_it_reads(recipe: Recipe) -> None:
    order(recipe, "rm/helpfulness", waits_for="rm-safety.began")
    order(recipe, "rm/safety", waits_for="rm-helpfulness.began")
    ran = run_groups(recipe, side_by_side(recipe, cards=("2", "5")))
    assert {artifact.manifest.step for artifact in ran.artifacts} == {step.name for step in recipe.steps}
    assert (ran.num_worked, ran.left) == (5, ())
    assert all(ended(recipe, "sft") < note(recipe, model)["began"] for model in MODELS)
    assert all(ended(recipe, model) < note(recipe, "rs")["began"] for model in MODELS)
    # Two at once: the third begins when one of them has ended.
    assert note(recipe, "rm/judge")["began"] > min(ended(recipe, "rm/helpfulness"), ended(recipe, "rm/safety"))
    assert note(recipe, "sft")["pid"] == note(recipe, "rs")["pid"] == os.getpid()
    assert len({note(recipe, model)["pid"] for model in MODELS} | {os.getpid()}) == 4
    assert {note(recipe, model)["threads"] for model in MODELS} == {"3"}
    assert [note(recipe, model)["card"] for model in MODELS[:2]] == ["2", "5"]


def test_more_steps_than_cores_take_turns_by_their_shares(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TURN_S", 0.02)
    for model in MODELS:
        order(recipe, model, waits_for="enough")
    seen: list[tuple[bool, ...]] = []  # whether each model's process could run, at a moment

    def watch() -> None:
        while not all(began(recipe, model) for model in MODELS):
            time.sleep(0.01)
        processes = [psutil.Process(note(recipe, model)["pid"]) for model in MODELS]
        while len(seen) < 200:
            seen.append(tuple(one.status() != psutil.STATUS_STOPPED for one in processes))
            time.sleep(0.013)
        (Path(recipe.run.dir).parent / "events" / "enough").touch()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    ran = run_groups(recipe, side_by_side(recipe, 3, at_once=2, seconds=(2.0, 1.0, 1.0)))
    watcher.join()
    assert ran.num_worked == 5, "a stopped process is continued to its end"
    # Two of three run: the first, with half of all shares, always, and each of the others half of the time.
    assert [sum(column) / len(seen) for column in zip(*seen, strict=True)] == pytest.approx([1.0, 0.5, 0.5], abs=0.2)


def test_a_second_run_of_them_finds_all_done_and_starts_no_process(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_groups(recipe, one_by_one(recipe.steps))
    monkeypatch.setattr(subprocess, "Popen", None)
    ran = run_groups(recipe, side_by_side(recipe))
    assert ran.num_worked == 0 and len(ran.artifacts) == 5


def test_side_by_side_makes_the_artifacts_of_one_after_another(recipe: Recipe, tmp_path: Path) -> None:
    other = recipe.changed(run=recipe.run.model_copy(update={"dir": str(tmp_path / "runs" / "two")}))
    run_groups(recipe, side_by_side(recipe))
    run_groups(other, one_by_one(other.steps))
    for step in recipe.steps:
        one, two = (read_artifact(of.folder(step).artifact) for of in (recipe, other))
        assert (one.digest, one.manifest.fingerprint) == (two.digest, two.manifest.fingerprint)
    lineages = [json.loads((Path(of.run.dir) / "lineage.json").read_text())["steps"] for of in (recipe, other)]
    assert [step["digest"] for step in lineages[0]] == [step["digest"] for step in lineages[1]]


def test_an_unchanged_step_of_the_parent_run_is_taken_and_a_changed_one_runs(recipe: Recipe, tmp_path: Path) -> None:
    run_groups(recipe, one_by_one(recipe.steps))
    (Path(recipe.run.dir).parent / "events" / "rm-judge.began").unlink()
    run = recipe.run.model_copy(update={"dir": str(tmp_path / "runs" / "two"), "parent": recipe.run.dir})
    reward = recipe.sections.reward.model_copy(
        update={"safety_auxiliary_weight": 0.3}
    )  # only the safety model reads it
    child = recipe.changed(run=run, reward=reward)
    ran = run_groups(child, side_by_side(child))
    assert ran.num_worked == 1 and not began(recipe, "rm/judge")
    assert child.folder(child.step("rm/judge")).path.is_symlink()
    assert not child.folder(child.step("rm/safety")).path.is_symlink()


def test_overwrite_runs_them_again(recipe: Recipe) -> None:
    run_groups(recipe, one_by_one(recipe.steps))
    before = note(recipe, "rm/safety")["began"]
    steps = [step for step in recipe.steps if step.name in MODELS]
    ran = run_groups(recipe, [Group(tuple(steps), 2, 1)], should_overwrite=True)
    assert ran.num_worked == 3 and note(recipe, "rm/safety")["began"] > before


# -- hours


def test_the_hours_of_the_command_hold_for_each_process_and_start_no_further_one(recipe: Recipe) -> None:
    limited = recipe.changed(run=recipe.run.model_copy(update={"max_hours": 1e-9}))
    models = [step for step in limited.steps if step.name in MODELS]
    now = time.monotonic()
    ran = run_groups(limited, [Group((limited.steps[0],)), Group(tuple(models), 2, 1)])
    assert [artifact.manifest.step for artifact in ran.artifacts] == ["sft"] and ran.left == MODELS
    ran = run_groups(limited, [Group((limited.steps[0],)), Group(tuple(models), 2, 1)])
    # One always runs, or there would be no progress.
    assert len(ran.artifacts) == 2 and len(ran.left) == 2
    assert now < note(recipe, "rm/helpfulness")["deadline"] < time.monotonic()


# -- failures


def test_a_failure_stops_nothing_but_what_reads_it_and_is_reported_at_the_end_with_its_status(
    recipe: Recipe, capfd: pytest.CaptureFixture[str]
) -> None:
    order(recipe, "rm/helpfulness", fails="pairs.jsonl:3: is no pair.")
    order(recipe, "rm/safety", waits_for="rm-judge.began")
    with pytest.raises(StepsFailedError) as failed:
        run_groups(recipe, side_by_side(recipe))
    assert failed.value.exit_status == 2, "that of a DataError"
    assert str(failed.value).startswith("1 step failed:\n")
    assert "rm/helpfulness failed with exit status 2: llamachat: pairs.jsonl:3: is no pair." in str(failed.value)
    assert "Not started, since their inputs are missing: rs." in str(failed.value)
    done = [step.name for step in recipe.steps if recipe.folder(step).artifact.is_dir()]
    assert done == ["sft", "rm/safety", "rm/judge"]
    said = capfd.readouterr().err
    assert "rm/helpfulness: failed" in said
    for model in ("rm/safety", "rm/judge"):  # what they print stands under their names
        assert f"\n{model} 1/2  loss 0.5  0:02 elapsed, 0:03 left\n" in said
        assert f"\n{model}: at work\n" in said and f"\n{model}: done (" in said


def test_a_process_that_the_system_ends_is_a_failure_with_a_hint(recipe: Recipe) -> None:
    order(recipe, "rm/safety", signal=int(signal.SIGKILL))
    run_groups(recipe, one_by_one(recipe.steps[:2]))
    with pytest.raises(StepsFailedError, match=r"rm/safety was killed by SIGKILL\. .*run\.jobs=1") as failed:
        run_groups(recipe, side_by_side(recipe))
    assert failed.value.exit_status == 1
    assert recipe.folder(recipe.step("rm/judge")).artifact.is_dir()


def test_a_step_that_is_refused_before_it_starts_is_a_failure_too(recipe: Recipe) -> None:
    run_groups(recipe, one_by_one(recipe.steps[:2]))
    changed = recipe.changed(reward=recipe.sections.reward.model_copy(update={"margin": "large"}))
    models = [step for step in changed.steps if step.name in MODELS]
    with pytest.raises(LlamachatError, match="is finished and was made with another configuration") as failed:
        run_groups(changed, [Group(tuple(models), 2, 1)])
    assert failed.value.exit_status == 2
    assert changed.folder(changed.step("rm/safety")).artifact.is_dir()


# -- kills


def command(tmp_path: Path) -> "subprocess.Popen[str]":
    """The reward models, two at a time; since each has all cores, they take turns, and one of them is always stopped."""
    places = [str(tmp_path / "toys"), str(ROOT)]
    return subprocess.Popen(
        [sys.executable, "-m", "pipelines", "rm", "--config", str(tmp_path / "recipe.yaml"), "run.jobs=2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": str(usable_cores())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=heed_interrupts,
    )


def heed_interrupts() -> None:
    """Tests may run in the background of a script, where SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(recipe: Recipe, steps: Sequence[str]) -> None:
    limit = time.monotonic() + 600
    while not all(began(recipe, step) for step in steps):
        assert time.monotonic() < limit, "they did not begin"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 130), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_stops_all_and_the_same_command_runs_them(
    number: signal.Signals, status: int, recipe: Recipe, tmp_path: Path
) -> None:
    run_groups(recipe, one_by_one(recipe.steps[:1]))
    first = ("rm/helpfulness", "rm/safety")
    for model in first:
        order(recipe, model, sleeps=300)
    started = command(tmp_path)
    wait_for(recipe, first)
    children = [psutil.Process(note(recipe, model)["pid"]) for model in first]
    if number == signal.SIGINT:  # which Ctrl-C sends to all processes of the terminal; the first one stops the others
        for child in children:
            child.send_signal(number)
        assert not psutil.wait_procs(children, timeout=0.5)[0]
    started.send_signal(number)
    said, _ = started.communicate(timeout=600)
    assert started.returncode == status, said
    assert not psutil.wait_procs(children, timeout=300)[1], "a step outlived its command"
    if status == 130:
        assert said.count("llamachat: interrupted. The state is kept; the same command resumes.") == 1
    if number == signal.SIGTERM:
        for model in first:
            order(recipe, model)
        again = command(tmp_path)
        said, _ = again.communicate(timeout=600)
        assert again.returncode == 0, said
        assert all(StepFolder(Path(recipe.run.dir) / model).artifact.is_dir() for model in MODELS)


# -- with real trainings


def test_killed_side_by_side_and_resumed_they_end_with_the_bytes_of_one_after_another(
    tmp_path: Path, tiny_sentencepiece: bytes
) -> None:
    base = write_base(tmp_path / "base", tiny_sentencepiece, dtype=torch.bfloat16)
    data = data_of(tmp_path, helpfulness=toy_pairs(60), safety=toy_pairs(60, "the moon"), labels=toy_labels(24))
    values = {
        "base": {"dtype": "bfloat16", "max_tokens": 64},
        "data": data.model_dump(mode="json"),
        "reward": {"epochs": 4, "pairs_per_step": 8, "learning_rate": 3e-3},
        "tracking": {"save_every": 2, "eval_every": 1000, "sample_every": 1000},
    }
    names = ("rm/helpfulness", "rm/safety")

    def start(recipe: Path, jobs: int) -> "subprocess.Popen[str]":
        arguments = [sys.executable, "-m", "pipelines", "rm", "--config", str(recipe), f"run.jobs={jobs}", KEEP]
        return subprocess.Popen(
            arguments, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    together, alone = (
        write_values(tmp_path / f"{name}.yaml", base, values, steps=["rm"]) for name in ("together", "alone")
    )
    killed = start(together, 2)
    limit = time.monotonic() + 600
    while not all(newest(step_of(together, name).checkpoints) for name in names):
        assert killed.poll() is None and time.monotonic() < limit, killed.communicate()[0]
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert not all(step_of(together, name).artifact.exists() for name in names)
    for recipe, count in ((together, 2), (alone, 1)):
        done = start(recipe, count)
        said, _ = done.communicate(timeout=900)
        assert done.returncode == 0, said
        assert ("rm/safety: resumes from step" in said) == (count == 2)
    for name in names:
        assert results(step_of(together, name)) == results(step_of(alone, name))
