"""Rollouts by both engines: the oracles are a loop without cache or batch, scripted models, numpy, and hand numbers."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llamachat.config.sections import Tuning
from llamachat.errors import DataError, UsageError
from llamachat.models.loading import attach_adapter
from llamachat.rollout.decoder import LlamaEngine
from llamachat.rollout.engine import Completion, LocalEngine, Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from llamachat.rollout.sampling import draw, row_uniforms, sampling_logprobs
from tests.tiny_llama import move_adapter, scripted_llama, tiny_llama

PROMPTS = [[1, 17, 300, 42], [1, 8], [1, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99], [1, 8]]
STOPS = tuple(range(2, 22))  # of 420 ids: some answers end early, some do not
GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=12, seed=0)
RANDOM = Sampling(temperature=1.3, top_p=0.9, max_new_tokens=12, seed=7)
Make = Callable[..., LocalEngine]


def ours(model: Any, stop_ids: tuple[int, ...], **options: Any) -> LocalEngine:
    return LlamaEngine(model, stop_ids, **options)


def theirs(model: Any, stop_ids: tuple[int, ...], **options: Any) -> LocalEngine:
    return HuggingFaceEngine(model, stop_ids, 0, **options)


both = pytest.mark.parametrize("make", [ours, theirs])


def logits_of(model: nn.Module, ids: list[int]) -> np.ndarray:
    """Logits at every position of one unpadded sequence, float64."""
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


def greedy_by_hand(model: nn.Module, prompt: list[int], stops: tuple[int, ...], new_tokens: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + new_tokens and (len(ids) == len(prompt) or ids[-1] not in stops):
        ids.append(int(logits_of(model, ids)[-1].argmax()))
    return ids[len(prompt) :]


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max()
    return shifted - math.log(np.exp(shifted).sum())


def nucleus_logprobs(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Temperature and top-p by walking down from the likeliest token."""
    probabilities = np.exp(log_softmax(logits / temperature))
    kept, mass = np.zeros_like(probabilities), 0.0
    for token in np.argsort(-probabilities):
        kept[token] = probabilities[token]
        mass += probabilities[token]
        if mass >= top_p:
            break
    with np.errstate(divide="ignore"):
        return np.log(kept / kept.sum())


def test_greedy_answers_are_those_of_a_loop_over_single_sequences():
    model = tiny_llama()
    groups = HuggingFaceEngine(model, STOPS, 0).generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY)
    expected = [greedy_by_hand(model, prompt, STOPS, 12) for prompt in PROMPTS]
    assert [list(group[0].token_ids) for group in groups] == expected
    assert [group[0].is_finished for group in groups] == [ids[-1] in STOPS for ids in expected]
    assert len({len(ids) for ids in expected}) > 1, "answers of one batch end at different lengths"


def test_a_row_says_the_same_in_any_batch():
    model = tiny_llama()
    prompts = [*PROMPTS, [1, *range(30, 110)]]
    for sampling in (GREEDY, RANDOM):
        together, one_by_one, little_memory = (
            HuggingFaceEngine(model, STOPS, 0, cache_gib=cache_gib, rows_per_batch=rows).generate(
                prompts, samples_per_prompt=3, sampling=sampling
            )
            for cache_gib, rows in ((1.0, 64), (1.0, 1), (1e-5, 64))
        )
        assert ids_of(together) == ids_of(one_by_one) == ids_of(little_memory)
        fewer = HuggingFaceEngine(model, STOPS, 0).generate(prompts[:2], samples_per_prompt=2, sampling=sampling)
        assert ids_of(fewer) == [group[:2] for group in ids_of(together)[:2]]
    different = {ids for group in ids_of(together)[1::2] for ids in group}
    assert len(different) == 6, "the same prompt twice, three samples each: six draws"


