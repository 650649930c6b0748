"""The rows that are being answered: who sits in which slot of the cache, what was drawn, who is done.

Shapes: B slots, R tokens of an answer. Rows finish at different times: their slots go to waiting prompts, or to the
rows of the last slots, so that the first slots stay full and a step computes little for nobody.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamachat.rollout.cache import Cache
from llamachat.rollout.engine import Completion, Sampling
from llamachat.rollout.network import Network
from llamachat.rollout.sampling import choose, row_uniforms


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one prompt that enter together: one reading of the prompt serves them all."""

    prompt: int
    ids: tuple[int, ...]
    samples: range


@dataclass(frozen=True, slots=True)
class Done:
    """An answer, and whose it is."""

    prompt: int
    sample: int
    completion: Completion


@dataclass(frozen=True, slots=True)
class _Owner:
    """The row that sits in a slot."""

    prompt: int
    sample: int
    whole: int  # tokens of its prompt and its longest answer


class LiveRows:
    """The batch that a generation goes through with."""

    def __init__(
        self,
        network: Network,
        cache: Cache,
        sampling: Sampling,
        *,
        rows: int,
        stop_ids: frozenset[int],
        on_token: Callable[[int], None] | None,
    ) -> None:
        """`rows` is the most that there are ever at once; `on_token` sees the ids of the first slot."""
        self.cache, self.most = cache, rows
        self._network, self._sampling = network, sampling
        self._stop_ids, self._on_token = stop_ids, on_token
        device, width = network.device, sampling.max_new_tokens + 1  # one more: where finished rows write
        self._is_stop_V = torch.zeros(network.vocabulary, dtype=torch.bool, device=device)
        self._is_stop_V[sorted(stop_ids)] = True
        self._owners: list[_Owner | None] = [None] * rows
        self._starts = [0] * rows  # the first column of each row
        # Of each slot: the row's first column, its last token, how many it has, how many it may have.
        self._starts_B, self._last_B, self._counts_B, self._limits_B = (
            torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4)
        )
        self._uniforms_BR = torch.zeros((rows, width), dtype=torch.float64, device=device)
        self._ids_BR = torch.zeros((rows, width), dtype=torch.long, device=device)
        self._logprobs_BR = torch.zeros((rows, width), device=device)
        self._used = 0  # slots from the first on that a step computes

    @property
    def live(self) -> int:
        """Rows that are not done."""
        return sum(owner is not None for owner in self._owners[: self._used])

    @property
    def longest_whole(self) -> int:
        """Tokens that the longest of the live rows may come to."""
        return max((owner.whole for owner in self._owners if owner is not None), default=0)

    @property
    def idle(self) -> int:
        """Slots that a step computes for nobody."""
        return self._used - self.live

    @property
    def free(self) -> int:
        """Slots that rows may enter."""
        return self.cache.rows - self.live

    def enter(self, groups: Sequence[Group]) -> list[Done]:
        """Read prompts and draw the first token of their rows; the prompts are no longer than any that is live."""
        if self.live == 0:
            self._used = 0
            self.cache.time = max(len(group.ids) for group in groups)
        free = (slot for slot in range(self.cache.rows) if slot >= self._used or self._owners[slot] is None)
        taken = [[next(free) for _ in group.samples] for group in groups]
        logits_NV = self._network.prefill([group.ids for group in groups], self.cache, taken)
        for group, slots in zip(groups, taken, strict=True):
            self._seat(group, slots)
        slots_B = torch.tensor([slot for slots in taken for slot in slots], device=self._network.device)
        owners_B = torch.tensor([index for index, slots in enumerate(taken) for _ in slots], device=slots_B.device)
        self._used = max(self._used, int(slots_B.max()) + 1)
        return self._draw(logits_NV[owners_B], slots_B)

    def step(self) -> list[Done]:
        """One more token for every live row."""
        used, time = self._used, self.cache.time
        first = self._first()
        starts_B = self._starts_B[:used]
        positions_B = (time - starts_B).clamp(max=self._network.rotation.context - 1)
        logits_BV = self._network.step(
            self._last_B[:used], positions_B, self.cache, first=first, mask_B1T=self._mask(first)
        )
        self.cache.time += 1
        return self._draw(logits_BV, torch.arange(used, device=starts_B.device))

    def close_gaps(self) -> None:
        """Rows of the last slots take the idle ones before them."""
        live = self.live
        holes = [slot for slot in range(live) if self._owners[slot] is None]
        movers = [slot for slot in range(live, self._used) if self._owners[slot] is not None]
        self._used = live
        if movers:
            length = self.cache.time - min(self._starts[slot] for slot in movers)
            slots_B, source_B = (torch.tensor(part, device=self._network.device) for part in (holes, movers))
            self.cache.fill_slots(source_B, slots_B, length=length)
            self._reseat(movers, holes)

    def move_back(self, *, rows: int, columns: int) -> None:
        """All live rows to the first columns and slots of a cache of this layout."""
        movers = [slot for slot in range(self._used) if self._owners[slot] is not None]
        shift = self._first()
        source_B = torch.tensor(movers, device=self._network.device)
        self.cache.move(source_B, length=self.cache.time - shift, rows=rows, columns=columns)
        self._reseat(movers, range(len(movers)))
        self._used = len(movers)
        self._starts_B -= shift
        self._starts = [start - shift for start in self._starts]

    def _first(self) -> int:
        return min(self._starts[slot] for slot in range(self._used) if self._owners[slot] is not None)

    def _seat(self, group: Group, slots: Sequence[int]) -> None:
        start = self.cache.time - len(group.ids)
        limit = min(self._sampling.max_new_tokens, self._network.rotation.context - len(group.ids))
        for slot, sample in zip(slots, group.samples, strict=True):
            self._owners[slot], self._starts[slot] = _Owner(group.prompt, sample, len(group.ids) + limit), start
            uniforms_R = row_uniforms(limit, seed=self._sampling.seed, prompt=group.prompt, sample=sample)
            self._uniforms_BR[slot, :limit] = uniforms_R.to(self._uniforms_BR.device)
        slots_B = torch.tensor(slots, device=self._starts_B.device)
        self._starts_B[slots_B], self._limits_B[slots_B], self._counts_B[slots_B] = start, limit, 0

    def _reseat(self, source: Sequence[int], slots: Sequence[int]) -> None:
        source_B, slots_B = (torch.tensor(list(part), device=self._starts_B.device) for part in (source, slots))
        for state in (
            self._starts_B,
            self._last_B,
            self._counts_B,
            self._limits_B,
            self._uniforms_BR,
            self._ids_BR,
            self._logprobs_BR,
        ):
            state[slots_B] = state[source_B]
        owners, starts = [self._owners[slot] for slot in source], [self._starts[slot] for slot in source]
        for slot in source:
            self._owners[slot] = None
        for slot, owner, start in zip(slots, owners, starts, strict=True):
            self._owners[slot], self._starts[slot] = owner, start

    def _mask(self, first: int) -> Tensor | None:
        """-inf [B, 1, T] on columns before a row's first; None where all rows begin together."""
        starts = self._starts[: self._used]
        if max(starts) <= first:
            return None
        columns_T = torch.arange(first, self.cache.time + 1, device=self._starts_B.device)
        is_before_B1T = (columns_T < self._starts_B[: self._used, None]).unsqueeze(1)
        shape = self._network.attention_dtype
        return torch.zeros(is_before_B1T.shape, dtype=shape, device=columns_T.device).masked_fill_(
            is_before_B1T, float("-inf")
        )

    def _draw(self, logits_BV: Tensor, slots_B: Tensor) -> list[Done]:
        counts_B1 = self._counts_B[slots_B].clamp(max=self._sampling.max_new_tokens).unsqueeze(1)
        uniforms_B = self._uniforms_BR[slots_B].gather(1, counts_B1).squeeze(1)
        ids_B, logprobs_B = choose(
            logits_BV, uniforms_B, temperature=self._sampling.temperature, top_p=self._sampling.top_p
        )
        self._last_B[slots_B] = ids_B
        self._ids_BR[slots_B, counts_B1.squeeze(1)] = ids_B
        self._logprobs_BR[slots_B, counts_B1.squeeze(1)] = logprobs_B
        self._counts_B[slots_B] += 1
        if self._on_token is not None:
            self._on_token(int(ids_B[0]))
        is_done_B = self._is_stop_V[ids_B] | (self._counts_B[slots_B] >= self._limits_B[slots_B])
        return self._take([slot for slot in slots_B[is_done_B].tolist() if self._owners[slot] is not None])

    def _take(self, slots: Sequence[int]) -> list[Done]:
        """The answers of these slots, which are free then."""
        if not slots:
            return []
        slots_B = torch.tensor(slots, device=self._ids_BR.device)
        counts = self._counts_B[slots_B].tolist()
        width = max(counts)
        found: list[Done] = []
        for slot, count, ids, logprobs in zip(
            slots,
            counts,
            self._ids_BR[slots_B, :width].tolist(),
            self._logprobs_BR[slots_B, :width].tolist(),
            strict=True,
        ):
            owner = self._owners[slot]
            assert owner is not None, "only live rows end"
            completion = Completion(
                tuple(ids[:count]), tuple(logprobs[:count]), is_finished=ids[count - 1] in self._stop_ids
            )
            found.append(Done(owner.prompt, owner.sample, completion))
            self._owners[slot] = None
        return found
