"""A device that is too small, played by a micro-batch that raises: the training ends as on one that is large enough."""

import logging
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import reward
import sft
from llamachat.config.sections import Tuning
from llamachat.errors import ConfigError, DeviceMemoryError
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.record import MetricsRecord
from llamachat.training import out_of_memory
from llamachat.training.master_weights import adamw, check_optimizer
from llamachat.training.out_of_memory import MicrobatchTooLargeError, halving, in_room
from reward.ranking import PackedRewardTrainer
from sft.config import Config
from sft.tuning import AnswerTrainer
from tests.reward.tiny_reward import reward_inputs
from tests.sft.tiny_sft import FULL, inputs_of, toy_dialogs
from tests.tiny_llama import LORA

# --- the logic


def test_the_error_of_a_micro_batch_keeps_none_of_its_tensors_alive():
    alive: list[Any] = []

    def forward() -> None:
        activations = torch.zeros(8)
        alive.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    with pytest.raises(MicrobatchTooLargeError, match=r"^CUDA out of memory\. Tried to allocate 2 GiB\.$") as caught:
        in_room(forward)
    assert caught.value.__context__ is None
    assert alive[0]() is None
    assert in_room(lambda: 3) == 3


def test_several_processes_are_not_taken_apart(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(out_of_memory.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(out_of_memory.torch.distributed, "get_world_size", lambda: 2)

    def forward() -> None:
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        in_room(forward)


def test_parts_are_halved_until_they_fit():
    tried: list[int] = []

    def half(size: int) -> int | None:
        return size // 2

    def train(size: int) -> None:
        tried.append(size)
        if size > 2:
            raise MicrobatchTooLargeError("full")

    assert halving(16, train=train, halve=half, step="sft", section="sft", unit="dialog") == 2
    assert tried == [16, 8, 4, 2]
    with pytest.raises(DeviceMemoryError, match=r"sft: .* a single dialog \(full\).* sft\.gradient_checkpointing"):
        halving(16, train=train, halve=lambda _: None, step="sft", section="sft", unit="dialog")


# --- in the stage


def make_small(
    monkeypatch: pytest.MonkeyPatch, trainer: Any = AnswerTrainer, *, tokens: int, from_step: int, done: int = 0
) -> list[int]:
    """From optimizer step `from_step` on, more than `tokens` in a micro-batch are too many; the sizes that were.

    `done` micro-batches of a step are let through, so that it has added up a part of its gradients.
    """
    refused: list[int] = []
    passed: Counter[tuple[int, int]] = Counter()
    loss = trainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        place, size = (id(self), self.state.global_step), inputs["input_ids"].numel()
        passed[place] += 1
        if size > tokens and place[1] >= from_step and passed[place] > done:
            refused.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    return refused


def losses(step: StepFolder) -> list[tuple[float, float]]:
    rows = MetricsRecord(step.metrics).read()
    return [(row["step"], row[name]) for row in rows for name in row if name in ("sft/loss", "rm/helpfulness/loss")]


def tune(folder: Path, base: Path, tuning: Tuning, **layout: Any) -> StepFolder:
    config = Config(epochs=2, examples_per_step=8, learning_rate=1e-3, sample_prompts=0, **layout)
    inputs = inputs_of(folder, base, toy_dialogs(26), tuning=tuning)
    sft.run(config, inputs)
    return inputs.folder


def rank(folder: Path, base: Path, tuning: Tuning, **layout: Any) -> StepFolder:
    inputs = reward_inputs(folder, base, tuning=tuning)
    reward.run(reward.Config(pairs_per_step=8, learning_rate=1e-3, **layout), inputs)
    return inputs.folder


# Rows of up to 96 tokens, and dialogs of up to 64 after padding; rows of pairs.
PACKED: dict[str, Any] = {"packing": True, "row_tokens": 96}
PADDED: dict[str, Any] = {"packing": False, "rows_per_microbatch": 4}


@pytest.mark.parametrize(
    ("train", "tuning", "layout", "fits", "from_step", "done", "named"),
    [
        pytest.param(tune, FULL, PACKED, 64, 0, 0, "sft.row_tokens", id="full, first step"),
        pytest.param(tune, FULL, PACKED, 64, 3, 1, "sft.row_tokens", id="full, within a step"),
        pytest.param(tune, FULL, PADDED, 128, 3, 1, "sft.rows_per_microbatch 4", id="full, padded, within a step"),
        pytest.param(tune, LORA, PADDED, 128, 3, 0, "sft.rows_per_microbatch 4", id="lora"),
        pytest.param(rank, FULL, {"row_tokens": 512}, 256, 2, 0, "reward.row_tokens", id="reward"),
    ],
)
def test_a_micro_batch_that_does_not_fit_is_halved_and_the_result_is_the_same(
    train: Any,
    tuning: Tuning,
    layout: dict[str, Any],
    fits: int,
    from_step: int,
    done: int,
    named: str,
    base: Path,
    tmp_path: Path,
    caplog: Any,
    monkeypatch: Any,
):
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    caplog.set_level(logging.WARNING)
    large = train(tmp_path / "large", base, tuning, **layout)
    trainer = AnswerTrainer if train is tune else PackedRewardTrainer
    refused = make_small(monkeypatch, trainer, tokens=fits, from_step=from_step, done=done)
    small = train(tmp_path / "small", base, tuning, **layout)
    warnings = [record.getMessage() for record in caplog.records if "too little memory" in record.getMessage()]
    assert len(warnings) == len(refused) >= 1, "each halving is logged once"
    assert named in warnings[0]
    assert [step for step, _ in losses(small)] == list(range(1, len(losses(large)) + 1))
    assert [loss for _, loss in losses(small)] == pytest.approx([loss for _, loss in losses(large)], abs=1e-5)
    weights, expected = (load_file(next(step.artifact.glob("*model.safetensors"))) for step in (small, large))
    for key, weight in expected.items():
        torch.testing.assert_close(weights[key], weight, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("train", "layout", "named"),
    [
        (tune, PACKED, r"sft: .* a single dialog .* tuning\.method to qlora"),
        (tune, PADDED, r"sft: .* a single dialog .* tuning\.method to qlora"),
        (rank, {}, r"rm/helpfulness: .* a single pair .*reward\.gradient_checkpointing"),
    ],
)
def test_what_does_not_fit_alone_is_refused_with_what_would_help(
    train: Any, layout: dict[str, Any], named: str, base: Path, tmp_path: Path, monkeypatch: Any
):
    make_small(monkeypatch, AnswerTrainer if train is tune else PackedRewardTrainer, tokens=8, from_step=1)
    with pytest.raises(DeviceMemoryError, match=named):
        train(tmp_path, base, LORA, **layout)
    assert not list(tmp_path.rglob("artifact"))
    assert [path.name for path in tmp_path.rglob("checkpoints/*")] == ["step-00000001"], "what is done is kept"


def test_memory_that_runs_out_elsewhere_is_an_error_and_halves_nothing(base: Path, tmp_path: Path, monkeypatch: Any):
    def step(self: Any, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("llamachat.training.master_weights.MasterWeightOptimizer.step", step)
    with pytest.raises(DeviceMemoryError, match=r"where a smaller micro-batch does not help .* in the optimizer"):
        tune(tmp_path, base, LORA)


# --- optimizers that need less


def _moments(state: dict[str, Any]) -> dict[str, Tensor]:
    return state["inner"][0]["state"][0]["__bnb_optimizer_quant_state__"]


def test_8_bit_optimizers_are_refused_without_a_gpu_before_anything_is_loaded(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        inputs = inputs_of(tmp_path, tmp_path / "absent", toy_dialogs(4))
        with pytest.raises(ConfigError, match=rf"sft\.optimizer: '{name}', but this machine has no GPU"):
            sft.run(Config(optimizer=name), inputs)
    check_optimizer("adamw", where="sft.optimizer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_optimizer("adamw_8bit", where="sft.optimizer")


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bit_moments_step_fp32_masters_close_to_adamw_and_go_on_after_a_save(name: Any):
    settings: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-5}

    def make(kind: Any) -> tuple[torch.nn.Linear, Any]:
        torch.manual_seed(0)
        model = torch.nn.Linear(128, 64, dtype=torch.bfloat16)
        return model, adamw(model.parameters(), name=kind, **settings)

    def run(model: torch.nn.Linear, optimizer: Any, steps: range) -> None:
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for weight in model.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator).to(torch.bfloat16)
            optimizer.step()

    (exact, exact_optimizer), (model, optimizer) = make("adamw"), make(name)
    run(exact, exact_optimizer, range(6))
    run(model, optimizer, range(6))
    state = optimizer.state_dict()
    assert _moments(state)["state1"].dtype == torch.uint8
    assert all(master.dtype == torch.float32 for master in state["masters"])
    moved = exact_optimizer.state_dict()["masters"][0] - make("adamw")[1].state_dict()["masters"][0]
    apart = state["masters"][0] - exact_optimizer.state_dict()["masters"][0]
    assert apart.norm() < 0.05 * moved.norm()
    again, resumed = make(name)
    run(again, resumed, range(3))
    later, loaded = make(name)
    later.load_state_dict(again.state_dict())
    loaded.load_state_dict(resumed.state_dict())
    run(later, loaded, range(3, 6))
    assert torch.equal(later.weight, model.weight)