def ids_of(groups: list[list[Completion]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


def test_sampling_leaves_model_and_random_state_as_they_were():
    model = tiny_llama(attention_dropout=0.5)
    adapted = attach_adapter(model, Tuning(method="lora", rank=4, alpha=8, dropout=0.5), seed=0)
    move_adapter(adapted)
    expected = [greedy_by_hand(adapted, prompt, STOPS, 12) for prompt in PROMPTS]
    adapted.train()
    model.model.norm.eval()
    model.config.use_cache = False
    suggested = model.generation_config
    suggested.repetition_penalty = 5.0
    suggested.suppress_tokens = [expected[0][0]]
    suggested.min_new_tokens = 12
    before = {name: module.training for name, module in adapted.named_modules()}
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    groups = HuggingFaceEngine(adapted, STOPS, 0).generate(PROMPTS, samples_per_prompt=1, sampling=GREEDY)
    HuggingFaceEngine(adapted, STOPS, 0).generate(PROMPTS, samples_per_prompt=2, sampling=RANDOM)
    assert [list(group[0].token_ids) for group in groups] == expected, "no dropout, none of the suggested settings"
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {name: module.training for name, module in adapted.named_modules()} == before
    assert not model.config.use_cache
    assert model.generation_config is suggested
    assert suggested.repetition_penalty == 5.0
    assert {name for name, weight in adapted.named_parameters() if weight.requires_grad} == trained
    adapted(input_ids=torch.tensor([PROMPTS[0]]), labels=torch.tensor([PROMPTS[0]])).loss.backward()


def test_an_error_in_the_middle_leaves_the_model_as_it_was():
    model = tiny_llama().train()
    suggested = model.generation_config

    def fail(token: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        HuggingFaceEngine(model, STOPS, 0).stream(PROMPTS[0], sampling=GREEDY, on_token=fail)
    assert model.training
    assert model.generation_config is suggested


@both
@pytest.mark.parametrize("sampling", [GREEDY, RANDOM, Sampling(0.7, 1.0, 12, 1)])
def test_logprobs_are_those_of_the_distribution_that_was_drawn_from(make: Make, sampling: Sampling):
    model = tiny_llama()
    groups = make(model, STOPS).generate(PROMPTS, samples_per_prompt=3, sampling=sampling)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            logits = logits_of(model, [*prompt, *completion.token_ids])[len(prompt) - 1 : -1]
            for step, (token, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
                expected = nucleus_logprobs(logits[step], sampling.temperature or 1.0, sampling.top_p)
                assert logprob == pytest.approx(expected[token], abs=1e-4)


@both
def test_the_seed_decides_what_is_drawn(make: Make):
    engine = make(tiny_llama(), STOPS)
    first, again, other = (
        ids_of(engine.generate(PROMPTS, samples_per_prompt=8, sampling=Sampling(1.0, 1.0, 12, seed)))
        for seed in (0, 0, 1)
    )
    assert first == again != other
    assert all(len(set(group)) > 4 for group in first)


@both
@pytest.mark.parametrize("sampling", [GREEDY, RANDOM])
def test_streaming_gives_the_same_answer_token_by_token(make: Make, sampling: Sampling):
    engine, seen = make(tiny_llama(), STOPS), list[int]()
    streamed = engine.stream(PROMPTS[2], sampling=sampling, on_token=seen.append)
    assert [[streamed]] == engine.generate(PROMPTS[2:3], samples_per_prompt=1, sampling=sampling)
    assert tuple(seen) == streamed.token_ids


@both
def test_an_answer_fits_into_the_models_positions_and_a_prompt_that_fills_them_is_refused(make: Make):
    engine = make(tiny_llama(), ())
    assert engine.context == 128
    prompts = [[1] + [30] * 124, [1] + [31] * 126, [1, 8]]
    groups = engine.generate(prompts, samples_per_prompt=2, sampling=Sampling(1.0, 1.0, 12, 0))
    assert [[len(completion.token_ids) for completion in group] for group in groups] == [[3, 3], [1, 1], [12, 12]]
    assert not groups[0][0].is_finished
    for length in (128, 500):
        with pytest.raises(DataError, match=rf"prompt 2: {length} tokens, but .* 128 positions\. Shorten"):
            engine.generate([[1, 8], [1] * length], samples_per_prompt=1, sampling=GREEDY)


@both
def test_progress_counts_every_completion_once_and_without_prompts_there_are_none(make: Make):
    engine, counted = make(tiny_llama(), STOPS, rows_per_batch=5), list[int]()
    engine.generate(PROMPTS, samples_per_prompt=3, sampling=GREEDY, advance=counted.append)
    assert sum(counted) == 12 and max(counted) <= 5
    assert engine.generate([], samples_per_prompt=3, sampling=GREEDY) == []


@both
@pytest.mark.parametrize("rows", [1, 3, 64])
def test_all_rows_may_end_with_their_first_token_or_in_the_same_step(make: Make, rows: int):
    engine = make(scripted_llama([1, 5], [7, 8, 9, 2]), (5, 2), rows_per_batch=rows)
    for prompts, answer in (([[1], [9, 1], [8, 9, 1]], (5,)), ([[7], [30, 7], [31, 7], [7]], (8, 9, 2))):
        groups = engine.generate(prompts, samples_per_prompt=4, sampling=GREEDY)
        assert ids_of(groups) == [[answer] * 4] * len(prompts)
        assert all(completion.is_finished for group in groups for completion in group)


@both
def test_one_token_is_drawn_where_the_limit_is_one(make: Make):
    engine = make(scripted_llama([7, 8, 9, 2]), (2,), rows_per_batch=3)
    groups = engine.generate([[7], [30, 8], [9]], samples_per_prompt=2, sampling=Sampling(0.0, 1.0, 1, 0))
    assert ids_of(groups) == [[(8,)] * 2, [(9,)] * 2, [(2,)] * 2]
    assert [group[0].is_finished for group in groups] == [False, False, True]


@both
def test_a_part_of_a_list_is_answered_as_in_the_whole_list(make: Make):
    prompts = [[1, 8], [1, 8, 9], [1, 8], [1, 7], [1, 8]]
    engine = make(tiny_llama(), (), rows_per_batch=3)
    whole = ids_of(engine.generate(prompts, samples_per_prompt=2, sampling=RANDOM))
    assert whole[0] != whole[2] != whole[4]  # the place decides, not the prompt alone
    for places in ([1, 3], [4, 2, 0]):
        of = [prompts[place] for place in places]
        part = engine.generate(of, samples_per_prompt=2, sampling=RANDOM, numbers=places)
        assert ids_of(part) == [whole[place] for place in places]


def test_top_p_keeps_the_likeliest_up_to_the_one_that_reaches_it():
    # Probabilities 0.1, 0.4, 0.2, 0.3: from the likeliest on they add up to 0.4, 0.7, 0.9, 1.0.
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    for top_p, expected in (
        (0.39, [0, 1, 0, 0]),
        (0.6, [0, 4 / 7, 0, 3 / 7]),
        (0.8, [0, 4 / 9, 2 / 9, 3 / 9]),
        (0.95, [0.1, 0.4, 0.2, 0.3]),
        (1e-9, [0, 1, 0, 0]),
    ):
        probabilities = sampling_logprobs(logits, temperature=1.0, top_p=top_p).exp()
        torch.testing.assert_close(probabilities, torch.tensor([expected], dtype=torch.float32), msg=f"top-p {top_p}")
    # Temperature 0.5 squares the odds: 1, 16, 4, 9 of 30.
    squared = sampling_logprobs(logits, temperature=0.5, top_p=1.0).exp()
    torch.testing.assert_close(squared, torch.tensor([[1 / 30, 16 / 30, 4 / 30, 9 / 30]]))
    # Greedy: the model's own probabilities, whatever top-p says.
    own = sampling_logprobs(logits, temperature=0.0, top_p=0.1).exp()
    torch.testing.assert_close(own, torch.tensor([[0.1, 0.4, 0.2, 0.3]]))


def test_draws_fall_where_the_distribution_function_says():
    # Probabilities 0, 0.25, 0, 0.5, 0.25, 0: the function steps at 0.25 and 0.75.
    logprobs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]).log()
    uniforms = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53, 1.0], dtype=torch.float64)
    drawn = draw(logprobs.repeat(len(uniforms), 1), uniforms)
    assert drawn.tolist() == [1, 1, 3, 3, 4, 4, 4], "never a token of no probability"
    grid = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = torch.bincount(draw(logprobs.repeat(4000, 1), grid), minlength=6)
    assert counts.tolist() == [0, 1000, 0, 2000, 1000, 0]


