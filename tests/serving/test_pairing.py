"""Who answers which prompt, and which answer is shown first: even shares, and no part for the order of the prompts."""

from collections import Counter
from collections.abc import Sequence

from serving.pairs import Pairing, Speaker, deal_pairings


def test_policies_temperatures_and_sides_are_dealt_evenly() -> None:
    keys = [f"prompt {number}" for number in range(96)]
    found = deal_pairings(keys, num_policies=3, temperatures=(0.7, 1.0), seed=5)
    ordered = Counter((pairing.a.policy, pairing.b.policy) for pairing in found)
    # 3 pairs of policies get 32 prompts each, and each of two policies stands first in 16.
    assert ordered == {(a, b): 16 for a in range(3) for b in range(3) if a != b}
    low_first = [sorted((pairing.a, pairing.b), key=lambda speaker: speaker.policy) for pairing in found]
    mixes = Counter((x.policy, y.policy, x.temperature, y.temperature) for x, y in low_first)
    assert set(mixes.values()) == {8} and len(mixes) == 12
    uneven = deal_pairings(keys[:7], num_policies=2, temperatures=(0.7, 1.0, 1.3), seed=5)
    assert sorted(Counter(pairing.a.policy for pairing in uneven).values()) == [3, 4]


def test_one_policy_answers_at_two_temperatures_or_in_two_draws() -> None:
    found = deal_pairings([str(n) for n in range(60)], num_policies=1, temperatures=(0.5, 0.7, 1.0), seed=0)
    shown = Counter((pairing.a.temperature, pairing.b.temperature) for pairing in found)
    assert shown == {(a, b): 10 for a in (0.5, 0.7, 1.0) for b in (0.5, 0.7, 1.0) if a != b}
    speaker = Speaker(0, 1.0)
    assert deal_pairings(["x"], num_policies=1, temperatures=(1.0,), seed=0) == [Pairing(speaker, speaker)]


def test_the_deal_hangs_on_prompts_and_seed_and_not_on_order() -> None:
    keys = [f"prompt {number}" for number in range(50)]

    def dealt(order: Sequence[str], seed: int) -> dict[str, Pairing]:
        pairings = deal_pairings(order, num_policies=2, temperatures=(0.7, 1.0), seed=seed)
        return dict(zip(order, pairings, strict=True))

    assert dealt(keys, 1) == dealt(keys[::-1], 1) != dealt(keys, 2)
