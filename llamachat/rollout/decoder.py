"""Our rollout engine for Llama models: a decoder with a key-value cache and continuous batching.

Each prompt is read once for all its samples. The longest prompts enter first, so that cached rows have similar lengths
and running out of memory shows at once. Random numbers depend on (seed, prompt, sample, position), as in the Hugging
Face engine: in fp32 both sample the same tokens, in any batch.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal
from weakref import ref

import torch

from llamachat.errors import ConfigError
from llamachat.memory.role_bytes import (
    PROMPT_TOKENS_AT_ONCE,
    SHARE_FOR_CACHE,
    SHARE_FOR_DECODER,
    SPARE_COLUMNS,
    cache_budget,
    reading_bytes,
)
from llamachat.models.loading import context_length, free_bytes, rope_parameters
from llamachat.rollout.cache import Cache
from llamachat.rollout.engine import Completion, Sampling, check_prompts, evaluating
from llamachat.rollout.graphs import Capture, CudaCapture, Recordings
from llamachat.rollout.live_rows import Done, Group, LiveRows
from llamachat.rollout.network import ROPE_TYPES, Network
from llamachat.rollout.weights import Weights, base_layer, merged_copy_bytes, without_wrapper

if TYPE_CHECKING:
    from llamachat.models.loading import LanguageModel

ROWS_PER_BATCH = {"cpu": 80, "cuda": 512}
PROJECTIONS = ("Linear", "Linear4bit")
ENTER_SHARE = 8  # prompts enter when at least one in this many slots is free


_keepers: "list[ref[LlamaEngine]]" = []  # at most one engine keeps its cache, since there is room for only one


class LlamaEngine:
    """Samples with its own copy of the weights, taken from the model at construction and by `refresh`."""

    def __init__(
        self,
        model: "LanguageModel",
        stop_ids: Sequence[int],
        *,
        cache_gib: float | Literal["auto"] = "auto",
        rows_per_batch: int | None = None,
        is_merged: bool | None = None,
        capture: Capture | None = None,
    ) -> None:
        """With `is_merged` None, merge a copy of the projections if it fits.

        `capture` records the decode step; None uses CUDA graphs on a GPU and no recording elsewhere.
        """
        self._trunk = without_wrapper(model)
        device = self._trunk.device
        if is_merged is None:
            is_merged = merged_copy_bytes(model) <= SHARE_FOR_DECODER * free_bytes(device)
        self._network = Network(self._trunk, Weights(model, is_merged=is_merged))
        if capture is None and device.type == "cuda" and self._network.weights.can_be_recorded:
            capture = CudaCapture()
        self._capture = capture
        self._stop_ids = frozenset(stop_ids)
        self._cache_gib = cache_gib
        self._rows_per_batch = rows_per_batch or ROWS_PER_BATCH.get(device.type, ROWS_PER_BATCH["cpu"])
        self._prompt_tokens = PROMPT_TOKENS_AT_ONCE.get(device.type, PROMPT_TOKENS_AT_ONCE["cpu"])
        # The batch of recorded steps: a recording reads and writes its tensors, and is reused by later calls.
        self._batch: LiveRows | None = None
        self._is_whole_budget = False  # whether its cache uses all the available memory

    @property
    def context(self) -> int:
        """The model's maximum number of positions, prompt and answer together."""
        return context_length(self._trunk.config)

    def refresh(self, model: "LanguageModel") -> None:
        """Copy the model's current weights; it must have the shape that the engine was created for."""
        if self._network.weights.refresh(model):
            self.release()

    def release(self) -> None:
        """As `LocalEngine.release`: the cache and recordings, which are kept if steps are recorded."""
        self._batch = None

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
        completions: dict[tuple[int, int], Completion] = {}
        for done in self._run(prompts, numbers, samples_per_prompt, sampling, None):
            for answer in done:
                completions[answer.prompt, answer.sample] = answer.completion
            if advance is not None and done:
                advance(len(done))
        return [[completions[number, sample] for sample in range(samples_per_prompt)] for number in numbers]

    def stream(self, prompt: Sequence[int], *, sampling: Sampling, on_token: Callable[[int], None]) -> Completion:
        """As `LocalEngine.stream`."""
        return next(done[0].completion for done in self._run([prompt], [0], 1, sampling, on_token) if done)

    @torch.inference_mode()
    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        samples_per_prompt: int,
        sampling: Sampling,
        on_token: Callable[[int], None] | None,
    ) -> Iterator[list[Done]]:
        check_prompts(prompts, numbers, context=self.context)
        if not prompts:
            return
        batch, waiting = self._begin(prompts, numbers, samples_per_prompt, sampling, on_token)
        with evaluating(self._trunk):
            while waiting or batch.live:
                # Prefilling a few prompts at a time costs more than leaving the slots idle.
                enough = max(len(waiting[0].samples), batch.cache.rows // ENTER_SHARE) if waiting else 0
                if waiting and (batch.free >= enough or batch.live == 0):
                    yield batch.enter(self._next_groups(batch, waiting))
                    continue
                if batch.is_full:
                    batch.lay_out(waiting[0] if waiting else None)
                yield batch.step()

    def _begin(
        self,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        samples_per_prompt: int,
        sampling: Sampling,
        on_token: Callable[[int], None] | None,
    ) -> tuple[LiveRows, deque[Group]]:
        """An empty batch and the groups waiting for it, longest prompts first."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        longest = min(len(prompts[order[0]]) + sampling.max_new_tokens, self.context)
        most = min(self._rows_per_batch, len(prompts) * samples_per_prompt)
        batch = self._batch_for(sampling, rows=most, longest=longest, prompt_tokens=sum(map(len, prompts)))
        tokens = batch.cache.tokens
        if tokens < longest:
            needed = longest * self._network.shape.bytes_per_token / 2**30
            budget = "what is free" if self._cache_gib == "auto" else f"{self._cache_gib} GiB"
            raise ConfigError(
                f"rollout.cache_gib: {budget} holds {tokens} tokens of keys and values, but prompt {numbers[order[0]] + 1} "
                f"({len(prompts[order[0]])} tokens) and its answer are up to {longest}. A row stays in the cache until its "
                f"answer ends. Set at least {needed:.2g}, or shorten prompts or rollout.max_new_tokens."
            )
        rows = min(most, tokens // longest)
        waiting = deque(
            Group(numbers[index], tuple(prompts[index]), range(start, min(start + rows, samples_per_prompt)))
            for index in order
            for start in range(0, samples_per_prompt, rows)
        )
        batch.start(sampling, rows=most, on_token=on_token)
        batch.lay_out(waiting[0])
        return batch, waiting

    def _batch_for(self, sampling: Sampling, *, rows: int, longest: int, prompt_tokens: int) -> LiveRows:
        """A batch for rows of up to `longest` tokens; the kept one if its recordings fit and no more memory is free."""
        full_size = rows * (longest + SPARE_COLUMNS)
        if self._batch is not None and self._batch.can_repeat(sampling):
            size = self._batch.cache.tokens
            if size >= full_size or (self._is_whole_budget and size >= longest):
                return self._batch
        self.release()
        for keeper in _keepers:
            if (engine := keeper()) is not None:
                engine.release()
        if self._network.device.type == "cuda":
            torch.cuda.empty_cache()  # cached blocks of other sizes
        budget = self._cache_tokens(prompt_tokens)
        is_recorded = self._capture is not None
        cache = Cache(
            self._network.shape, tokens=min(budget, full_size), device=self._network.device, is_recorded=is_recorded
        )
        batch = LiveRows(
            self._network,
            cache,
            sampling,
            rows=self._rows_per_batch if is_recorded else rows,
            stop_ids=self._stop_ids,
            recordings=None if self._capture is None else Recordings(self._capture),
        )
        if is_recorded:
            self._batch, self._is_whole_budget = batch, budget < full_size
            _keepers[:] = [ref(self)]
        return batch

    def _next_groups(self, batch: LiveRows, waiting: deque[Group]) -> list[Group]:
        """The next waiting groups that fit into the free slots and the token limit of one prefill."""
        if batch.live == 0:
            batch.lay_out(waiting[0])
        free, longest = batch.free, len(waiting[0].ids)
        groups: list[Group] = []
        while waiting and len(waiting[0].samples) <= free:
            if groups and (len(groups) + 1) * longest > self._prompt_tokens:
                break
            free -= len(waiting[0].samples)
            groups.append(waiting.popleft())
        return groups

    def _cache_tokens(self, prompt_tokens: int) -> int:
        """Tokens that the cache has room for in addition to prefilling this many prompt tokens at once."""
        device, config = self._network.device, self._trunk.config
        if not isinstance(self._cache_gib, str):
            size = self._cache_gib * 2**30
        elif device.type == "cuda":
            tokens = min(prompt_tokens, self._prompt_tokens)
            shape, weights = self._network.shape, self._network.weights
            key_value = shape.heads * shape.head_size
            query = key_value * config.num_attention_heads // shape.heads
            sizes = (config.hidden_size, query, key_value, config.intermediate_size)
            reading = reading_bytes(tokens, *sizes, width=weights.dtype.itemsize, is_4bit=weights.is_4bit)
            size = cache_budget(free_bytes(device), reading)
        else:
            size = SHARE_FOR_CACHE["cpu"] * free_bytes(device)
        return max(0, int(size / self._network.shape.bytes_per_token))


def unsupported(model: "LanguageModel") -> str | None:
    """The first property of the model that our decoder does not support, or None."""
    return next(_reasons(model), None)


def _reasons(model: "LanguageModel") -> Iterator[str]:
    trunk = without_wrapper(model)
    config = trunk.config
    if config.model_type != "llama" or config.hidden_act != "silu":
        yield f"the architecture '{config.model_type}' with '{config.hidden_act}'"
        return
    rope = rope_parameters(config)
    if rope["rope_type"] not in ROPE_TYPES or rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"rotary positions of type '{rope['rope_type']}'"
    for name, adapter in getattr(model, "peft_config", {}).items():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind != "LORA":
            yield f"the adapter '{name}' of type {kind}"
    places = {str(weight.device) for weight in trunk.parameters()}
    if len(places) > 1:
        yield f"weights on {len(places)} devices"
    for name, module in trunk.named_modules():
        if name.endswith(("_proj", "embed_tokens", "lm_head")):  # modules with matrix weights
            yield from (f"{reason} at {name}" for reason in _odd(module))


def _odd(module: Any) -> Iterator[str]:
    layer = base_layer(module)
    if type(layer).__name__ not in (*PROJECTIONS, "Embedding"):
        yield f"a {type(layer).__name__}"
    if layer is module:
        return
    if not hasattr(module, "lora_A") or len(getattr(module, "lora_embedding_A", ())):
        yield f"a {type(module).__name__} with an adapter"
        return
    for name in module.active_adapters:
        if name in module.lora_A and (module.use_dora.get(name) or module.lora_B[name].bias is not None):
            yield "an adapter with DoRA or a bias"
