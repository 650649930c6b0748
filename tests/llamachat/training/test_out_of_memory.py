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

import sft
from llamachat.config.sections import Tuning
from llamachat.errors import ConfigError, DeviceMemoryError
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.record import MetricsRecord
from llamachat.training import out_of_memory
from llamachat.training.master_weights import adamw, check_optimizer
from llamachat.training.out_of_memory import MicrobatchTooLargeError, halving, in_room
from sft.config import Config
from sft.tuning import AnswerTrainer
from tests.sft.tiny_sft import inputs_of, toy_dialogs, write_base
from tests.tiny_llama import LORA

FULL = Tuning()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece)


# --- the logic


def test_the_error_of_a_micro_batch_keeps_none_of_its_tensors_alive():
    alive: list[Any] = []

    def forward() -> None:
        activations = torch.zeros(8)
        alive.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has ...")

    with pytest.raises(MicrobatchTooLargeError, match=r"^CUDA out of memory\. Tried to allocate 2 GiB\.$") as told:
        in_room(forward)
    assert told.value.__context__ is None
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
    with pytest.raises(DeviceMemoryError, match=r"sft: .* one dialog at a time \(full\).* sft\.gradient_checkpointing"):
        halving(16, train=train, halve=lambda _: None, step="sft", section="sft", unit="dialog")


# --- in the stage


def tokens_of(batch: dict[str, Tensor]) -> int:
    return batch["input_ids"].numel()


def make_small(monkeypatch: pytest.MonkeyPatch, *, tokens: int, from_step: int, done: int = 0) -> list[int]:
    """From optimizer step `from_step` on, more than `tokens` in a micro-batch are too many; the sizes that were.

    `done` micro-batches of a step are let through, so that it has added up a part of its gradients.
    """
    refused: list[int] = []
    passed: Counter[tuple[int, int]] = Counter()
    loss = AnswerTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        place = (id(self), self.state.global_step)
        passed[place] += 1
        if tokens_of(inputs) > tokens and place[1] >= from_step and passed[place] > done:
            refused.append(tokens_of(inputs))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "compute_loss", compute_loss)
    return refused


def losses(step: Path) -> list[tuple[float, float]]:
    rows = MetricsRecord(StepFolder(step).metrics).read()
    return [(row["step"], row["sft/loss"]) for row in rows if "sft/loss" in row]


LAYOUTS: dict[str, tuple[dict[str, Any], int, str]] = {
    # settings, tokens that fit, what is told: rows of up to 96 tokens, and dialogs of up to 64 after padding
    "packed": ({"packing": True, "row_tokens": 96}, 64, "sft.row_tokens"),
    "padded": ({"packing": False, "rows_per_microbatch": 4}, 128, "sft.rows_per_microbatch 4"),
}


@pytest.mark.parametrize(
    ("tuning", "layout", "from_step", "done"),
    [(FULL, "packed", 0, 0), (FULL, "packed", 3, 1), (FULL, "padded", 3, 1), (LORA, "padded", 3, 0)],
    ids=["full, first step", "full, within a step", "full, padded, within a step", "lora"],
)
def test_a_micro_batch_that_does_not_fit_is_halved_and_the_result_is_the_same(
    tuning: Tuning, layout: str, from_step: int, done: int, base: Path, tmp_path: Path, caplog: Any, monkeypatch: Any
):
    settings, fits, told = LAYOUTS[layout]
    config = Config(epochs=2, examples_per_step=8, learning_rate=1e-3, sample_prompts=0, **settings)
    results: list[dict[str, Tensor]] = []
    steps = []
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
        inputs = inputs_of(tmp_path / name, base, toy_dialogs(26), tuning=tuning)
        refused: list[int] = []
        if name == "small":
            refused = make_small(monkeypatch, tokens=fits, from_step=from_step, done=done)
        with caplog.at_level(logging.WARNING):
            artifact = sft.run(config, inputs)
        (file,) = artifact.path.glob("*model.safetensors")
        results.append(load_file(file))
        steps.append(losses(inputs.folder.path))
    assert refused
    warnings = [record.getMessage() for record in caplog.records if "memory is too small" in record.getMessage()]
    assert len(warnings) == len(refused), "each halving is told once"
    assert told in warnings[0]
    large, small = steps
    assert [step for step, _ in small] == [step for step, _ in large] == list(range(1, len(large) + 1))
    assert [loss for _, loss in small] == pytest.approx([loss for _, loss in large], abs=1e-5)
    for key, weight in results[0].items():
        torch.testing.assert_close(results[1][key], weight, atol=2e-6, rtol=0)


@pytest.mark.parametrize("packing", [True, False])
def test_a_dialog_that_does_not_fit_alone_is_told_with_the_ways_out(
    packing: bool, base: Path, tmp_path: Path, monkeypatch: Any
):
    make_small(monkeypatch, tokens=8, from_step=1)
    config = Config(epochs=2, examples_per_step=8, sample_prompts=0, packing=packing)
    inputs = inputs_of(tmp_path, base, toy_dialogs(26), tuning=LORA)
    with pytest.raises(DeviceMemoryError, match=r"sft: .* one dialog at a time .* tuning\.method to qlora"):
        sft.run(config, inputs)
    folder = inputs.folder
    assert not folder.artifact.exists()
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000001"], "what is done is kept"


def test_memory_that_runs_out_elsewhere_is_told_and_not_halved(base: Path, tmp_path: Path, monkeypatch: Any):
    def step(self: Any, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("llamachat.training.master_weights.MasterWeightOptimizer.step", step)
    with pytest.raises(DeviceMemoryError, match=r"where no smaller micro-batch helps .* in the optimizer"):
        sft.run(Config(epochs=1, examples_per_step=8), inputs_of(tmp_path, base, toy_dialogs(20), tuning=LORA))


# --- optimizers that need less


def _moments(state: dict[str, Any]) -> dict[str, Tensor]:
    return state["inner"][0]["state"][0]["__bnb_optimizer_quant_state__"]


def test_8_bit_optimizers_are_refused_without_a_gpu_before_anything_is_loaded(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        inputs = inputs_of(tmp_path, tmp_path / "absent", toy_dialogs(4))
        with pytest.raises(ConfigError, match=rf"sft\.optimizer: '{name}', but there is no GPU here"):
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
