"""Top-k: the oracles are transformers' own warpers, numbers worked out by hand."""

import math
from typing import cast

import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llamachat.rollout.decoder import LlamaEngine
from llamachat.rollout.engine import Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from llamachat.rollout.sampling import choose, draw, sampling_logprobs
from tests.tiny_llama import tiny_llama

STOPS = tuple(range(2, 22))  # of 420 ids: some answers end early, some do not
PROMPTS = [[1, 17, 300, 42], [1, 8], [1, *range(90, 100)], [1, 8]]


def warped(logits_BV: torch.Tensor, temperature: float, top_k: int | None, top_p: float) -> torch.Tensor:
    """Log-probabilities as transformers makes them: temperature, then top-k, then top-p."""
    ids, scores = cast(torch.LongTensor, torch.zeros((len(logits_BV), 1), dtype=torch.long)), logits_BV
    scores = TemperatureLogitsWarper(temperature)(ids, scores) if temperature != 1 else scores
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(ids, scores)
    scores = scores if top_p == 1 else TopPLogitsWarper(top_p)(ids, scores)
    return scores.log_softmax(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(1, 1.0), (7, 1.0), (63, 1.0), (900, 1.0), (7, 0.8), (40, 0.5), (None, 0.9)]
)
def test_what_is_drawn_from_is_what_transformers_draws_from(
    temperature: float, top_k: int | None, top_p: float
) -> None:
    logits = torch.randn((50, 420), generator=torch.Generator().manual_seed(1)) * 2
    expected = warped(logits, temperature, top_k, top_p)
    all_logprobs = sampling_logprobs(logits, temperature=temperature, top_p=top_p, top_k=top_k)
    torch.testing.assert_close(all_logprobs, expected, atol=1e-5, rtol=0)
    uniforms = torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids, logprobs = choose(logits, uniforms, temperature=temperature, top_p=top_p, top_k=top_k)
    assert torch.equal(ids, draw(all_logprobs, uniforms))
    torch.testing.assert_close(logprobs, expected.gather(1, ids[:, None])[:, 0], atol=1e-5, rtol=0)


def test_of_tokens_that_tie_those_of_the_lower_ids_are_kept_and_never_more_than_k() -> None:
    # The largest, then three alike, of which k = 3 leaves room for two: ids 0 and 2.
    logits = torch.tensor([[1.0, 0.0, 1.0, 2.0, 1.0], [0.5] * 5])
    kept = [[0, 2, 3], [0, 1, 2]]
    all_logprobs = sampling_logprobs(logits, temperature=1.0, top_p=1.0, top_k=3)
    assert [row.isfinite().nonzero()[:, 0].tolist() for row in all_logprobs] == kept
    # e^1, e^1 and e^2 of their sum.
    total = 2 * math.e + math.e**2
    assert all_logprobs[0, [0, 2, 3]].exp().tolist() == pytest.approx(
        [math.e / total, math.e / total, math.e**2 / total]
    )
    assert all_logprobs[1, :3].exp().tolist() == pytest.approx([1 / 3] * 3)
    # Top-p counts the mass of what top-k left: 0.58 of it is the likeliest token's.
    nucleus = sampling_logprobs(logits[:1], temperature=1.0, top_p=0.6, top_k=3)
    assert nucleus[0].isfinite().nonzero()[:, 0].tolist() == [0, 3]
    # Greedy: the model's own probabilities, and its likeliest token.
    assert torch.equal(sampling_logprobs(logits, temperature=0, top_p=1.0, top_k=1), logits.log_softmax(-1))
    ids, logprobs = choose(logits, torch.zeros(2).double(), temperature=0, top_p=1.0, top_k=1)
    assert ids.tolist() == [3, 0]
    torch.testing.assert_close(logprobs, logits.log_softmax(-1)[[0, 1], [3, 0]])


@pytest.mark.parametrize("top_p", [1.0, 0.85])
def test_both_engines_say_the_same_and_never_a_token_outside(top_p: float) -> None:
    model, sampling = tiny_llama(), Sampling(1.4, top_p, 12, 4, top_k=5)
    ours, theirs = (
        engine.generate(PROMPTS, samples_per_prompt=6, sampling=sampling)
        for engine in (LlamaEngine(model, STOPS), HuggingFaceEngine(model, STOPS, 0))
    )
    for prompt, group, others in zip(PROMPTS, ours, theirs, strict=True):
        for completion, other in zip(group, others, strict=True):
            assert completion.token_ids == other.token_ids
            assert completion.logprobs == pytest.approx(other.logprobs, abs=1e-4)
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *completion.token_ids]])).logits[
                    0, len(prompt) - 1 : -1
                ]
            expected = warped(logits, 1.4, 5, top_p)[range(len(completion.token_ids)), completion.token_ids]
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-4)
    assert len({completion.token_ids for group in ours for completion in group}) > 12