def test_a_rows_numbers_are_its_own_and_do_not_depend_on_how_many_are_taken():
    rows = {(seed, prompt, sample) for seed in (0, 1) for prompt in (0, 1, 5) for sample in (0, 1)}
    numbers = {row: row_uniforms(40, seed=row[0], prompt=row[1], sample=row[2]) for row in rows}
    assert len({tuple(row.tolist()) for row in numbers.values()}) == len(rows)
    assert torch.equal(row_uniforms(7, seed=1, prompt=5, sample=0), numbers[1, 5, 0][:7])
    everything = torch.cat(list(numbers.values()))
    assert everything.dtype == torch.float64
    assert 0 <= float(everything.min()) < 0.02
    assert 0.98 < float(everything.max()) < 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((-0.1, 1.0, 1, 0), "temperature is -0.1"),
        ((float("nan"), 1.0, 1, 0), "temperature is nan"),
        ((1.0, 0.0, 1, 0), r"top-p is 0\.0"),
        ((1.0, 1.5, 1, 0), r"top-p is 1\.5"),
        ((1.0, 1.0, 0, -1), "max-new-tokens is 0, and must be at least 1; seed is -1"),
        ((1.0, 1.0, 1, 0, 0), "top-k is 0, and must be at least 1, or left out"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(values: tuple[Any, ...], reason: str):
    with pytest.raises(UsageError, match=reason):
        Sampling(*values)
