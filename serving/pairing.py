"""Who answers which prompt, and which answer is shown first: dealt out evenly, by hashes of seed and prompt.

Llama 2 (arXiv:2307.09288), section 3.2.1: the two answers come from two different variants of the model, at varied
temperatures. How these are paired is ours. The deal depends on the seed and on which prompts there are, not on their order.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product


@dataclass(frozen=True, slots=True)
class Speaker:
    """Who gives an answer: the number of a policy, and the temperature that it is sampled at."""

    policy: int
    temperature: float


@dataclass(frozen=True, slots=True)
class Pairing:
    """The two that answer one prompt, in the order in which their answers are shown."""

    a: Speaker
    b: Speaker


def deal_pairings(keys: Sequence[str], *, num_policies: int, temperatures: Sequence[float], seed: int) -> list[Pairing]:
    """A pairing for each prompt (given by a text that tells it from others).

    Each pair of policies gets as many prompts as the others, of these each pair of temperatures as many as the others, and
    of these each side is first in half: all to within one.
    """
    matches = list(combinations(range(num_policies), 2)) or [(0, 0)]
    if num_policies > 1:
        mixes = list(product(temperatures, repeat=2))
    else:
        mixes = list(combinations(temperatures, 2)) or [(temperatures[0], temperatures[0])]
    everyone = range(len(keys))
    match_of = _dealt(ranked(everyone, keys, f"{seed} policies"), len(matches))
    # Dealt along one row that is sorted by what was dealt before: each stretch of it gets equal shares.
    by_match = sorted(ranked(everyone, keys, f"{seed} temperatures"), key=lambda index: match_of[index])
    mix_of = _dealt(by_match, len(mixes))
    by_both = sorted(ranked(everyone, keys, f"{seed} sides"), key=lambda index: (match_of[index], mix_of[index]))
    side_of = _dealt(by_both, 2)
    found = []
    for index in everyone:
        first, second = map(Speaker, matches[match_of[index]], mixes[mix_of[index]])
        found.append(Pairing(first, second) if side_of[index] == 0 else Pairing(second, first))
    return found


def ranked(indices: Sequence[int], keys: Sequence[str], salt: str) -> list[int]:
    """The indices in an order that hangs on their keys alone; prompts that are the same keep theirs."""
    return sorted(indices, key=lambda index: (digest(salt, keys[index]), index))


def digest(salt: str, text: str) -> str:
    """A hash in 16 hexadecimal digits, the same on every machine."""
    return hashlib.blake2b(f"{salt}\n{text}".encode(), digest_size=8).hexdigest()


def _dealt(order: Sequence[int], count: int) -> dict[int, int]:
    return {index: rank % count for rank, index in enumerate(order)}
