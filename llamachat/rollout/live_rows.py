"""The rows being sampled: their slots in the cache, their tokens so far, and which are done.

Shapes: B slots, R tokens of an answer. Rows finish at different times. A free slot is taken by a waiting prompt or by a
row from the last slots, so that the first slots stay full and a step computes few idle rows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llamachat.memory.role_bytes import SPARE_COLUMNS
from llamachat.rollout.cache import Cache, on_device, rounded_up
from llamachat.rollout.engine import Completion, Sampling
from llamachat.rollout.graphs import RECORDED_COLUMNS, Recordings, padded_rows
from llamachat.rollout.network import Network
from llamachat.rollout.sampling import choose, row_uniforms

# A CPU library compiles and caches a kernel for each shape of a product. So rows and columns are rounded up to these
# multiples: fewer kernels, less memory and less time.
ROWS_AT_ONCE = 16
COLUMNS_AT_ONCE = 32
IDLE_SHARE = 8  # idle slots are closed when they exceed one in this many live rows


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one prompt that enter together and share one prefill."""

    prompt: int  # the prompt's number
    ids: tuple[int, ...]
    samples: range


@dataclass(frozen=True, slots=True)
class Done:
    """A finished answer with its prompt and sample number."""

    prompt: int
    sample: int
    completion: Completion


@dataclass(frozen=True, slots=True)
class _Row:
    """The row in a slot."""

    prompt: int
    sample: int
    start: int  # its first column
    prompt_tokens: int
    max_tokens: int  # tokens of its prompt and its longest possible answer


