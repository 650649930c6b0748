"""A device that is too small for a row of pairs: the training ends as on one that is large enough, or says why not."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import reward
from llamachat.errors import DeviceMemoryError
from reward.config import Config
from reward.ranking import PackedRewardTrainer
from tests.reward.tiny_reward import reward_inputs
from tests.sft.tiny_sft import write_base
from tests.tiny_llama import LORA


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece)


def make_small(monkeypatch: pytest.MonkeyPatch, *, tokens: int, from_step: int) -> list[int]:
    """From optimizer step `from_step` on, more than `tokens` in a row are too many; the sizes that were."""
    refused: list[int] = []
    loss = PackedRewardTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        size = inputs["input_ids"].numel()
        if size > tokens and self.state.global_step >= from_step:
            refused.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PackedRewardTrainer, "compute_loss", compute_loss)
    return refused


def test_rows_that_do_not_fit_are_halved_and_the_result_is_the_same(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level(logging.WARNING)
    config = Config(pairs_per_step=8, learning_rate=1e-3, row_tokens=512)
    weights = []
    refused: list[int] = []
    for name in ("large", "small"):
        (tmp_path / name).mkdir()
        if name == "small":
            refused = make_small(monkeypatch, tokens=256, from_step=2)
        artifact = reward.run(config, reward_inputs(tmp_path / name, base))
        weights.append(load_file(artifact.path / "model.safetensors"))
    warnings = [record.getMessage() for record in caplog.records if "memory is too small" in record.getMessage()]
    assert len(warnings) == len(refused) >= 1 and "reward.row_tokens" in warnings[0]
    for key, weight in weights[0].items():
        torch.testing.assert_close(weights[1][key], weight, atol=2e-6, rtol=0)


def test_a_pair_that_does_not_fit_alone_is_told_with_the_ways_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make_small(monkeypatch, tokens=8, from_step=1)
    inputs = reward_inputs(tmp_path, base, tuning=LORA)
    told = r"rm/helpfulness: .* one pair at a time .*reward\.gradient_checkpointing"
    with pytest.raises(DeviceMemoryError, match=told):
        reward.run(Config(pairs_per_step=8), inputs)
    assert not inputs.folder.artifact.exists()
