"""What the planner says of a reward model, against a real model on the meta device and numbers worked by hand."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Tuning
from llamachat.memory.estimates import CPU_FLOPS, Shape
from reward import estimate
from reward.batches import plan_batches
from reward.config import Config
from reward.estimate import Workload
from tests.reward.test_pairs import example
from tests.tiny_llama import base_section

TINY = Shape(64, 128, 2, 4, 2, 420)
CARD = Gpu("card", 24.0, 100.0)


def workload(pairs: int | None = 50, **tuning: Any) -> Workload:
    return Workload(
        TINY, base_section("x", dtype="bfloat16", max_tokens=96), Tuning(**tuning), pairs, tokens_per_pair=300.0
    )


def test_weights_are_those_of_a_classification_model_less_its_one_row_of_a_head():
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=420,
    )
    config.num_labels = 1
    with torch.device("meta"):
        weights = sum(p.numel() for p in LlamaForSequenceClassification(config).parameters()) - 64
    memory = estimate(Config(), workload()).memory
    assert memory["base weights"] == memory["gradients"] == 2 * weights
    assert memory["optimizer (fp32 masters and two moments)"] == 12 * weights
    assert memory["logits of a chunk"] == 0


def test_the_longest_pass_is_a_pair_of_two_whole_answers():
    short, long = (
        estimate(Config(), Workload(TINY, base_section("x", max_tokens=size), Tuning(), 1, gpu=CARD)).memory[
            "activations"
        ]
        for size in (96, 192)
    )
    assert long == 2 * short
    assert estimate(Config(gradient_checkpointing=True), workload()).memory["activations"] < short


@pytest.mark.parametrize(("pairs", "epochs", "per_step"), [(100, 1.0, 8), (30, 0.1, 3), (7, 1.5, 4), (3, 0.01, 16)])
def test_optimizer_steps_are_those_of_the_training(pairs: int, epochs: float, per_step: int):
    planned = plan_batches(
        [example(2, 3)] * pairs,
        [],
        pairs_per_step=per_step,
        epochs=epochs,
        seed=0,
        row_tokens=64,
        has_pair_labels=False,
    ).plan.num_steps
    config = Config(epochs=epochs, pairs_per_step=per_step)
    assert estimate(config, workload(pairs)).optimizer_steps == planned


def test_seconds_are_six_operations_a_weight_of_the_blocks_and_token():
    # A token of a reward model meets the blocks and the last norm: 2 x 36,992 + 64 weights.
    found = estimate(Config(epochs=2.0), workload(50))
    assert found.seconds == pytest.approx(6 * (2 * 36_992 + 64) * 50 * 2 * 300 / CPU_FLOPS)
    assert estimate(Config(), workload(None)).optimizer_steps is None


def test_lora_trains_the_adapter_alone():
    memory = estimate(Config(), workload(method="lora", rank=4)).memory
    assert memory["trained weights"] == 2 * TINY.adapter_weights(4)
