"""Keys and values of the rows that are being answered, in one pool taken once.

Shapes: B rows, H key-value heads, D head size, T columns. All rows end at the same column, the next to be written: a
token's keys are one slice, whatever the rows' lengths; a row begins at its own column, and what lies before it is
masked. Keys lie with the columns last, since the product with the queries then reads them in the order of its inner
loop (three times as fast in bf16 on a CPU). When the columns run out, the rows move back to the first ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What one token takes, and how many fit."""

    layers: int
    heads: int
    head_size: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers."""
        return 2 * self.layers * self.heads * self.head_size * self.dtype.itemsize


class Cache:
    """`rows` x `columns` tokens laid out in a pool; both may change with `move`."""

    def __init__(self, shape: CacheShape, *, rows: int, columns: int, device: torch.device) -> None:
        self.rows, self.columns = rows, columns
        self.time = 0  # the column that is written next
        self._shape = shape
        size = rows * columns * shape.heads * shape.head_size
        # Zeros, not what memory held: a masked weight of 0 times a NaN would be a NaN.
        self._pools = [torch.zeros((2, size), dtype=shape.dtype, device=device) for _ in range(shape.layers)]
        self._lay_out()

    @property
    def tokens(self) -> int:
        """What the pool holds."""
        return self._pools[0].shape[1] // (self._shape.heads * self._shape.head_size)

    def keys(self, layer: int) -> Tensor:
        """Keys [B, H, D, T]."""
        return self._keys[layer]

    def values(self, layer: int) -> Tensor:
        """Values [B, H, T, D]."""
        return self._values[layer]

    def write(self, layer: int, keys_BHD: Tensor, values_BHD: Tensor) -> None:
        """Put a token's keys and values of the first rows at the present column."""
        count = len(keys_BHD)
        self._keys[layer][:count, :, :, self.time] = keys_BHD
        self._values[layer][:count, :, self.time] = values_BHD

    def write_prompts(self, layer: int, slots_B: Tensor, keys_BHTD: Tensor, values_BHTD: Tensor) -> None:
        """Put what rows begin with before the present column."""
        before = slice(self.time - keys_BHTD.shape[2], self.time)
        self._keys[layer][slots_B, :, :, before] = keys_BHTD.transpose(2, 3)
        self._values[layer][slots_B, :, before] = values_BHTD

    def move(self, source_B: Tensor, *, length: int, rows: int, columns: int) -> None:
        """Lay the pool out anew: first the rows of these slots with their last `length` tokens, from column 0 on."""
        assert rows * columns * self._shape.heads * self._shape.head_size <= self._pools[0].shape[1]
        kept = slice(self.time - length, self.time)
        count = len(source_B)
        self.rows, self.columns = rows, columns
        old_keys, old_values = self._keys, self._values
        self._lay_out()
        for layer in range(self._shape.layers):
            keys, values = old_keys[layer][..., kept][source_B], old_values[layer][:, :, kept][source_B]
            self._keys[layer][:count, :, :, :length] = keys
            self._values[layer][:count, :, :length] = values
        self.time = length

    def fill_slots(self, source_B: Tensor, slots_B: Tensor, *, length: int) -> None:
        """Copy rows, with their last `length` tokens, into other slots."""
        kept = slice(self.time - length, self.time)
        for keys, values in zip(self._keys, self._values, strict=True):
            keys[slots_B, :, :, kept] = keys[..., kept][source_B]
            values[slots_B, :, kept] = values[:, :, kept][source_B]

    def _lay_out(self) -> None:
        heads, size = self._shape.heads, self._shape.head_size
        used = self.rows * heads * size * self.columns
        self._keys = [pool[0, :used].view(self.rows, heads, size, self.columns) for pool in self._pools]
        self._values = [pool[1, :used].view(self.rows, heads, self.columns, size) for pool in self._pools]
