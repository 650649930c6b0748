"""The steps of a recipe on the device: their figures are those of a CPU, and they stop, resume and shrink as there."""

import os
from pathlib import Path
from typing import Any

import pytest

from tests.cuda_standin.device import Device
from tests.cuda_standin.process import on_standin


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    (folder / "tokenizer.model").write_bytes(tiny_sentencepiece)
    return folder


def _run_on(place: str) -> None:
    """Steps of this process run there, and draw no curves, which takes longer than their training."""
    import torch

    import llamachat.tracking.curves

    if place == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.cuda.is_available = lambda: False
    llamachat.tracking.curves.panels_of = lambda _: {}


def _base(folder: Path) -> Path:
    """A random base whose answers end."""
    from tests.ppo.tiny_ppo import write_stopping_base

    if not (folder / "base").exists():
        write_stopping_base(folder / "base", (folder / "tokenizer.model").read_bytes())
    return folder / "base"


def _losses(metrics: Path, name: str) -> list[float]:
    from llamachat.runs.record import MetricsRecord

    return [row[name] for row in MetricsRecord(metrics).read() if name in row]


# --- supervised fine-tuning


def test_sft_with_the_loss_of_a_gpu_goes_as_on_a_cpu_and_resumes(folder: Path) -> None:
    cpu, whole, stopped, resumed = (
        on_standin(_tuned, folder, *arguments)
        for arguments in (("cpu", "cpu"), ("whole", "cuda"), ("stopped", "cuda", 3), ("stopped", "cuda"))
    )
    assert len(cpu["losses"]) > 4 and stopped["losses"] == whole["losses"][:3]
    assert whole["losses"] == pytest.approx(cpu["losses"], rel=1e-4)
    assert whole["held_out"] == pytest.approx(cpu["held_out"], rel=1e-4)
    assert whole["kernels"] > 1000 > cpu["kernels"]
    assert resumed["losses"] == whole["losses"]
    assert resumed["weights"] == whole["weights"] is not None


def _tuned(device: Device, folder: str, name: str, place: str, stop_at: int | None = None) -> dict[str, Any]:
    _run_on(place)
    import hashlib

    import sft
    from sft.tuning import AnswerTrainer
    from tests.sft.tiny_sft import inputs_of, toy_dialogs

    home = Path(folder) / name
    home.mkdir(exist_ok=True)
    config = sft.Config(epochs=2, examples_per_step=8, learning_rate=1e-3, sample_prompts=2)
    inputs = inputs_of(home, _base(Path(folder)), toy_dialogs(32), tracking={"save_every": 2})
    plain = AnswerTrainer.compute_loss

    class StopError(Exception): ...

    def compute_loss(self: AnswerTrainer, *arguments: Any, **named: Any) -> Any:
        if self.state.global_step == stop_at:
            raise StopError
        return plain(self, *arguments, **named)

    AnswerTrainer.compute_loss = compute_loss
    weights = None
    try:
        artifact = sft.run(config, inputs)
        weights = hashlib.sha256((artifact.path / "model.safetensors").read_bytes()).hexdigest()
    except StopError:
        pass
    metrics = inputs.folder.metrics
    return {
        "losses": _losses(metrics, "sft/loss"),
        "held_out": _losses(metrics, "sft/eval_loss"),
        "weights": weights,
        "kernels": device.kernels,
    }


def test_a_card_that_is_too_small_is_trained_on_with_smaller_micro_batches(folder: Path) -> None:
    result = on_standin(_halved, folder)
    assert result["peak"] > result["limit"], "otherwise nothing is too small"
    assert any("sft.rows_per_microbatch" in line for line in result["log"])
    assert result["small"] == pytest.approx(result["large"], rel=1e-4)


def _halved(device: Device, folder: str) -> dict[str, Any]:
    _run_on("cuda")
    import logging

    import sft
    from tests.sft.tiny_sft import inputs_of, toy_dialogs

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("llamachat.training.out_of_memory").addHandler(handler)
    config = sft.Config(
        epochs=1, examples_per_step=16, learning_rate=1e-3, sample_prompts=0, packing=False, rows_per_microbatch=16
    )
    losses = {}
    limit, peak = device.total, 0
    for name in ("large", "small"):
        home = Path(folder) / name
        home.mkdir()
        device.limit(limit)
        device.empty_cache()
        device.reset_peaks()
        reserved_before = device.peak_reserved
        inputs = inputs_of(home, _base(Path(folder)), toy_dialogs(40))
        sft.run(config, inputs)
        losses[name] = _losses(inputs.folder.metrics, "sft/loss")
        if name == "large":
            peak = device.peak_reserved
            limit = reserved_before + (peak - reserved_before) * 2 // 3
    return losses | {"peak": peak, "limit": limit, "log": lines}


# --- reward models


def test_a_reward_model_learns_on_a_gpu_what_it_learns_on_a_cpu(folder: Path) -> None:
    cpu, cuda = (on_standin(_ranked, folder, place) for place in ("cpu", "cuda"))
    assert len(cpu["losses"]) >= 3
    assert cuda["losses"] == pytest.approx(cpu["losses"], rel=1e-4)
    assert cuda["accuracy"] == cpu["accuracy"]
    assert cuda["kernels"] > 1000 > cpu["kernels"]


