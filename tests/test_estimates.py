"""The planner's arithmetic against real models on the meta device, which hold shapes and no numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llamachat.batching import plan_steps
from llamachat.config.sections import Tuning
from llamachat.models.estimates import CPU_FLOPS, Shape, read_shape
from llamachat.models.loading import SEVEN_PROJECTIONS
from sft.config import Config
from sft.estimate import Workload, estimate
from tests.tiny_llama import base_section

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 420),
    "tied, one key-value head": Shape(96, 200, 3, 6, 1, 500, is_tied=True),
    "Llama-2 7B": Shape(4096, 11008, 32, 32, 32, 32000),
    "Llama-2 70B": Shape(8192, 28672, 80, 64, 8, 32000),
    "TinyLlama 1.1B": Shape(2048, 5632, 22, 32, 4, 32000),
}
TINY = SHAPES["tiny"]


def config_of(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.is_tied,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_real_model(name: str):
    shape = SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(shape))
    assert shape.weights == sum(p.numel() for p in model.parameters())
    assert shape.layer_weights == sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("name", ["tiny", "tied, one key-value head", "TinyLlama 1.1B"])
def test_adapter_weights_are_those_of_peft(name: str):
    shape = SHAPES[name]
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config_of(shape))
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules=list(SEVEN_PROJECTIONS)))
    assert shape.adapter_weights(8) == sum(p.numel() for p in adapted.parameters() if p.requires_grad)


def test_a_shape_is_read_from_a_model_folder(tmp_path: Path):
    assert read_shape(tmp_path) is None
    config_of(TINY).save_pretrained(tmp_path)
    assert read_shape(tmp_path) == TINY
    values = json.loads((tmp_path / "config.json").read_text())
    del values["num_key_value_heads"]  # older configs have none: as many as heads
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_key_value_heads": None}))
    assert read_shape(tmp_path) == Shape(64, 128, 2, 4, 4, 420)


def workload(tuning: Tuning, *, dtype: str = "bfloat16", dialogs: int | None = 100) -> Workload:
    return Workload(TINY, base_section("anywhere", dtype=dtype), tuning, dialogs)


def test_memory_of_full_tuning_by_hand():
    # Embeddings and head 53,760; two blocks of 12,288 (attention), 24,576 (SwiGLU) and 128 (norms); the last norm 64.
    weights = TINY.weights
    assert weights == 53_760 + 2 * (12_288 + 24_576 + 128) + 64
    bf16 = estimate(Config(), workload(Tuning())).memory
    assert bf16["base weights"] == bf16["gradients"] == 2 * weights
    assert bf16["optimizer (fp32 masters and two moments)"] == 12 * weights
    fp32 = estimate(Config(), workload(Tuning(), dtype="float32")).memory
    assert fp32["optimizer (fp32 masters and two moments)"] == 8 * weights  # the parameters are their own masters


def test_memory_of_lora_counts_the_adapter_alone_as_trained():
    memory = estimate(Config(), workload(Tuning(method="lora", rank=4))).memory
    adapter = TINY.adapter_weights(4)
    assert memory["base weights"] == 2 * TINY.weights
    assert memory["trained weights"] == memory["gradients"] == 2 * adapter
    assert memory["optimizer (fp32 masters and two moments)"] == 12 * adapter


def test_recomputing_activations_and_packing_need_less():
    def activations(**changes: Any) -> int:
        return estimate(Config(**changes), workload(Tuning())).memory["activations"]

    assert activations(gradient_checkpointing=True) < activations()
    assert activations(packing=False, rows_per_microbatch=8) == 8 * activations()


@pytest.mark.parametrize(("dialogs", "epochs", "per_step"), [(100, 2.0, 8), (30, 0.1, 3), (7, 1.5, 4), (3, 0.01, 16)])
def test_optimizer_steps_are_those_of_the_training(dialogs: int, epochs: float, per_step: int):
    config = Config(epochs=epochs, examples_per_step=per_step)
    planned = plan_steps(
        [5] * dialogs, examples_per_step=per_step, epochs=epochs, seed=0, capacity=32, packing=True
    ).num_steps
    assert estimate(config, workload(Tuning(), dialogs=dialogs)).optimizer_steps == planned


def test_seconds_are_six_operations_a_weight_and_token():
    found = estimate(Config(epochs=2.0), workload(Tuning(), dialogs=100))
    assert found.seconds == pytest.approx(6 * TINY.weights * 100 * 2 * 200 / CPU_FLOPS)


def test_uncounted_dialogs_have_memory_and_no_time():
    found = estimate(Config(), workload(Tuning(), dialogs=None))
    assert found.memory and found.optimizer_steps is None and found.seconds == 0
