"""What each stage costs: by hand, in order and proportion, and against real models on the meta device or in a role bank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from evaluation.report import Config as ReportConfig
from llamachat.config.gpus import Gpu, parse_gpu
from llamachat.config.sections import Rollout, Tuning
from llamachat.data.packing import plan_steps
from llamachat.memory.estimates import (
    ALLOCATOR,
    CPU_FLOPS,
    KNOWN_BASES,
    OPTIMIZER,
    SERVER,
    SLEEPING_SERVER,
    Estimate,
    Setup,
    Shape,
    assumed_speed,
    read_shape,
)
from llamachat.memory.role_bytes import CACHE, DECODER, Beside, Lengths, Seating
from pipelines.planning.stage_costs import (
    ppo_cost,
    ppo_memory,
    ppo_updating_bytes,
    report_cost,
    reward_cost,
    sampling_cost,
    sft_cost,
)
from ppo.config import Config as PpoConfig
from reward.batches import plan_batches
from reward.config import Config as RewardConfig
from sft.config import Config as SftConfig
from tests.llamachat.models.tiny_roles import FULL, QLORA, World, weight_bytes
from tests.reward.test_pairs import example
from tests.tiny_llama import LORA, base_section

TINY = Shape(64, 128, 2, 4, 2, 420)
CARD = Gpu("card", 24.0, 100.0)
ADAPTER = Tuning(method="lora", rank=4)
SEVEN, SEVENTY = (KNOWN_BASES[f"meta-llama/Llama-2-{size}-hf"].shape for size in ("7b", "70b"))
HEAD = 65  # weights of a value head, with its bias


def setup(tuning: Tuning = FULL, *, shape: Shape = TINY, gpu: Gpu | None = None, **base: Any) -> Setup:
    return Setup(shape, base_section("anywhere", **({"dtype": "bfloat16"} | base)), tuning, gpu)


def sft(tuning: Tuning = FULL, *, gpu: Gpu | None = None, dialogs: int | None = 100, **config: Any) -> Estimate:
    return sft_cost(SftConfig(**config), setup(tuning, gpu=gpu), dialogs=dialogs)


# -- supervised tuning and reward models


def test_memory_by_hand() -> None:
    # Embeddings and head 53,760; two blocks of 12,288 (attention), 24,576 (SwiGLU) and 128 (norms); the last norm 64.
    weights = TINY.weights
    assert weights == 53_760 + 2 * (12_288 + 24_576 + 128) + 64
    memory = sft().memory
    assert memory["base weights"] == memory["gradients"] == 2 * weights
    assert memory[OPTIMIZER] == 12 * weights
    fp32 = sft_cost(SftConfig(), setup(dtype="float32"), dialogs=1).memory
    assert fp32[OPTIMIZER] == 8 * weights, "the parameters are their own masters"
    memory, adapter = sft(ADAPTER).memory, TINY.adapter_weights(4)
    assert memory["base weights"] == 2 * weights
    assert memory["trained weights"] == memory["gradients"] == 2 * adapter
    assert memory[OPTIMIZER] == 12 * adapter


def test_what_saves_memory_needs_less() -> None:
    def peak(config: Any = None, base: Any = None, **tuning: Any) -> int:
        where = setup(Tuning(**tuning), shape=SEVEN, gpu=CARD, **({"max_tokens": 2048} | (base or {})))
        return sft_cost(SftConfig(**(config or {})), where, dialogs=None).peak_bytes

    assert peak(method="qlora") < peak(method="lora") < peak(method="full")
    assert peak(method="lora", rank=8) < peak(method="lora", rank=64)
    assert peak({"gradient_checkpointing": True}, method="lora") < peak(method="lora")
    assert peak(base={"max_tokens": 1024}, method="lora") < peak(method="lora")
    one, eight = (sft(packing=False, rows_per_microbatch=rows).memory for rows in (1, 8))
    assert eight["activations"] == 8 * one["activations"]


def test_weights_of_a_reward_model_are_those_of_a_classification_model_less_its_head() -> None:
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
    memory = reward_cost(RewardConfig(), setup(max_tokens=96), pairs=None).memory
    assert memory["base weights"] == memory["gradients"] == 2 * weights and memory[OPTIMIZER] == 12 * weights
    assert memory["logits of a chunk"] == 0


def test_the_longest_pass_of_a_reward_model_is_a_pair_of_two_whole_answers() -> None:
    short, long = (
        reward_cost(RewardConfig(), setup(gpu=CARD, max_tokens=size), pairs=1).memory["activations"]
        for size in (96, 192)
    )
    assert long == 2 * short


SIZES = pytest.mark.parametrize(
    ("count", "epochs", "per_step"), [(100, 2.0, 8), (30, 0.1, 3), (7, 1.5, 4), (3, 0.01, 16)]
)


@SIZES
def test_optimizer_steps_are_those_of_the_training(count: int, epochs: float, per_step: int) -> None:
    planned = plan_steps(
        [5] * count, examples_per_step=per_step, epochs=epochs, seed=0, capacity=32, packing=True
    ).num_steps
    assert sft(dialogs=count, epochs=epochs, examples_per_step=per_step).optimizer_steps == planned
    batches = plan_batches(
        [example(2, 3, first=number) for number in range(count)],
        [],
        pairs_per_step=per_step,
        epochs=epochs,
        seed=0,
        row_tokens=64,
        has_pair_labels=False,
    )
    config = RewardConfig(epochs=epochs, pairs_per_step=per_step)
    assert reward_cost(config, setup(), pairs=count).optimizer_steps == batches.plan.num_steps


def test_seconds_by_hand() -> None:
    assert sft(epochs=2.0).seconds == pytest.approx(6 * TINY.weights * 100 * 2 * 200 / CPU_FLOPS)
    # A token of a reward model meets the blocks and the last norm: 2 x 36,992 + 64 weights.
    reward = reward_cost(RewardConfig(epochs=2.0), setup(), pairs=50, tokens_per_pair=300.0)
    assert reward.seconds == pytest.approx(6 * (2 * 36_992 + 64) * 50 * 2 * 300 / CPU_FLOPS)
    plain = sft(ADAPTER, gpu=CARD)
    assert plain.seconds == pytest.approx(4 * TINY.weights * 100 * 2 * 200 / (100e12 * 0.4))
    again = sft(ADAPTER, gpu=CARD, gradient_checkpointing=True)
    assert again.seconds == pytest.approx(plain.seconds * 6 / 4)
    unknown = sft(ADAPTER, gpu=replace(CARD, tflops=None))
    assert unknown.seconds == pytest.approx(plain.seconds * 100 / 71)
    assert "the rtx-3090's" in assumed_speed(replace(CARD, tflops=None), "lora")
    uncounted = sft(dialogs=None)
    assert uncounted.memory and uncounted.optimizer_steps is None and uncounted.seconds == 0


def test_a_card_that_shares_the_work_of_full_tuning_holds_its_share() -> None:
    one, eight = replace(CARD, gib=80.0), replace(CARD, gib=80.0, count=8)
    alone, shared = (sft(gpu=gpu, sample_prompts=0) for gpu in (one, eight))
    # Embeddings and head, 53,760 weights, are whole on each card; the blocks and the last norm are cut.
    weights = 53_760 + -(-(TINY.weights - 53_760) // 8)
    for part, each in (("base weights", 2), ("gradients", 2), (OPTIMIZER, 12)):
        assert (alone.memory[part], shared.memory[part]) == (each * TINY.weights, each * weights)
    assert shared.memory["activations"] == alone.memory["activations"]
    assert alone.memory["gathered blocks"] == 0 < shared.memory["gathered blocks"]
    assert shared.seconds == pytest.approx(alone.seconds / 8)
    # Adapters are whole everywhere; their gradients go between the cards in fp32.
    alone, shared = (sft(ADAPTER, gpu=gpu).memory for gpu in (one, eight))
    for memory in (alone, shared):
        assert memory.pop(ALLOCATOR) == pytest.approx(0.065 * sum(memory.values()), abs=1)
    assert shared == alone | {"gradients between cards": 4 * TINY.adapter_weights(4)}


def test_weights_that_are_cut_are_gathered_to_sample() -> None:
    where = setup(shape=SEVEN, gpu=replace(CARD, gib=80.0, count=8), max_tokens=1024)
    config = SftConfig(gradient_checkpointing=True)
    memory = sft_cost(config, where, dialogs=1).memory
    assert memory["weights gathered to sample"] == 2 * SEVEN.weights and "activations" not in memory
    without = sft_cost(config.model_copy(update={"sample_prompts": 0}), where, dialogs=1)
    assert "activations" in without.memory


# -- what samples


def test_sampling_counts_every_answer_and_the_larger_of_sampling_and_tuning() -> None:
    where, rollout = setup(max_tokens=4096), Rollout(max_new_tokens=12)
    lengths = Lengths(prompt=300.0, answer=10.0)
    tuned = Estimate({"all of the tuning": 10**12}, seconds=50.0, optimizer_steps=7)

    def cost(answers: int | None, samples: int = 1, tuned: Estimate = tuned, **seating: Any) -> Estimate:
        more: dict[str, Any] = {"answers": answers, "samples_per_prompt": samples, "tuned": tuned}
        return sampling_cost(where, rollout, Seating(**seating), lengths, **more)

    one, two = cost(100), cost(200)
    assert one.memory == tuned.memory and one.optimizer_steps == 7
    # Each answer: 300 tokens read, 4 x 10 answered; the prompt is read once for all its answers; a reward model reads both.
    assert one.seconds - 50 == pytest.approx(2 * 100 * (300 + 40) * TINY.weights / CPU_FLOPS)
    assert two.seconds - 50 == pytest.approx(2 * (one.seconds - 50))
    assert cost(100, samples=4).seconds - 50 == pytest.approx(2 * 100 * (75 + 40) * TINY.weights / CPU_FLOPS)
    scored = cost(100, sharing=1).seconds - one.seconds
    assert scored == pytest.approx(2 * 100 * 310 * TINY.block_weights / CPU_FLOPS)
    small = cost(None, tuned=Estimate({"all of the tuning": 1}))
    assert small.memory["trunk"] >= 2 * TINY.weights and CACHE in small.memory and small.seconds == 0


def test_the_report_counts_seconds_and_no_device() -> None:
    plain, with_curves = (report_cost(ReportConfig(shows_curves=shows), steps=7) for shows in (False, True))
    assert plain.peak_bytes == 0 and plain.optimizer_steps is None
    assert 0 < plain.seconds < with_curves.seconds < 60


# -- PPO


@pytest.mark.parametrize(
    ("tuning", "policy_tuning", "critic"),
    [
        (LORA, FULL, "separate"),
        (LORA, LORA, "shared"),
        (LORA, LORA, "none"),
        (QLORA, QLORA, "separate"),
        (FULL, FULL, "separate"),
        (FULL, FULL, "none"),
    ],
)
def test_weights_gradients_and_optimizer_are_those_of_a_real_bank(
    tuning: Tuning, policy_tuning: Tuning, critic: Any, world: World
) -> None:
    bank = world.bank(tuning, policy_tuning, critic=critic)
    shape, width = read_shape(Path(world.base.model)), 2 if tuning is QLORA else 4
    assert shape is not None
    where = Setup(shape, world.base16 if tuning is QLORA else world.base, tuning)
    beside = {name: Beside(shape, width=width) for name in ("helpfulness", "safety")} if tuning is FULL else {}
    seating = Seating(policy_tuning is not FULL, 0 if tuning is FULL else 2, beside)
    rloo: dict[str, Any] = {"advantages": "rloo", "responses_per_prompt": 2}
    config = PpoConfig(**(rloo if critic == "none" else {"critic": critic}))
    memory = ppo_memory(config, where, Rollout(), seating)
    in_bank = ("trunk", "policy's own weights", "critic's own weights", "adapters and heads")
    loaded = sum(size for name, size in memory.items() if name in in_bank or "next to the trunk" in name)
    assert loaded == pytest.approx(weight_bytes(bank), rel=1e-3)
    trained = {role: sum(weight.numel() for weight in group) for role, group in bank.trainable().items()}
    state = 8 + (4 if width == 2 else 0)  # two moments, and masters where the weights are not fp32
    updating = ppo_updating_bytes(config, where)
    assert updating["gradients"] == trained["policy"] * width
    of_critic = trained["critic"] - HEAD if "critic" in trained else 0
    head = HEAD if "critic" in trained else 0
    assert updating["critic's gradients"] == of_critic * width + head * 4
    assert memory[OPTIMIZER] == trained["policy"] * state
    assert memory["critic's optimizer"] == of_critic * state + head * 8


def test_steps_and_seconds_of_ppo_by_hand() -> None:
    where, rollout = setup(dtype="float32", max_tokens=4096), Rollout(max_new_tokens=200)
    seating, lengths = Seating(sharing=2), Lengths(prompt=300.0, answer=100.0)
    config = PpoConfig(
        iterations=3,
        responses_per_iteration=8,
        responses_per_minibatch=4,
        epochs=2,
        validation_every=2,
        validation_prompts=6,
        test_prompts=5,
    )
    cost = ppo_cost(config, where, rollout, seating, lengths)
    assert cost.optimizer_steps == 3 * 2 * 2
    # 24 responses of 400 tokens are learnt from, 2 x 6 + 2 x 5 evaluated. A weight's products with each: 300 as the prompt is
    # read, 4 x 100 as it is answered, 400 by policy and reference each, and of the blocks' weights by two reward models and
    # the critic. Two epochs of training of policy and critic are three passes each.
    weights, blocks = TINY.weights, TINY.weights - TINY.embedding_weights
    sampled = (24 + 22) * ((300 + 4 * 100 + 2 * 400) * weights + 2 * 400 * blocks) + 24 * 400 * blocks
    assert cost.seconds == pytest.approx(2 * (sampled + 24 * 400 * 2 * 2 * 3 * weights) / CPU_FLOPS)
    assert "prompts of 300 tokens, answers of 100" in cost.assumed
    shared = ppo_cost(config.model_copy(update={"critic": "shared"}), where, rollout, seating, lengths)
    assert shared.seconds < cost.seconds and shared.peak_bytes < cost.peak_bytes


def test_a_4_bit_base_holds_all_roles_on_one_card_and_a_copy_for_the_decoder_where_there_is_room() -> None:
    """Two reward models, responses of 256 tokens to prompts of 512, checkpointing on."""

    def memory(shape: Shape, gpu: str, **rollout: Any) -> dict[str, int]:
        where = setup(Tuning(method="qlora", rank=16), shape=shape, gpu=parse_gpu(gpu), max_tokens=768)
        section = Rollout.model_validate({"max_new_tokens": 256, "cache_gib": 1.0} | rollout)
        seating = Seating(is_continued=True, sharing=2)
        return ppo_memory(PpoConfig(gradient_checkpointing=True), where, section, seating)

    for shape, gpu in ((SEVEN, "24GiB"), (SEVENTY, "80GiB")):
        small = memory(shape, gpu)
        assert sum(small.values()) < parse_gpu(gpu).usable_bytes
        # There is no room for it: 4 bytes a block of 64 weights, and the adapters.
        assert shape.linear_weights / 16 < small[DECODER] < shape.linear_weights / 8
    assert memory(SEVEN, "80GiB")[DECODER] == 2 * SEVEN.linear_weights
    grown = memory(SEVEN, "24GiB", cache_gib="auto")[CACHE] / (2 * 32 * 4096 * 2)
    assert grown / (512 + 256) > 16, "rows of the longest; 64 of them do not fit"
    served = memory(SEVEN, "80GiB", engine="vllm", server="http://localhost:8000")
    assert served[DECODER] == 0 and CACHE not in served, "a server has its own weights and cache"
    assert not {SERVER, SLEEPING_SERVER} & served.keys(), "on another card"
    server = {"engine": "vllm", "server": "http://localhost:8000"}
    shared = memory(SEVEN, "24GiB", **server, server_gib=15.0)
    assert shared[SERVER] == 15 * 2**30 and SLEEPING_SERVER not in shared, "sampling is the worse moment"
    assert "critic's gradients" not in shared and sum(shared.values()) < parse_gpu("24GiB").usable_bytes
    training = memory(SEVEN, "24GiB", **server, server_gib=2.0)
    assert training[SLEEPING_SERVER] == 2 * 2**30 and SERVER not in training
    assert sum(training.values()) == sum(memory(SEVEN, "24GiB", **server).values()) + 2 * 2**30
