"""Reward against the number of answers, by temperature, and the temperature that is best for a round.

Llama 2, arXiv:2307.09288, section 3.2.3, figures 7 and 8: the best of N grows with N and the median does not; which
temperature is best changes with the policy, so it is tuned again before each round. Rewards are combined scores in
deviations of the starting policy's answers to the test prompts. Shapes: N prompts, K answers to each.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from llamachat.answers.best_of_n import expected_best, expected_median
from llamachat.answers.desk import Desk
from llamachat.answers.groups import Group, Sampler, batches_of, sample_groups
from llamachat.answers.store import Store
from llamachat.models.loading import load_policy
from llamachat.rollout import open_engine
from llamachat.runs.artifacts import read_artifact
from llamachat.scoring.standardising import Constants
from rejection_sampling.config import Config

if TYPE_CHECKING:
    from llamachat.runs.artifacts import Artifact

log = logging.getLogger(__name__)

_FIRST_SEED = 500_000  # of the sweep's batches, past those of a round


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


def sweep(
    desk: Desk,
    temperatures: Sequence[float],
    config: Config,
    constants: Constants,
    store: Store,
    *,
    policy: str,
    sampler: Sampler | None = None,
) -> list[Curve]:
    """A curve for each temperature, on the same validation prompts; those that are in the store are not made again."""
    questions = desk.questions.validation[: config.sweep_prompts]
    found = []
    for temperature in temperatures:

        def make(temperature: float = temperature) -> dict[str, Any]:
            groups: list[Group] = []
            for number, batch in enumerate(batches_of(questions, config.sweep_samples)):
                sampling = desk.sampling(_FIRST_SEED + number, temperature=temperature)
                groups += sample_groups(desk, batch, [(sampling, config.sweep_samples)], constants, sampler=sampler)
            return curve_of(groups, policy=policy, temperature=temperature).to_plain()

        curve = Curve.from_plain(store.kept(f"curve-{policy.replace('/', '-')}-{temperature:g}", make))
        log.info(
            "%s at temperature %g: best of %d %+.3f, median %+.3f",
            policy,
            temperature,
            config.sweep_samples,
            curve.reward,
            curve.median[-1],
        )
        found.append(curve)
    return found


def sweep_of(
    artifact: "Artifact", desk: Desk, temperatures: Sequence[float], config: Config, constants: Constants, store: Store
) -> list[Curve]:
    """The same of another policy of the run, which is loaded for it."""
    name = artifact.manifest.step
    if all(store.has(f"curve-{name.replace('/', '-')}-{temperature:g}") for temperature in temperatures):
        return sweep(desk, temperatures, config, constants, store, policy=name)
    sampler = load_sampler(artifact.path, desk)
    return sweep(desk, temperatures, config, constants, store, policy=name, sampler=sampler)


def load_sampler(place: Path | str, desk: Desk) -> Sampler:
    """A policy that samples beside the desk's own."""
    base = desk.setting.base
    policy = load_policy(
        read_artifact(Path(place), "policy").path, dtype=base.dtype, device="auto", attention=base.attention
    )
    return Sampler(open_engine(cast(Any, policy.model), policy.chat_format, desk.setting.rollout), policy.chat_format)


def best_temperature(curves: Sequence[Curve]) -> float:
    """That of the highest mean reward of the best of K; the lower one of equal ones."""
    return max(sorted(curves, key=lambda curve: curve.temperature), key=lambda curve: curve.reward).temperature


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
