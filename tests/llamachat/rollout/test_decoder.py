"""Our decoder: the oracles are the Hugging Face engine, forwards without a cache, and counted frequencies."""

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from llamachat.chat_format import ChatFormat
from llamachat.config.sections import Base, Rollout, Tuning
from llamachat.errors import ConfigError
from llamachat.models.loading import attach_adapter, load_base
from llamachat.rollout import open_engine
from llamachat.rollout.decoder import LlamaEngine
from llamachat.rollout.engine import Completion, Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from llamachat.rollout.sampling import choose, draw, sampling_logprobs
from tests.sft.tiny_sft import write_base
from tests.tiny_llama import LORA, base_section, move_adapter, tiny_llama

BASE = Path(__file__).parents[3] / "assets" / "base"
STOPS = tuple(range(2, 22))  # of 420 ids: some answers end early, some do not
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=12, seed=0)
NUCLEUS = Sampling(temperature=1.3, top_p=0.9, max_new_tokens=12, seed=4)
PLAIN = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=30, seed=3)


def random_prompts(count: int, *, longest: int = 90, vocabulary: int = 420, seed: int = 0) -> list[list[int]]:
    numbers = random.Random(seed)
    lengths = [numbers.randrange(longest) for _ in range(count)]
    return [[1, *(numbers.randrange(22, vocabulary) for _ in range(length))] for length in lengths]


def answers(engine: Any, prompts: list[list[int]], sampling: Sampling, samples: int = 1) -> list[list[tuple[int, ...]]]:
    groups: list[list[Completion]] = engine.generate(prompts, samples_per_prompt=samples, sampling=sampling)
    return [[completion.token_ids for completion in group] for group in groups]


def with_transformers(
    model: Any, prompts: list[list[int]], sampling: Sampling, samples: int = 1, **options: Any
) -> list[list[tuple[int, ...]]]:
    return answers(HuggingFaceEngine(model, STOPS, 0, **options), prompts, sampling, samples)


@pytest.mark.parametrize("sampling", [GREEDY, NUCLEUS, PLAIN, None])
def test_both_engines_say_the_same(sampling: Sampling | None) -> None:
    model, prompts = tiny_llama(), random_prompts(200)
    if sampling is None:
        model, sampling = load_base(Base(model=str(BASE), dtype="float32", max_tokens=1024)).eval(), GREEDY
        prompts = random_prompts(200, longest=40, vocabulary=4000)
    assert answers(LlamaEngine(model, STOPS), prompts, sampling) == with_transformers(model, prompts, sampling)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32},
        {"dtype": torch.float64},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
    ],
    ids=str,
)
def test_every_kind_of_llama_model_is_computed_as_transformers_does(changes: dict[str, Any]) -> None:
    model, prompts = tiny_llama(**changes), random_prompts(30, longest=40)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
    assert answers(LlamaEngine(model, STOPS), prompts, GREEDY) == with_transformers(model, prompts, GREEDY)


def test_dynamic_scaling_follows_each_rows_own_length() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    prompts = [*random_prompts(6, longest=120), [1] + [30] * 140, [1] + [31] * 170]
    sampling = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=60, seed=0)
    # One row at a time and a model of its own: what transformers rotates by stays with the module.
    expected = [
        with_transformers(tiny_llama(rope_parameters=rope), [prompt], sampling, rows_per_batch=1)[0]
        for prompt in prompts
    ]
    assert answers(LlamaEngine(tiny_llama(rope_parameters=rope), STOPS), prompts, sampling) == expected


@pytest.mark.parametrize("sampling", [GREEDY, NUCLEUS, PLAIN])
def test_a_row_says_the_same_in_any_batch_to_the_last_bit(sampling: Sampling) -> None:
    model, prompts = tiny_llama(), random_prompts(60)
    engines = [LlamaEngine(model, STOPS, rows_per_batch=rows) for rows in (64, 1, 7, 120)]
    engines.append(LlamaEngine(model, STOPS, cache_gib=300 * 1024 / 2**30))
    groups = [engine.generate(prompts, samples_per_prompt=2, sampling=sampling) for engine in engines]
    assert all(group == groups[0] for group in groups[1:])
    alone = LlamaEngine(model, STOPS).generate(prompts[:1], samples_per_prompt=1, sampling=sampling)
    assert alone[0][0] == groups[0][0][0]