def _ranked(device: Device, folder: str, place: str) -> dict[str, Any]:
    _run_on(place)
    import reward
    from tests.reward.tiny_reward import data_of, reward_inputs, toy_pairs

    home = Path(folder) / f"reward-{place}"
    home.mkdir()
    data = data_of(home, helpfulness=toy_pairs(40))
    inputs = reward_inputs(home, _base(Path(folder)), data=data)
    reward.run(reward.Config(pairs_per_step=8, learning_rate=1e-3), inputs)
    return {
        "losses": _losses(inputs.folder.metrics, "rm/helpfulness/loss"),
        "accuracy": _losses(inputs.folder.metrics, "rm/helpfulness/eval_accuracy"),
        "kernels": device.kernels,
    }


# --- sampling and reinforcement


def test_a_round_of_rejection_sampling_draws_on_a_gpu_what_it_draws_on_a_cpu(folder: Path) -> None:
    cpu, cuda = (on_standin(_sampled, folder, place) for place in ("cpu", "cuda"))
    assert len(cpu["groups"]) > 10
    assert cuda["groups"] == cpu["groups"]
    assert cuda["losses"] == pytest.approx(cpu["losses"], rel=1e-4)
    assert cuda["kernels"] > 1000 > cpu["kernels"]


def _sampled(device: Device, folder: str, place: str) -> dict[str, Any]:
    _run_on(place)
    from pipelines.recipe.recipe import load
    from tests.recipes import run_command
    from tests.rejection_sampling.tiny_rounds import write_recipe
    from tests.tiny_steps import sampled_in, step_of

    home = Path(folder) / f"rounds-{place}"
    home.mkdir()
    small = {"samples_per_prompt": 3, "sweep_temperatures": [0.8, 1.2], "sweep_prompts": 3, "sweep_samples": 2}
    small |= {"validation_prompts": 4, "test_prompts": 4}
    recipe = write_recipe(home / "one.yaml", _base(Path(folder)), prompts=30, rejection_sampling=small)
    run_command(load(recipe), "rs")
    groups = [[group["texts"], group["finished"]] for group in sampled_in(step_of(recipe))]
    losses = _losses(step_of(recipe).metrics, "rs/loss")
    return {"groups": groups, "losses": losses, "kernels": device.kernels}


def test_ppo_trains_adapters_on_one_4_bit_base_and_an_update_waits_few_times(folder: Path) -> None:
    result = on_standin(_reinforced, folder)
    assert len(result["rows"]) == 1 and result["method"] == "qlora"
    (row,) = result["rows"]
    assert row["ppo/kl_to_reference"] == pytest.approx(0.0, abs=1e-3), "the policy starts as the reference"
    assert 0.0 <= row["ppo/reward/gate_fraction"] <= 1.0
    assert row["ppo/reward/helpfulness"] != row["ppo/reward/safety"]
    assert row["optim/grad_norm"] > 0 and row["optim/critic_grad_norm"] > 0
    assert result["waits"] and max(sum(waits.values()) for waits in result["waits"]) <= 6, result["waits"]


def _reinforced(device: Device, folder: str) -> dict[str, Any]:
    _run_on("cuda")

    import ppo
    from llamachat.chat_format import load_chat_format
    from llamachat.chat_format.tokenizer import SentencePieceBackend, Tokenizer
    from llamachat.runs.record import MetricsRecord
    from ppo.update import Updater
    from tests.llamachat.models.tiny_roles import QLORA, World, labelled
    from tests.ppo.tiny_ppo import config_of, inputs_of, write_stopping_base

    model = (Path(folder) / "tokenizer.model").read_bytes()
    home = Path(folder) / "ppo"
    home.mkdir()
    world = World(home, load_chat_format("llama2", Tokenizer(SentencePieceBackend(model))), model, write_stopping_base)
    models = {role: world.reward_model(role, QLORA, QLORA) for role in ("helpfulness", "safety", "judge")}
    waits: list[dict[str, int]] = []
    plain = Updater._row

    def row(self: Updater, *arguments: Any, **named: Any) -> Any:
        before = device.statistics()["waits"]
        figures = plain(self, *arguments, **named)
        after = device.statistics()["waits"]
        grown = {name: count - before.get(name, 0) for name, count in after.items()}
        waits.append({name: count for name, count in grown.items() if count})
        return figures

    Updater._row = row
    config = config_of(
        iterations=1,
        responses_per_iteration=8,
        responses_per_minibatch=4,
        validation_prompts=4,
        test_prompts=4,
        gradient_checkpointing=True,
    )
    inputs = inputs_of(
        home,
        Path(world.base16.model),
        reward_models=models | {"safety": labelled(models["safety"])},
        scoring={"combine": "llama2_gate"},
        policy=world.policy(QLORA),
        tuning=QLORA,
        dtype="bfloat16",
    )
    artifact = ppo.run(config, inputs)
    rows = MetricsRecord(inputs.folder.metrics).read()
    return {
        "method": artifact.manifest.details["method"],
        "rows": [row for row in rows if "ppo/policy_loss" in row],
        "waits": waits,
    }
