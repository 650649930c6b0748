"""The planner's bytes against what torch allocates on a CPU: every allocation and release of two optimizer steps is counted.

`python -m benchmarks.memory` does the same at 100 M parameters with resident memory, for reward models, rollouts and PPO too.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from llamachat.chat_format import TokenizedExample
from llamachat.config.sections import Tuning
from llamachat.data.packing import collate_packed, pack_responses
from llamachat.memory.estimates import Estimate, Setup, Shape
from llamachat.models.loading import attach_adapter
from llamachat.models.scoring_head import ScoringLlama, scores_and_states
from llamachat.models.sequence_attention import use_sequence_attention
from llamachat.training.master_weights import adamw
from pipelines.planning.stage_costs import reward_cost, sft_cost
from reward.config import Config as RewardConfig
from reward.loss import language_losses
from sft.config import Config as SftConfig
from sft.loss import answer_token_losses
from tests.tiny_llama import base_section

SHAPE = Shape(128, 352, 4, 4, 2, 2000)
TOKENS = 256


def model_of(kind: Any, tuning: Tuning, *, checkpointing: bool) -> Any:
    config = LlamaConfig(
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.key_value_heads,
        vocab_size=SHAPE.vocabulary,
        pad_token_id=0,
    )
    config.num_labels = 1
    config._attn_implementation = "sdpa"
    model: Any = kind(config).to(torch.bfloat16)
    use_sequence_attention(model, trains_together=True)
    if tuning.method == "lora":
        model = attach_adapter(model, tuning, seed=0)
        model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes that torch held at once beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    allocated = peak = 0
    results: Any = seen.profiler
    for event in sorted(results.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def two_steps(model: Any, loss: Callable[[Any], torch.Tensor]) -> int:
    def work() -> None:
        optimizer = adamw(model.parameters(), learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-5)
        for _ in range(2):
            for _ in range(2):
                loss(model).backward()
            optimizer.step()
            optimizer.zero_grad()

    return peak_of(work)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_supervised_tuning(method: Any, checkpointing: bool) -> None:
    tuning = Tuning(method=method, rank=8)
    ids = tuple(range(3, 3 + TOKENS))
    batch = collate_packed([TokenizedExample(ids, (True,) * TOKENS)])
    model = model_of(LlamaForCausalLM, tuning, checkpointing=checkpointing)
    peak = two_steps(model, lambda model: answer_token_losses(model, batch).mean())
    base = base_section("x", dtype="bfloat16", attention="sdpa", max_tokens=TOKENS)
    config = SftConfig(gradient_checkpointing=checkpointing, row_tokens=TOKENS)
    assert_like(sft_cost(config, Setup(SHAPE, base, tuning), dialogs=None), peak)


@pytest.mark.parametrize("language_weight", [0.0, 0.5])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_reward_model(checkpointing: bool, language_weight: float) -> None:
    ids = tuple(range(3, 3 + TOKENS))
    batch = pack_responses([ids, ids])
    head_VD = torch.zeros(SHAPE.vocabulary, SHAPE.hidden_size, dtype=torch.bfloat16)
    if language_weight:
        batch |= {"states_at": torch.arange(TOKENS - 1), "next_tokens": torch.tensor(ids[1:])}
    model = model_of(ScoringLlama, Tuning(), checkpointing=checkpointing)

    def loss(model: Any) -> torch.Tensor:
        scores_N, states_ND = scores_and_states(model, batch)
        ranking = scores_N.diff().mean()
        if states_ND is None:
            return ranking
        return ranking + language_weight * language_losses(states_ND, batch["next_tokens"], head_VD=head_VD).mean()

    peak = two_steps(model, loss)
    base = base_section("x", dtype="bfloat16", max_tokens=TOKENS)
    config = RewardConfig(gradient_checkpointing=checkpointing, row_tokens=2 * TOKENS, language_weight=language_weight)
    assert_like(reward_cost(config, Setup(SHAPE, base, Tuning()), pairs=None), peak)


def assert_like(estimate: Estimate, measured: int) -> None:
    assert 0.85 < estimate.grown_bytes / measured < 1.15, (estimate.memory, measured)