def test_more_tokens_than_the_context_take_no_more_memory() -> None:
    model, prompts = tiny_llama(), random_prompts(3, longest=20)
    engine = LlamaEngine(model, (2,))
    most, endless = (replace(NUCLEUS, max_new_tokens=tokens) for tokens in (engine.context, 10**12))
    assert answers(engine, prompts, endless) == answers(engine, prompts, most)


def test_frequencies_are_those_of_the_distribution() -> None:
    model = tiny_llama(vocab_size=24)
    sampling = Sampling(temperature=1.5, top_p=1.0, max_new_tokens=2, seed=5)
    drawn = answers(LlamaEngine(model, (), rows_per_batch=512), [[1, 7, 9]], sampling, samples=6000)[0]
    with torch.no_grad():
        first = (model(input_ids=torch.tensor([[1, 7, 9]])).logits[0, -1] / 1.5).softmax(-1)
        pairs = torch.tensor([[1, 7, 9, token] for token in range(24)])
        joint = first[:, None] * (model(input_ids=pairs).logits[:, -1] / 1.5).softmax(-1)
    counts = torch.zeros(24, 24)
    for one, two in drawn:
        counts[one, two] += 1
    expected = joint.flatten().double() * len(drawn)
    is_rare = expected < 8
    squares = (counts.flatten() - expected).square() / expected
    rare, its = counts.flatten()[is_rare].sum(), expected[is_rare].sum()
    statistic = float(squares[~is_rare].sum() + (rare - its).square() / its)
    freedom = int((~is_rare).sum())  # the rare ones together are one cell more
    assert freedom > 50
    # Wilson and Hilferty: the cube root of chi-square over its freedom is normal; 3.3 deviations are 1 in 2000.
    spread = math.sqrt(2 / (9 * freedom))
    assert (statistic / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 3.3 * spread


def test_choosing_by_blocks_is_the_plain_draw() -> None:
    generator = torch.Generator().manual_seed(2)
    for vocabulary in (24, 64, 420, 4096):
        logits = torch.randn((300, vocabulary), generator=generator) * 3
        uniforms = torch.rand(300, generator=generator, dtype=torch.float64)
        uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
        for temperature, top_p in ((1.0, 1.0), (0.6, 1.0), (1.0, 0.7), (0.0, 1.0)):
            ids, logprobs = choose(logits, uniforms, temperature=temperature, top_p=top_p)
            plain = sampling_logprobs(logits, temperature=temperature, top_p=top_p)
            assert torch.equal(ids, plain.argmax(-1) if temperature == 0 else draw(plain, uniforms))
            torch.testing.assert_close(logprobs, plain.gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=0)
    # The first and the last block hold nothing: never one of theirs.
    logits = torch.full((2, 192), float("-inf"))
    logits[:, 70:75] = 0.0
    assert choose(logits, torch.tensor([0.0, 1.0]).double(), temperature=1.0, top_p=1.0)[0].tolist() == [70, 74]


def test_a_cache_too_small_for_a_prompt_and_its_answer_is_refused() -> None:
    model = tiny_llama()
    token = 2 * 2 * 2 * 16 * 8 / 2**30  # keys and values of 2 layers of 2 heads of 16 numbers of 8 bytes, in GiB
    engine = LlamaEngine(model, (), cache_gib=21.5 * token)
    assert len(answers(engine, [[1, 8, 9, 10, 11, 12, 13, 14, 15]], GREEDY, 8)[0]) == 8
    with pytest.raises(ConfigError, match=r"rollout.cache_gib: .* 21 tokens .* prompt 2 \(10 tokens\) .* up to 22"):
        engine.generate([[1], [1] * 10], samples_per_prompt=1, sampling=GREEDY)


def test_a_merged_adapter_says_what_the_model_says_and_the_trunk_stays() -> None:
    model = attach_adapter(tiny_llama(), Tuning(method="lora", rank=4, alpha=8, dropout=0.5), seed=0)
    base, prompts = with_transformers(model, random_prompts(20), GREEDY), random_prompts(20)
    before = {name: weight.clone() for name, weight in model.named_parameters() if ".lora_" not in name}
    engines = [LlamaEngine(model, STOPS, is_merged=is_merged) for is_merged in (True, False)]
    assert [answers(engine, prompts, GREEDY) for engine in engines] == [base, base]
    move_adapter(model)
    expected = with_transformers(model, prompts, GREEDY)
    assert expected != base
    assert answers(engines[0], prompts, GREEDY) == base, "a copy changes only at a refresh"
    model.train()
    for engine in engines:
        engine.refresh(model)
        assert answers(engine, prompts, GREEDY) == expected
    with model.disable_adapter():
        engines[0].refresh(model)
    assert answers(engines[0], prompts, GREEDY) == base
    assert all(module.training for module in model.modules())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)