class LiveRows:
    """The batch of live rows, reused by successive generations."""

    def __init__(
        self,
        network: Network,
        cache: Cache,
        sampling: Sampling,
        *,
        rows: int,
        stop_ids: frozenset[int],
        recordings: Recordings | None = None,
    ) -> None:
        """`rows` is the maximum number of slots of a generation."""
        self.cache, self.most = cache, rows
        self._recordings = recordings
        self._network, self._sampling = network, sampling
        self._stop_ids = stop_ids
        self._on_token: Callable[[int], None] | None = None
        device = network.device
        width = min(sampling.max_new_tokens, network.rotation.context) + 1  # the last column is for idle rows
        self._is_stop_V = torch.zeros(network.vocabulary, dtype=torch.bool, device=device)
        self._is_stop_V[sorted(stop_ids)] = True
        # One buffer for the masks of all layouts, since a replayed step reads it at a fixed address.
        self._mask_pool = torch.empty(cache.tokens, dtype=network.attention_dtype, device=device)
        self._rows: dict[int, _Row] = {}
        self._rows_B = torch.arange(rows, device=device)
        # For each slot: the row's first column, last token, token count and limit; its tokens; the random numbers that
        # sample them.
        self._starts_B, self._last_B, self._counts_B, self._limits_B = (
            torch.zeros_like(self._rows_B) for _ in range(4)
        )
        self._ids_BR = torch.zeros((rows, width), dtype=torch.long, device=device)
        self._logprobs_BR = torch.zeros((rows, width), device=device)
        self._uniforms_BR = torch.zeros((rows, width), dtype=torch.float64, device=device)

    def can_repeat(self, sampling: Sampling) -> bool:
        """Whether recorded steps sample as this generation requires; the seed is not part of a recording."""
        return replace(sampling, seed=self._sampling.seed) == self._sampling

    def start(self, sampling: Sampling, *, rows: int, on_token: Callable[[int], None] | None) -> None:
        """Start a generation with at most `rows` rows at once; `on_token` gets the ids of the first slot."""
        self._sampling, self.most, self._on_token = sampling, rows, on_token
        self._rows.clear()  # an interrupted generation may have left rows
        self.cache.clear()
        for state_B in (self._starts_B, self._last_B, self._counts_B, self._limits_B):
            state_B.zero_()

    @property
    def live(self) -> int:
        """The number of rows that are not done."""
        return len(self._rows)

    @property
    def free(self) -> int:
        """The number of free slots."""
        return self.cache.rows - self.live

    @property
    def is_full(self) -> bool:
        """Whether there is no column left for another token."""
        return self.cache.time == self.cache.columns

    def lay_out(self, waiting: Group | None) -> None:
        """Create a layout with room for more tokens of the live rows, in the first slots, and for as many as will fit.

        `waiting` is the longest group that will enter.
        """
        groups = [] if waiting is None else [waiting]
        sizes = [row.max_tokens for row in self._rows.values()] + [self._max_tokens(group) for group in groups]
        rows = min(self.most, self.cache.tokens // max(sizes))
        movers = sorted(self._rows)
        first = min((row.start for row in self._rows.values()), default=0)
        length = self.cache.time - first if movers or waiting is None else len(waiting.ids)
        columns = length + SPARE_COLUMNS
        columns = rounded_up(columns, COLUMNS_AT_ONCE if self._recordings is None else RECORDED_COLUMNS)
        columns = min(columns, self.cache.tokens // rows)
        self.cache.lay_out(self._tensor(movers), length=length, rows=rows, columns=columns)
        self._starts_B -= first
        self._rows = {slot: replace(row, start=row.start - first) for slot, row in self._rows.items()}
        self._move(movers, range(len(movers)))

    def enter(self, groups: Sequence[Group]) -> list[Done]:
        """Prefill prompts and sample the first token of their rows; no prompt may be longer than the live rows."""
        free = (slot for slot in range(self.cache.rows) if slot not in self._rows)
        slots_by_group = [[next(free) for _ in group.samples] for group in groups]
        logits_NV = self._network.prefill([group.ids for group in groups], self.cache, slots_by_group)
        for group, slots in zip(groups, slots_by_group, strict=True):
            self._occupy(group, slots)
        self._rebuild_mask()
        owners_B = self._tensor([index for index, slots in enumerate(slots_by_group) for _ in slots])
        slots_B = self._tensor([slot for slots in slots_by_group for slot in slots])
        return self._drawn(
            self._draw(logits_NV[owners_B], slots_B), [slot for slots in slots_by_group for slot in slots]
        )

    def step(self) -> list[Done]:
        """Sample one more token for every live row."""
        if (self._used - self.live) * IDLE_SHARE > self.live and self._computed(self.live) < self._computed(self._used):
            self._close_gaps()
        rows = self._computed(self._used)
        if self._recordings is None:
            is_done_B = self._advance(rows)
        else:
            # Rows and columns determine all addresses, since layouts start at the same ones.
            is_done_B = self._recordings.run((rows, self.cache.columns), lambda: self._advance(rows))
        self.cache.to_next_column()
        return self._drawn(is_done_B, range(rows))

    def _advance(self, rows: int) -> Tensor:
        """Sample a token for the first rows; return whether it is each row's last [B]. Depends only on tensors."""
        time, mask_B1T = self.cache.time_1, self._mask_B1T[:rows]
        if time is None:
            time = self.cache.time
            mask_B1T[:, :, time] = 0
        else:
            mask_B1T.index_fill_(2, time, 0)
        positions_B = (time - self._starts_B[:rows]).clamp(0, self._network.rotation.context - 1)
        logits_BV = self._network.step(self._last_B[:rows], positions_B, self.cache, mask_B1T)
        return self._draw(logits_BV, slice(rows))

    @property
    def _used(self) -> int:
        """The number of leading slots that a step must compute."""
        return max(self._rows, default=-1) + 1

    def _computed(self, used: int) -> int:
        """The number of rows that a step computes for `used` slots."""
        if self._recordings is not None:
            return padded_rows(used, self.cache.rows)
        return min(rounded_up(used, ROWS_AT_ONCE), self.cache.rows)

    def _close_gaps(self) -> None:
        """Move rows from the last slots to idle ones before them."""
        holes = [slot for slot in range(self.live) if slot not in self._rows]
        movers = [slot for slot in sorted(self._rows) if slot >= self.live]
        length = self.cache.time - min(self._rows[slot].start for slot in movers)
        self.cache.copy_rows(self._tensor(movers), self._tensor(holes), length=length)
        self._move(movers, holes)

    def _occupy(self, group: Group, slots: Sequence[int]) -> None:
        start, limit = self.cache.time - len(group.ids), self._max_tokens(group) - len(group.ids)
        uniforms_BR = torch.stack(
            [
                row_uniforms(limit, seed=self._sampling.seed, prompt=group.prompt, sample=sample)
                for sample in group.samples
            ]
        )
        slots_B = self._tensor(slots)
        self._uniforms_BR[slots_B, :limit] = on_device(uniforms_BR, slots_B.device)
        self._starts_B[slots_B], self._limits_B[slots_B], self._counts_B[slots_B] = start, limit, 0
        for slot, sample in zip(slots, group.samples, strict=True):
            self._rows[slot] = _Row(group.prompt, sample, start, len(group.ids), self._max_tokens(group))

    def _max_tokens(self, group: Group) -> int:
        return min(len(group.ids) + self._sampling.max_new_tokens, self._network.rotation.context)

    def _move(self, source: Sequence[int], slots: Sequence[int]) -> None:
        source_B, slots_B = self._tensor(source), self._tensor(slots)
        state_B = (self._starts_B, self._last_B, self._counts_B, self._limits_B)
        for state in (*state_B, self._ids_BR, self._logprobs_BR, self._uniforms_BR):
            state[slots_B] = state[source_B]
        rows = [self._rows.pop(slot) for slot in source]
        self._rows |= dict(zip(slots, rows, strict=True))
        self._rebuild_mask()

    def _rebuild_mask(self) -> None:
        """Set the mask [B, 1, T]: 0 on a row's own columns, else -inf."""
        columns_T = torch.arange(self.cache.columns, device=self._starts_B.device)
        is_own_BT = (columns_T >= self._starts_B[: self.cache.rows, None]) & (columns_T < self.cache.time)
        mask_BT = self._mask_pool[: is_own_BT.numel()].view(is_own_BT.shape)
        self._mask_B1T = mask_BT.fill_(float("-inf")).masked_fill_(is_own_BT, 0).unsqueeze(1)

    def _tensor(self, numbers: Iterable[int]) -> Tensor:
        return on_device(torch.tensor(list(numbers), dtype=torch.long), self._network.device)

    def _draw(self, logits_BV: Tensor, slots_B: Tensor | slice) -> Tensor:
        """Sample the next token of these slots; return whether it is each row's last [B]."""
        counts_B = self._counts_B[slots_B].clamp(max=self._ids_BR.shape[1] - 1)  # idle rows keep counting
        uniforms_B = self._uniforms_BR[slots_B].gather(1, counts_B.unsqueeze(1)).squeeze(1)
        ids_B, logprobs_B = choose(
            logits_BV,
            uniforms_B,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            top_k=self._sampling.top_k,
        )
        rows_B = self._rows_B[slots_B]
        self._last_B[slots_B] = ids_B
        self._ids_BR[rows_B, counts_B] = ids_B
        self._logprobs_BR[rows_B, counts_B] = logprobs_B
        self._counts_B[slots_B] += 1
        return self._is_stop_V[ids_B] | (counts_B + 1 >= self._limits_B[slots_B])

    def _drawn(self, is_done_B: Tensor, slots: Sequence[int]) -> list[Done]:
        """Return the finished answers of these slots and free the slots.

        Synchronizes with the device once, and once more if there are answers.
        """
        if self._on_token is None:
            flags = is_done_B.tolist()
        else:
            flags, ids = torch.stack((is_done_B.long(), self._last_B[slots[0] : slots[-1] + 1])).tolist()
            self._on_token(ids[0])
        done = [slot for slot, is_done in zip(slots, flags, strict=True) if is_done and slot in self._rows]
        if not done:
            return []
        rows = [self._rows.pop(slot) for slot in done]
        counts = [self.cache.time - row.start - row.prompt_tokens + 1 for row in rows]
        done_B = self._tensor(done)
        tables = (table[done_B, : max(counts)].double() for table in (self._ids_BR, self._logprobs_BR))
        answers: list[Done] = []
        for row, count, ids, logprobs in zip(rows, counts, *torch.stack(tuple(tables)).tolist(), strict=True):
            token_ids = tuple(map(int, ids[:count]))
            is_finished = token_ids[-1] in self._stop_ids
            answers.append(Done(row.prompt, row.sample, Completion(token_ids, tuple(logprobs[:count]), is_finished)))
        return answers
