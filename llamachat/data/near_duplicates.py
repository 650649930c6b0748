"""Near-duplicate records: dialogs generated from one template, or questions that differ in one word.

Two records are near-duplicates if at least 70% of their word trigrams (without case, punctuation and system texts) are
the same. The measure is the Jaccard similarity of the two sets, as in Lee et al. 2022 (arXiv:2107.06499), who use
5-grams and 80% for texts longer than chats. Trigrams and 70% are ours. A long record is represented by its 128 smallest
hashes (bottom-k sketch, Broder 1997), which bounds memory.

Two similar sets share one of their rarest members, so only records that do are compared (prefix filter, Bayardo et al.
2007).
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias
from zlib import crc32

from llamachat.data.records import Preference, Record, messages_of

WORDS = 3  # words in an n-gram
SIMILARITY = 0.7
LARGEST_SKETCH = 128

if TYPE_CHECKING:
    import numpy as np

Sketch: TypeAlias = "np.ndarray"  # uint64 [at most LARGEST_SKETCH], hashes of the n-grams, ascending

_WORD = re.compile(r"\w+")
_MULTIPLIERS = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)


def sketch_of(record: Record) -> Sketch:
    """The hashes of the word n-grams in the user turns and answers; of a pair, only the chosen answer."""
    import numpy as np  # imported here so that --help and errors appear immediately

    texts = [message.content for message in messages_of(record) if message.role != "system"]
    texts += [record.chosen.content] if isinstance(record, Preference) else []
    words = _WORD.findall("\n".join(texts).casefold())
    words += [""] * (WORDS - len(words))
    ids = np.fromiter((crc32(word.encode(errors="replace")) for word in words), np.uint64, len(words))
    count = len(ids) - WORDS + 1
    hashes = np.zeros(count, np.uint64)
    for place, multiplier in enumerate(_MULTIPLIERS):
        hashes = (hashes ^ ids[place : place + count]) * np.uint64(multiplier)
        hashes ^= hashes >> np.uint64(29)
    return np.unique(hashes)[:LARGEST_SKETCH]


def similarity(one: Sketch, other: Sketch) -> float:
    """The Jaccard similarity of two records: exact if both are short, else estimated from their sketches."""
    import numpy as np

    both = np.union1d(one, other)
    if LARGEST_SKETCH in (len(one), len(other)):
        both = both[:LARGEST_SKETCH]
    shared = np.intersect1d(one, other, assume_unique=True)
    return float(np.isin(both, shared, assume_unique=True).mean())


class NearIndex:
    """An index that finds near-duplicates among the records added so far."""

    def __init__(self, sketches: Sequence[Sketch]) -> None:
        import numpy as np

        self._sketches = sketches
        members = np.concatenate([np.empty(0, np.uint64), *sketches])
        self._values, self._counts = np.unique(members, return_counts=True)
        self._by_member: dict[int, list[int]] = {}

    def add(self, index: int) -> None:
        """Add a record, so that later ones are compared with it."""
        for member in self._rarest(index):
            self._by_member.setdefault(member, []).append(index)

    def find(self, index: int) -> int | None:
        """The index of an added near-duplicate, or None."""
        sketch = self._sketches[index]
        compared: set[int] = set()
        for member in self._rarest(index):
            for other in self._by_member.get(member, ()):
                if other not in compared and similarity(sketch, self._sketches[other]) >= SIMILARITY:
                    return other
                compared.add(other)
        return None

    def _rarest(self, index: int) -> list[int]:
        """The rarest members; two sketches with none of these in common are below the threshold."""
        import numpy as np

        sketch = self._sketches[index]
        count = len(sketch) - math.ceil(SIMILARITY * len(sketch)) + 1
        order = np.argsort(self._counts[np.searchsorted(self._values, sketch)], kind="stable")
        return sketch[order][:count].tolist()