def test_a_fully_tuned_policy_is_refreshed() -> None:
    model, other, prompts = tiny_llama(), tiny_llama(seed=1), random_prompts(20)
    engine = LlamaEngine(model, STOPS)
    first = answers(engine, prompts, PLAIN)
    model.load_state_dict(other.state_dict())
    assert answers(engine, prompts, PLAIN) == first
    engine.refresh(model)
    assert answers(engine, prompts, PLAIN) == with_transformers(other, prompts, PLAIN) != first


@pytest.mark.parametrize("is_tied", [False, True])
def test_another_models_weights_are_taken_and_the_first_models_stay(is_tied: bool) -> None:
    model, other = (tiny_llama(seed=seed, tie_word_embeddings=is_tied).requires_grad_(False) for seed in (0, 1))
    before, prompts = {name: weight.clone() for name, weight in model.named_parameters()}, random_prompts(20)
    engine = LlamaEngine(model, STOPS)
    engine.refresh(other)
    assert answers(engine, prompts, PLAIN) == with_transformers(other, prompts, PLAIN)
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_4_bit_trunk_is_dequantised_into_the_copy_or_run_as_it_is(tmp_path: Path, tiny_sentencepiece: bytes) -> None:
    folder = write_base(tmp_path / "base", tiny_sentencepiece, dtype=torch.bfloat16)
    trunk = load_base(base_section(folder, dtype="bfloat16"), is_nf4=True)
    model = attach_adapter(trunk, Tuning(method="qlora", rank=4, alpha=8), seed=0).eval()
    move_adapter(model)
    packed = {name: weight.clone() for name, weight in model.named_parameters()}
    for is_merged in (True, False):
        engine = LlamaEngine(model, (), is_merged=is_merged)
        (completion,) = engine.generate([[1, 270, 279]], samples_per_prompt=1, sampling=PLAIN)[0]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[1, 270, 279, *completion.token_ids]])).logits[0, 2:-1]
        expected = logits.float().log_softmax(-1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        # Products in bf16 after a weight that is rounded once more: a few hundredths of a nat.
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=0.1, rtol=0.03)
    assert all(torch.equal(weight, packed[name]) for name, weight in model.named_parameters())


def test_in_bf16_logprobs_stay_near_those_of_the_training_forward() -> None:
    model = load_base(Base(model=str(BASE), dtype="bfloat16", max_tokens=1024)).eval()
    prompts = random_prompts(8, longest=30, vocabulary=4000)
    groups = LlamaEngine(model, ()).generate(prompts, samples_per_prompt=2, sampling=PLAIN)
    gaps: list[float] = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
            expected = logprobs.gather(1, ids[0, len(prompt) :, None])[:, 0]
            gaps += (expected - torch.tensor(completion.logprobs)).abs().tolist()
    assert sum(gaps) / len(gaps) < 0.03


def test_the_engine_is_ours_where_it_can_compute_the_model(tiny_format: ChatFormat) -> None:
    def opened(model: Any, name: Any) -> type:
        return type(open_engine(model, tiny_format, Rollout(engine=name)))

    model = tiny_llama()
    assert opened(model, "auto") is opened(model, "llama") is LlamaEngine
    assert opened(model, "hugging_face") is HuggingFaceEngine
    assert opened(attach_adapter(tiny_llama(), LORA, seed=0), "auto") is LlamaEngine
    longrope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
    longrope |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    odd = {
        "'gelu'": tiny_llama(hidden_act="gelu"),
        "type 'longrope'": tiny_llama(rope_parameters=longrope),
        "a Bilinear": tiny_llama(),
        "DoRA": get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True)),
    }
    odd["a Bilinear"].lm_head = nn.Bilinear(2, 2, 2)  # type: ignore[assignment]  # what no Llama model has
    for reason, strange in odd.items():
        assert opened(strange, "auto") is HuggingFaceEngine
        with pytest.raises(ConfigError, match=rf"rollout.engine: llama, but the model has .*{reason}"):
            opened(strange, "llama")
