"""PPO and sampling by two processes (gloo) do what one does; killed together, any number of them resumes."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ppo
import ppo.train
from llamachat import distributed
from llamachat.config.sections import Run
from llamachat.errors import ConfigError
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.checkpoints import newest
from llamachat.runs.inputs import StepInputs
from llamachat.runs.record import MetricsRecord, SamplesRecord
from ppo.config import Config
from ppo.session import check_settings
from ppo.update import Updater
from rejection_sampling.train import dialog_step, make_dialogs
from tests.killed_steps import lasting_rows
from tests.llamachat.models.tiny_roles import FULL, World, labelled
from tests.ppo.tiny_ppo import config_of, inputs_of, write_stopping_base
from tests.rejection_sampling.tiny_rounds import write_recipe
from tests.several import run_several
from tests.tiny_llama import LORA
from tests.tiny_steps import inputs_of as inputs_of_round
from tests.tiny_steps import step_of

CONFIG = config_of(
    responses_per_iteration=12,
    responses_per_minibatch=6,
    validation_prompts=4,
    test_prompts=4,
    kl_control="adaptive",
    tokens_per_microbatch=96,
)


@pytest.fixture(scope="module")
def inputs(world: World, tmp_path_factory: pytest.TempPathFactory) -> StepInputs:
    """With two reward models, so that their reading is shared, too."""
    models = {role: labelled(world.reward_model(role, LORA, FULL)) for role in ("helpfulness", "safety")}
    return inputs_of(
        tmp_path_factory.mktemp("ppo"),
        Path(world.base.model),
        policy=world.policy(FULL),
        reward_models=models,
        scoring={"combine": "llama2_gate", "unfinished_score": 0.5},
        tuning=LORA,
    )


def named(inputs: StepInputs, name: str) -> StepInputs:
    """The same work in another run folder."""
    runs = inputs.folder.path.parents[1]
    return replace(inputs, folder=StepFolder(runs / name / "ppo"), run=Run(dir=str(runs / name), seed=inputs.run.seed))


def train(config: Config, inputs: StepInputs, killed_at: int = -1) -> dict[str, Tensor]:
    """The policy that this process holds in the end; all die when the checkpoint of an iteration is there."""
    trainings: list[ppo.train.Training] = []
    save = ppo.train.Training.save

    def save_and_die(self: ppo.train.Training) -> None:
        trainings[:] = [self]
        try:
            save(self)
        finally:
            if self.state.iteration == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    ppo.train.Training.save = save_and_die
    ppo.run(config, inputs)
    return {name: weight.clone() for name, weight in trainings[0].session.bank.state_dict().items()}


def assert_alike(one: StepInputs, other: StepInputs) -> None:
    """Line by line the same figures, the same answers, and the same policy but for rounding."""
    rows, others = lasting_rows(one.folder), lasting_rows(other.folder)
    assert [row["step"] for row in rows] == [row["step"] for row in others] == sorted({row["step"] for row in rows})
    for row, row_of_other in zip(rows, others, strict=True):
        assert row == pytest.approx(row_of_other, rel=1e-4, abs=1e-4)
    answers, answers_of_other = (
        [row["answer"] for row in SamplesRecord(of.folder.samples).read()] for of in (one, other)
    )
    assert answers and answers == answers_of_other
    weights, weights_of_other = (load_file(of.folder.artifact / "adapter_model.safetensors") for of in (one, other))
    assert weights.keys() == weights_of_other.keys()
    for name, weight in weights.items():
        assert distance(weights_of_other[name], weight) < 1e-3


def distance(one: Tensor, other: Tensor) -> float:
    """Relative to the other."""
    return float((one.double() - other.double()).norm() / other.double().norm().clamp(min=1e-12))


@pytest.fixture(scope="module")
def by_one(inputs: StepInputs) -> Iterator[StepInputs]:
    """Three iterations of one process."""
    renamed = named(inputs, "by-one")
    run_several(1, train, CONFIG, renamed)
    yield renamed


def test_two_processes_train_the_policy_that_one_does(inputs: StepInputs, by_one: StepInputs) -> None:
    by_two = named(inputs, "by-two")
    first, second = run_several(2, train, CONFIG, by_two)
    assert len(lasting_rows(by_two.folder)) == 4  # the start and three iterations: one process writes
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert_alike(by_two, by_one)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_killed_after_two_iterations_another_number_of_processes_resumes(
    before: int, after: int, inputs: StepInputs, by_one: StepInputs
) -> None:
    killed = named(inputs, f"killed-{before}")
    assert run_several(before, train, CONFIG, killed, 2, may_die=True) == [None] * before
    checkpoint = newest(killed.folder.checkpoints)
    assert checkpoint is not None and checkpoint.step == 2
    run_several(after, train, CONFIG, killed)
    assert_alike(killed, by_one)


def sample_round(recipe: Path) -> None:
    config, inputs = inputs_of_round(recipe)
    make_dialogs(config, dialog_step(config, inputs))


def test_two_processes_sample_and_choose_the_dialogs_that_one_does(tmp_path: Path, tiny_sentencepiece: bytes) -> None:
    base = write_stopping_base(tmp_path / "base", tiny_sentencepiece)
    recipes = [write_recipe(tmp_path / f"by-{count}.yaml", base) for count in (1, 2)]
    for count, recipe in enumerate(recipes, start=1):
        run_several(count, sample_round, recipe)
    one, two = ((step_of(recipe).dialogs / "dialogs.jsonl").read_text() for recipe in recipes)
    assert one.count("\n") > 10 and two == one
    rows, rows_of_two = (MetricsRecord(step_of(recipe).metrics).read() for recipe in recipes)
    assert [row["rs/reward_best"] for row in rows] == [row["rs/reward_best"] for row in rows_of_two]


def run_out_of_memory(inputs: StepInputs) -> None:
    """In the last process alone."""

    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore words.")

    if distributed.index() == 1:
        Updater._row = no_room  # type: ignore[method-assign,assignment]
    ppo.run(CONFIG, inputs)


def test_memory_that_runs_out_in_one_of_several_processes_is_reported_with_a_fix(inputs: StepInputs) -> None:
    message = (
        r"process 1 of 2:(?s:.*)DeviceMemoryError: ppo: one of 2 devices has too little memory for a row of 96 tokens"
    )
    with pytest.raises(AssertionError, match=rf"{message} \(CUDA out of .* 2 GiB\.\)\..*ppo\.tokens_per_microbatch=48"):
        run_several(2, run_out_of_memory, named(inputs, "no-room"))


def test_weights_cut_over_the_processes_are_refused_and_adapters_are_not(
    inputs: StepInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "are_sharded", lambda: True)
    check_settings(inputs)
    with pytest.raises(ConfigError, match=r"tuning\.method: full, .*configs/accelerate/ddp\.yaml"):
        ppo.run(CONFIG, replace(inputs, tuning=FULL))
