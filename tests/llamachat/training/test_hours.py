"""Hours that are over: each step ends with something sound, says so, and is done; the command begins no further one."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ppo
import reward
import sft
from llamachat.answers import groups as groups_module
from llamachat.answers.dialog_step import BatchResult, DialogStep
from llamachat.chat_format import ChatFormat
from llamachat.config.section import identity
from llamachat.runs.artifacts import Artifact, StepFolder, read_artifact
from llamachat.runs.inputs import StepInputs
from llamachat.runs.record import MetricsRecord
from llamachat.training import hours as hours_module
from pipelines.cli.main import main
from pipelines.recipe.recipe import load
from sft import tuning as sft_module
from sft.config import Config as SftConfig
from tests.context_distillation import tiny_distilling
from tests.gatt import tiny_gatt
from tests.llamachat.models.tiny_roles import FULL, World
from tests.ppo.tiny_ppo import config_of, write_stopping_base
from tests.ppo.tiny_ppo import inputs_of as ppo_inputs
from tests.recipes import publish_toy_policy, run_command
from tests.recipes import write_recipe as write_toy_recipe
from tests.rejection_sampling import tiny_rounds
from tests.reward.tiny_reward import reward_inputs
from tests.sft.tiny_sft import inputs_of, toy_dialogs

pytestmark = pytest.mark.usefixtures("no_curves")

TINY = 1e-9  # hours: over when the first piece of work is done
TWO_HOURS = 2.0


class Clock:
    """The seconds that the hours are counted by."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(hours_module, "time", fake)
    return fake


def weights_of(artifact: Artifact) -> dict[str, Tensor]:
    (path,) = artifact.path.glob("*.safetensors")
    return load_file(path)


def steps_of(artifact: Artifact) -> list[float]:
    rows = MetricsRecord(artifact.path.parent / "metrics.jsonl").read()
    return [row["step"] for row in rows if "optim/learning_rate" in row]


# --- trainings


def tuning(folder: Path, base: Path, **limits: Any) -> tuple[Any, StepInputs]:
    deadline = limits.pop("deadline", None)
    settings = {"examples_per_step": 4, "learning_rate": 1e-2, "warmup_fraction": 0, "sample_prompts": 0}
    return sft.Config(**settings, **limits), replace(inputs_of(folder, base, toy_dialogs(24)), deadline=deadline)


def ranking(folder: Path, base: Path, **limits: Any) -> tuple[Any, StepInputs]:
    return reward.Config(pairs_per_step=8, **limits), reward_inputs(folder, base)


def playing(folder: Path, _: Path, sentencepiece: bytes, **limits: Any) -> tuple[Any, StepInputs]:
    deadline = limits.pop("deadline", None)
    base = write_stopping_base(folder / "base", sentencepiece)
    return config_of(**limits), replace(ppo_inputs(folder, base), deadline=deadline)


STAGES: dict[str, Any] = {"sft": sft, "rm/helpfulness": reward, "ppo": ppo}


