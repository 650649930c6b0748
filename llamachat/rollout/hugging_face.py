"""Rollouts with transformers' `generate`: plain, for any Llama model, and the reference in tests of other engines.

`generate` is configured for greedy decoding, but a logits processor samples each row's token and masks all others. This
gives the log-probability without storing logits, gives each row its own random numbers, and does not touch torch's
random state, so that sampling during training does not change the training.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from llamachat import distributed
from llamachat.models.loading import context_length
from llamachat.rollout.cache import CacheShape
from llamachat.rollout.engine import Completion, Sampling, check_prompts, evaluating
from llamachat.rollout.sampling import draw, row_uniforms, sampling_logprobs
from llamachat.rollout.weights import without_wrapper

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

ROWS_PER_BATCH = 64


@dataclass(frozen=True, slots=True)
class _Row:
    prompt: int
    sample: int
    ids: tuple[int, ...]


class HuggingFaceEngine:
    """Samples from a model in place, in evaluation mode; its previous mode is restored afterwards."""

    def __init__(
        self,
        model: "LlamaForCausalLM | PeftModel",
        stop_ids: Sequence[int],
        pad_id: int,
        *,
        cache_gib: float = 1.0,
        rows_per_batch: int | None = None,
    ) -> None:
        """`cache_gib` bounds a batch's keys and values, but a batch always has at least one row."""
        self._model = without_wrapper(model)
        self._stop_ids = frozenset(stop_ids)
        self._pad_id = pad_id
        self._rows_per_batch = rows_per_batch or ROWS_PER_BATCH
        config = self._model.config
        heads = config.num_key_value_heads or config.num_attention_heads
        head_size = config.head_dim or config.hidden_size // config.num_attention_heads
        shape = CacheShape(config.num_hidden_layers, heads, head_size, self._model.dtype)
        self._tokens_per_batch = int(cache_gib * 2**30 / shape.bytes_per_token)

    @property
    def context(self) -> int:
        """The model's maximum number of positions, prompt and answer together."""
        return context_length(self._model.config)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples_per_prompt: int,
        sampling: Sampling,
        numbers: Sequence[int] | None = None,
        advance: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """As `LocalEngine.generate`."""
        numbers = numbers or range(len(prompts))
        check_prompts(prompts, numbers, context=self.context)
        rows = [
            _Row(number, sample, tuple(prompt))
            for number, prompt in zip(numbers, prompts, strict=True)
            for sample in range(samples_per_prompt)
        ]
        completions: dict[tuple[int, int], Completion] = {}
        with distributed.gathered(self._model), _generating(self._model):
            for batch in self._batches(rows, sampling.max_new_tokens):
                for row, completion in zip(batch, self._complete(batch, sampling, None), strict=True):
                    completions[row.prompt, row.sample] = completion
                if advance is not None:
                    advance(len(batch))
        return [[completions[number, sample] for sample in range(samples_per_prompt)] for number in numbers]

    def stream(self, prompt: Sequence[int], *, sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """As `LocalEngine.stream`."""
        check_prompts([prompt], [0], context=self.context)
        with _generating(self._model):
            return self._complete([_Row(0, 0, tuple(prompt))], sampling, on_token)[0]

    def refresh(self, model: "LlamaForCausalLM | PeftModel") -> None:
        """Sample from this model from now on, using its weights in place."""
        self._model = without_wrapper(model)

    def release(self) -> None:
        """Do nothing: no memory is kept."""

    def _batches(self, rows: Sequence[_Row], max_new_tokens: int) -> Iterator[list[_Row]]:
        """Batches of rows of similar length, longest first, so that running out of memory shows at once."""
        batch: list[_Row] = []
        for row in sorted(rows, key=lambda row: -len(row.ids)):
            if batch:
                longest = len(batch[0].ids)
                tokens = (len(batch) + 1) * min(longest + max_new_tokens, self.context)
                # A row that reaches the model's last position is only batched with rows that reach it too.
                is_cut_otherwise = longest + max_new_tokens > self.context and len(row.ids) != longest
                if len(batch) == self._rows_per_batch or tokens > self._tokens_per_batch or is_cut_otherwise:
                    yield batch
                    batch = []
            batch.append(row)
        if batch:
            yield batch

    def _complete(
        self, rows: Sequence[_Row], sampling: Sampling, on_token: Callable[[int], None] | None
    ) -> list[Completion]:
        from transformers import GenerationConfig

        longest = max(len(row.ids) for row in rows)
        new_tokens = min(sampling.max_new_tokens, self.context - longest)
        device = self._model.device
        ids_BP = torch.full((len(rows), longest), self._pad_id)
        mask_BP = torch.zeros((len(rows), longest), dtype=torch.long)
        for index, row in enumerate(rows):
            ids_BP[index, longest - len(row.ids) :] = torch.tensor(row.ids)
            mask_BP[index, longest - len(row.ids) :] = 1
        uniforms_BR = torch.stack(
            [row_uniforms(new_tokens, seed=sampling.seed, prompt=row.prompt, sample=row.sample) for row in rows]
        )
        chooser = _Chooser(sampling, uniforms_BR.to(device), on_token)
        generate = cast(Any, self._model).generate  # its types require subclasses where any callable works
        generate(
            input_ids=ids_BP.to(device),
            attention_mask=mask_BP.to(device),
            generation_config=GenerationConfig(
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                eos_token_id=sorted(self._stop_ids),
                pad_token_id=self._pad_id,
            ),
            logits_processor=[chooser],
        )
        ids_BR, logprobs_BR = torch.stack(chooser.ids, dim=1).tolist(), torch.stack(chooser.logprobs, dim=1).tolist()
        completions = []
        for ids, logprobs in zip(ids_BR, logprobs_BR, strict=True):
            # Up to the first stop id: later tokens were sampled while other rows continued.
            stop = next((index for index, token in enumerate(ids[:new_tokens]) if token in self._stop_ids), None)
            end = new_tokens if stop is None else stop + 1
            completions.append(Completion(tuple(ids[:end]), tuple(logprobs[:end]), is_finished=stop is not None))
        return completions


class _Chooser:
    """Logits processor for `generate`: chooses every row's token and stores its log-probability."""

    def __init__(self, sampling: Sampling, uniforms_BR: Tensor, on_token: Callable[[int], None] | None) -> None:
        self.ids: list[Tensor] = []
        self.logprobs: list[Tensor] = []
        self._sampling = sampling
        self._uniforms_BR = uniforms_BR
        self._on_token = on_token

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The parameters are named as in `generate`: all ids so far, and the logits [B, V] of the next token."""
        sampling = self._sampling
        logprobs_BV = sampling_logprobs(
            scores, temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k
        )
        if sampling.temperature == 0:
            ids_B = logprobs_BV.argmax(dim=-1)
        else:
            ids_B = draw(logprobs_BV, self._uniforms_BR[:, len(self.ids)])
        self.ids.append(ids_B)
        self.logprobs.append(logprobs_BV.gather(1, ids_B.unsqueeze(1)).squeeze(1))
        if self._on_token is not None:
            self._on_token(int(ids_B[0]))
        return torch.full_like(scores, float("-inf")).scatter(1, ids_B.unsqueeze(1), 0.0)


@contextmanager
def _generating(model: "LlamaForCausalLM") -> Iterator[None]:
    """Use evaluation mode and ignore the checkpoint's generation settings within the block; restore both afterwards."""
    from transformers import GenerationConfig

    suggested = model.generation_config
    model.generation_config = GenerationConfig()  # the source of defaults in `generate`
    try:
        with evaluating(model):
            yield
    finally:
        model.generation_config = suggested
