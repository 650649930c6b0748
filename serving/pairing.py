"""Who answers which prompt, and which answer is shown first: dealt out evenly, by hashes of seed and prompt.

Llama 2 (arXiv:2307.09288), section 3.2.1: the two answers come from two different variants of the model, at varied
temperatures. How these are paired is ours. The deal depends on the seed and on which prompts there are, not on their order.
"""

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import TypeVar

T = TypeVar("T", bound=Hashable)


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

    Each pair of policies gets as many prompts as the others, to within one; of these each pair of temperatures as many
    as the others, and each of the two policies stands first in half.
    """
    matches = list(combinations(range(num_policies), 2)) or [(0, 0)]
    if num_policies > 1:
        mixes = list(product(temperatures, repeat=2))
    else:
        mixes = list(combinations(temperatures, 2)) or [(temperatures[0], temperatures[0])]
    found: dict[int, Pairing] = {}
    match_of = _dealt(list(range(len(keys))), keys, matches, f"{seed} policies")
    for match in matches:
        own = [index for index in range(len(keys)) if match_of[index] == match]
        mix_of = _dealt(own, keys, mixes, f"{seed} temperatures")
        is_swapped_of = _dealt(own, keys, (False, True), f"{seed} sides")
        for index in own:
            first, second = map(Speaker, match, mix_of[index])
            found[index] = Pairing(second, first) if is_swapped_of[index] else Pairing(first, second)
    return [found[index] for index in range(len(keys))]


def ranked(indices: Sequence[int], keys: Sequence[str], salt: str) -> list[int]:
    """The indices in an order that hangs on their keys alone; prompts that are the same keep theirs."""
    return sorted(indices, key=lambda index: (digest(salt, keys[index]), index))


def digest(salt: str, text: str) -> str:
    """A hash in 16 hexadecimal digits, the same on every machine."""
    return hashlib.blake2b(f"{salt}\n{text}".encode(), digest_size=8).hexdigest()


def _dealt(indices: Sequence[int], keys: Sequence[str], options: Sequence[T], salt: str) -> dict[int, T]:
    return {index: options[rank % len(options)] for rank, index in enumerate(ranked(indices, keys, salt))}