@pytest.mark.parametrize(
    ("make", "limits", "ended_by", "words"),
    [
        (tuning, {"max_hours": TINY}, "max_hours", "sft: sft.max_hours (1e-09) is used up at step 1"),
        (tuning, {"deadline": 0.0}, "run.max_hours", "sft: run.max_hours is used up at step 1"),
        (ranking, {"max_hours": TINY}, "max_hours", "rm/helpfulness: reward.max_hours (1e-09) is used up at step 1"),
        (playing, {"max_hours": TINY}, "max_hours", "ppo: ppo.max_hours (1e-09) is used up at iteration 1"),
        (playing, {"deadline": 0.0}, "run.max_hours", "ppo: run.max_hours is used up at iteration 1"),
    ],
)
def test_a_training_ends_after_its_first_step_and_its_weights_have_moved(
    make: Any,
    limits: dict[str, Any],
    ended_by: str,
    words: str,
    base: Path,
    tiny_sentencepiece: bytes,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    more = {"sentencepiece": tiny_sentencepiece} if make is playing else {}
    config, inputs = make(tmp_path, base, **more, **limits)
    with caplog.at_level(logging.WARNING):
        artifact = STAGES[inputs.step].run(config, inputs)
    details = artifact.manifest.details
    assert (details["ended_by"], steps_of(artifact)) == (ended_by, [1]) and words in caplog.text
    if make is tuning:
        summary = json.loads((artifact.path.parent / "summary.json").read_text())
        before = load_file(base / "model.safetensors")["lm_head.weight"]
        assert details["optimizer_step"] == 1 and not torch.equal(weights_of(artifact)["lm_head.weight"], before)
        assert summary["sft/eval_loss"] != summary["sft/eval_loss_base"]
    if make is playing:
        assert details["iterations_done"] == 1 and details["end"] == ended_by


LOSSES = (9.0, 4.0, 2.0, 3.0, 5.0, 6.0)  # on held-out answers: before, and after each step


class Scripted:
    """Held-out losses as written, an evaluation taking 1000 seconds; the weights that were evaluated, by step."""

    def __init__(self, clock: Clock, *, dies_at: int = -1, first: int = 0) -> None:
        self.clock, self.dies_at, self.step = clock, dies_at, first
        self.seen: dict[int, dict[str, Tensor]] = {}

    def __call__(self, model: Any, *_: Any, **__: Any) -> float:
        if self.step == self.dies_at:
            raise KeyboardInterrupt
        self.clock.now += 1000
        self.seen[self.step] = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        self.step += 1
        return LOSSES[self.step - 1]


SEVERAL = SftConfig(epochs=3, examples_per_step=4, learning_rate=1e-3, sample_prompts=0, max_hours=1.0)


def tuned(tmp_path: Path, base: Path, losses: Scripted, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    monkeypatch.setattr(sft_module, "answer_loss", losses)
    return sft.run(SEVERAL, inputs_of(tmp_path, base, toy_dialogs(24), tracking={"eval_every": 1, "save_every": 1}))


def test_the_best_of_what_was_evaluated_is_published(
    base: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hour: after evaluations at 0, 1, 2 and 3 it is 4000 seconds, which step 4 finds."""
    losses = Scripted(clock)
    artifact = tuned(tmp_path, base, losses, monkeypatch)
    assert steps_of(artifact) == [1, 2, 3, 4] and artifact.manifest.details["optimizer_step"] == 2
    published = weights_of(artifact)
    assert all(torch.equal(weight, losses.seen[2][name]) for name, weight in published.items())
    assert not torch.equal(published["lm_head.weight"], losses.seen[4]["lm_head.weight"])
    assert json.loads((artifact.path.parent / "summary.json").read_text())["sft/eval_loss"] == 2.0


def test_a_kill_neither_sets_the_hours_back_nor_loses_the_best(
    base: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path, base, Scripted(clock, dies_at=3), monkeypatch)
    clock.now += 100_000  # nobody works
    artifact = tuned(tmp_path, base, Scripted(clock, first=3), monkeypatch)
    details = artifact.manifest.details
    assert (details["ended_by"], details["optimizer_step"], steps_of(artifact)[-1]) == ("max_hours", 2, 4)
    clock.now += 100_000
    (artifact.path / "manifest.json").unlink()  # killed before it was published: nothing is trained or measured again
    again = tuned(tmp_path, base, Scripted(clock, dies_at=0), monkeypatch)
    assert again.manifest.files == artifact.manifest.files and again.manifest.details == details


def test_where_the_best_weights_are_damaged_the_last_ones_are_published_and_said_to_be(
    base: Path, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    losses = Scripted(clock)
    artifact = tuned(tmp_path, base, losses, monkeypatch)
    best = artifact.path.parent / "checkpoints" / "best.safetensors"
    for damage in (best.read_bytes()[:-8] + b"damaged!", b"no weights at all"):
        best.write_bytes(damage)
        (artifact.path / "manifest.json").unlink()  # killed before it was published
        again = tuned(tmp_path, base, Scripted(clock, dies_at=0), monkeypatch)
        assert "optimizer_step" not in again.manifest.details and again.manifest.details["ended_by"] == "max_hours"
        assert all(torch.equal(weight, losses.seen[4][name]) for name, weight in weights_of(again).items())
        assert "best.safetensors has changed since it was saved: using the last weights" in caplog.text
        caplog.clear()


def test_a_training_that_ends_by_itself_publishes_its_last_state(base: Path, tmp_path: Path) -> None:
    """Within its hours it is the very one of a recipe without them."""
    artifacts = []
    for name, limit in (("with", TWO_HOURS), ("without", None)):
        (tmp_path / name).mkdir()
        config = SftConfig(epochs=1, examples_per_step=4, sample_prompts=0, max_hours=limit)
        artifacts.append(sft.run(config, inputs_of(tmp_path / name, base, toy_dialogs(12))))
        assert "ended_by" not in artifacts[-1].manifest.details
    assert artifacts[0].manifest.files == artifacts[1].manifest.files


# --- steps that sample


def test_batches_are_made_until_the_hours_are_over_and_those_held_out_in_any_case(tmp_path: Path, clock: Clock) -> None:
    """Batches of 1500 seconds in one hour: the third of five is the last; a resumed command knows of the first two."""
    sampled: list[int] = []

    def step() -> DialogStep:
        """The step of a new command, on the same folder."""
        inputs: Any = SimpleNamespace(step="rs", folder=StepFolder(tmp_path), deadline=None)
        return DialogStep(inputs, section="rejection_sampling", prefix="rs", max_hours=1.0)

    def make(number: int, items: tuple[int, ...], *, dies_at: int = -1) -> dict[str, Any]:
        if number == dies_at:
            raise KeyboardInterrupt
        clock.now += 1500
        sampled.append(number)
        return {"sum": sum(items)}

    def make_all(step: DialogStep, **how: int) -> list[tuple[float, bool]]:
        read: list[tuple[float, bool]] = []

        def result(_: tuple[int, ...], values: Mapping[str, Any], is_held_out: bool) -> BatchResult:
            read.append((values["sum"], is_held_out))
            return BatchResult({}, [], "")

        tracker: Any = SimpleNamespace(log=lambda *_: None, samples=lambda *_: None)
        train = [(1, 2), (3, 4), (5, 6), (7, 8), (9,)]
        step.make_batches(
            tracker, train, [(10,)], make=lambda n, items: make(n, items, **how), read=result, unit="prompts"
        )
        return read

    with pytest.raises(KeyboardInterrupt):
        make_all(step(), dies_at=3)
    clock.now += 100_000
    again = step()
    assert make_all(again) == [(3, False), (7, False), (11, False), (10, True)] and sampled == [1, 2, 3, 6]
    assert again.dropped == {"prompts left out: rejection_sampling.max_hours is used up": 3}
    assert len(make_all(step())) == 4 and len(sampled) == 4


@pytest.fixture(scope="module")
def recipes(
    tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes, tiny_format: ChatFormat
) -> dict[str, Callable[[], Path]]:
    """A recipe of each step that samples, with two batches or more."""
    folder = tmp_path_factory.mktemp("recipes")
    world = World(tmp_path_factory.mktemp("roles"), tiny_format, tiny_sentencepiece, tiny_distilling.write_roomy_base)
    stopping = write_stopping_base(folder / "stopping", tiny_sentencepiece)
    roomy = tiny_gatt.write_roomy_base(folder / "roomy", tiny_sentencepiece)

    def distilling() -> Path:
        safety = world.reward_model("safety", FULL, FULL).path
        return tiny_distilling.write_recipe(folder / "d" / "one.yaml", Path(world.base.model), safety)

    for name in ("r", "g", "d"):
        (folder / name).mkdir()
    return {
        "rs": lambda: tiny_rounds.write_recipe(folder / "r" / "one.yaml", stopping),
        "gatt": lambda: tiny_gatt.write_recipe(folder / "g" / "one.yaml", roomy),
        "distill": distilling,
    }


@pytest.mark.parametrize(
    ("command", "section", "what"),
    [
        ("rs", "rejection_sampling", "prompts"),
        ("gatt", "gatt", "dialogs"),
        ("distill", "context_distillation", "prompts"),
    ],
)
def test_what_was_sampled_is_learnt(
    command: str,
    section: str,
    what: str,
    recipes: dict[str, Callable[[], Path]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for module in (groups_module, import_module("gatt.train")):
        monkeypatch.setattr(module, "ANSWERS_PER_BATCH", 60)
    recipe = recipes[command]()
    with caplog.at_level(logging.INFO):
        (artifact,) = run_command(load(recipe, [f"{section}.max_hours={TINY}"]), command)
    dialogs = read_artifact(StepFolder(artifact.path.parent).dialogs, "dialogs").manifest
    left_out = {reason: count for reason, count in dialogs.dropped_records.items() if "max_hours" in reason}
    assert list(left_out) == [f"{what} left out: {section}.max_hours is used up"] and min(left_out.values()) > 0
    assert dialogs.details["ended_by"] == artifact.manifest.details["ended_by"] == "max_hours"
    assert f"{command}: {section}.max_hours (1e-09) is used up at batch 1 of" in caplog.text
    assert f"{left_out.popitem()[1]} {what} left out: {section}.max_hours is used up" in caplog.text
    assert steps_of(artifact) and "sft.max_hours" not in caplog.text, "the tuning has hours of its own"
    batches = sorted(path.name for path in StepFolder(artifact.path.parent).sampling.glob("batch-*.json"))
    assert batches[0] == "batch-00001.json" and "batch-00002.json" not in batches and len(batches) >= 2
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run_command(load(recipe, [f"{section}.max_hours={TINY}"]), command)
    assert f"{command}: done already" in caplog.text


# --- the command


TWO_STEPS = ["sft", {"sft": {"name": "sft-2"}}, {"sft": {"name": "sft-3"}}]


def test_when_the_commands_hours_are_over_no_further_step_is_begun_and_the_same_command_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: Counter[str] = Counter()

    def run(config: Any, inputs: Any) -> Artifact:
        begun[inputs.step] += 1
        assert inputs.deadline is not None
        return publish_toy_policy(config, inputs)

    monkeypatch.setattr(sft, "run", run)
    command = ["all", "--config", str(write_toy_recipe(tmp_path, steps=TWO_STEPS)), f"run.max_hours={TINY}"]
    words = []
    for status in (3, 3, 0, 0):  # 3: steps are left
        assert main(command) == status
        said = capsys.readouterr().out
        words.append(said.splitlines()[-1])
    assert begun == {"sft": 1, "sft-2": 1, "sft-3": 1}
    assert words[0].startswith("run.max_hours (1e-09) is used up. Not started: sft-2, sft-3. The same command runs")
    assert "Not started: sft-3." in words[1] and words[2].startswith("All steps are done.")
    assert words[3] == words[2] and f"nothing to do: all 3 steps are done already ({tmp_path}/runs/one)\n" in said


@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"seconds": 1}', '{"seconds": NaN, "ended_by": null}', '{"seconds": -1, "ended_by": null}']
    + [f'{{"seconds": 5, "ended_by": {odd}}}' for odd in ('"x"', "5", "[]", "{}")],
)
def test_a_damaged_clock_is_reset_and_ends_nothing(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / hours_module.FILE).write_text(content)
    hours = hours_module.open_hours("rs", "rejection_sampling", 1.0, None, tmp_path)
    assert (hours.seconds_before, hours.ended_by) == (0.0, None) and "cannot be read" in caplog.text
    (tmp_path / hours_module.FILE).write_text('{"seconds": 5, "ended_by": "max_hours"}')
    hours = hours_module.open_hours("rs", "rejection_sampling", 1.0, None, tmp_path)
    assert (hours.seconds_before, hours.ended_by) == (5.0, "max_hours")


def test_hours_that_are_not_set_are_no_part_of_an_identity() -> None:
    """A step that was finished before there were such keys stays done."""
    assert "max_hours" not in identity(SftConfig()) and identity(SftConfig(max_hours=2))["max_hours"] == 2
