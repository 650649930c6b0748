"""Reward against the number of answers, by temperature (Llama 2, arXiv:2307.09288, section 3.2.3, figures 7 and 8).

The best of N grows with N and the median does not. Rewards are combined scores in deviations of a starting policy's
answers to the test prompts. Shapes: N prompts, K answers to each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llamachat.answers.best_of_n import expected_best, expected_median
from llamachat.answers.desk import Desk
from llamachat.answers.groups import Group, Sampler, batches_of, sample_groups
from llamachat.data.prompts import EncodedPrompt
from llamachat.scoring.standardising import Constants

_FIRST_SEED = 500_000  # of these batches, past those of a round


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """What one policy's answers at one temperature are worth, by how many there are: entry n - 1 is for n of them."""

    policy: str  # the step that made it
    temperature: float
    best: list[float]
    best_low: list[float]  # 95% interval over prompts
    best_high: list[float]
    median: list[float]

    @property
    def reward(self) -> float:
        """Of the best of all K: what a temperature is chosen by."""
        return self.best[-1]

    def to_plain(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> "Curve":
        return Curve(**values)


def curve_of(groups: Sequence[Group], *, policy: str, temperature: float) -> Curve:
    """The curve of these prompts' answers; answers that could not win rank below all others."""
    ranked_NK, values_NK = (np.array(rows) for rows in zip(*(_ranked(group) for group in groups), strict=True))
    best_NK = expected_best(ranked_NK)
    drawn = np.random.default_rng(0).integers(0, len(best_NK), (1000, len(best_NK)))
    low_K, high_K = np.quantile(best_NK[drawn].mean(axis=1), [0.025, 0.975], axis=0)
    return Curve(
        policy=policy,
        temperature=temperature,
        best=best_NK.mean(axis=0).tolist(),
        best_low=low_K.tolist(),
        best_high=high_K.tolist(),
        median=expected_median(values_NK).mean(axis=0).tolist(),
    )


def measure_curve(
    desk: Desk,
    prompts: Sequence[EncodedPrompt],
    *,
    policy: str,
    temperature: float,
    samples: int,
    constants: Constants,
    sampler: Sampler | None = None,
) -> Curve:
    """The curve of so many answers to each prompt at a temperature, of the desk's policy or of the sampler's."""
    groups: list[Group] = []
    for number, batch in enumerate(batches_of(prompts, samples)):
        sampling = desk.sampling(_FIRST_SEED + number, temperature=temperature)
        groups += sample_groups(desk, batch, [(sampling, samples)], constants, sampler=sampler)
    return curve_of(groups, policy=policy, temperature=temperature)


def _ranked(group: Group) -> tuple[list[float], list[float]]:
    """Rewards from the worst ranked answer to the best, and as they come.

    An answer that cannot win is worth what the prompt's worst one is: else a long one that was cut would speak for the
    temperature that it was drawn at.
    """
    floor = min(group.standardised)
    can_win = [done and good for done, good in zip(group.finished, group.allowed, strict=True)]
    values = [value if wins else floor for value, wins in zip(group.standardised, can_win, strict=True)]
    worst_first = [place for wins in (False, True) for place in reversed(group.order) if can_win[place] is wins]
    return [values[place] for place in worst_first], values
