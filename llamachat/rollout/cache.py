"""Key-value cache of the rows being sampled, allocated once as a pool.

Shapes: B rows, H key-value heads, T columns, D head size. All rows end at the same column, the next to be written, so
that a token's keys are one slice whatever the rows' lengths; each row starts at its own column.
Products cover all columns of the layout, since a batched product over some of them would first copy these. So the
layout is kept narrow, with a few spare columns; when these are used up, the rows move to a new layout.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def rounded_up(count: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-count // multiple) * multiple


def on_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy host numbers to the device; on a GPU without making the host wait."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The dimensions of a cached token."""

    layers: int
    heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a token's keys and values in all layers."""
        return 2 * self.layers * self.heads * self.head_size * self.dtype.itemsize


class Cache:
    """A pool of `tokens`, laid out as rows x columns."""

    def __init__(self, shape: CacheShape, *, tokens: int, device: torch.device, is_recorded: bool = False) -> None:
        """With `is_recorded`, `write` reads the current column from a tensor, as recorded steps require."""
        self.tokens = tokens
        self.rows = self.columns = 0
        self.time = 0  # the next column to write
        self.time_1 = torch.zeros(1, dtype=torch.long, device=device) if is_recorded else None
        self._shape = shape
        # Zeros, not uninitialized memory: an attention weight of 0 times NaN would be NaN.
        size = (2, tokens * shape.heads * shape.head_size)
        self._pools = [_zeros(size, shape.dtype, device) for _ in range(shape.layers)]
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def clear(self) -> None:
        """Discard all rows and the layout."""
        self.rows = self.columns = 0
        self._keys, self._values = [], []
        self._set_time(0)

    def keys(self, layer: int, rows: int) -> Tensor:
        """Keys [B * H, T, D] of the first rows."""
        return self._keys[layer][:rows].flatten(0, 1)

    def values(self, layer: int, rows: int) -> Tensor:
        """Values [B * H, T, D] of the first rows."""
        return self._values[layer][:rows].flatten(0, 1)

    def write(self, layer: int, keys_BHD: Tensor, values_BHD: Tensor) -> None:
        """Write a token's keys and values of the first rows to the current column."""
        rows = len(keys_BHD)
        for part, written_BHD in ((self._keys[layer], keys_BHD), (self._values[layer], values_BHD)):
            if self.time_1 is None:  # twice as fast as the other branch on a CPU
                part[:rows, :, self.time] = written_BHD
            else:
                part[:rows].index_copy_(2, self.time_1, written_BHD.unsqueeze(2))

    def to_next_column(self) -> None:
        """Advance all rows to the next column."""
        self._set_time(self.time + 1)

    def write_prompts(self, layer: int, slots_B: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
        """Write the keys and values of prompts to these slots, ending before the current column."""
        before = slice(self.time - keys_BHTD.shape[2], self.time)
        self._keys[layer][slots_B, :, before] = keys_BHTD
        self._values[layer][slots_B, :, before] = values_BHTD

    def lay_out(self, source_B: Tensor, *, length: int, rows: int, columns: int) -> None:
        """Change the layout: the rows in `source_B` become the first ones and keep their last `length` tokens."""
        assert rows * columns <= self.tokens and len(source_B) <= rows and length <= columns
        span = slice(self.time - length, self.time)
        count = len(source_B)
        old = list(zip(self._keys, self._values, strict=True))
        self.rows, self.columns = rows, columns
        self._set_time(length)
        shape = (rows, self._shape.heads, columns, self._shape.head_size)
        used = rows * columns * self._shape.heads * self._shape.head_size
        self._keys = [pool[0, :used].view(shape) for pool in self._pools]
        self._values = [pool[1, :used].view(shape) for pool in self._pools]
        for layer, parts in enumerate(old if count else ()):
            keys, values = (part[source_B, :, span] for part in parts)  # copies, since source and target overlap
            self._keys[layer][:count, :, :length] = keys
            self._values[layer][:count, :, :length] = values

    def _set_time(self, time: int) -> None:
        self.time = time
        if self.time_1 is not None:
            self.time_1.fill_(time)

    def copy_rows(self, source_B: Tensor, slots_B: Tensor, *, length: int) -> None:
        """Copy rows with their last `length` tokens to other slots."""
        span = slice(self.time - length, self.time)
        for part in (*self._keys, *self._values):
            part[slots_B, :, span] = part[source_B, :, span]


def _zeros(size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    # The system allocates zero pages on first write; most of a pool sized for the longest answers is never written.
    return torch.from_numpy(np.zeros((size[0], size[1] * dtype.itemsize), dtype=np.uint8)).view(dtype)
