"""Reward against the number of answers before a round, and the temperature that is best for it.

Llama 2, arXiv:2307.09288, section 3.2.3: which temperature is best changes with the policy, so it is tuned again before
each round, here on validation prompts.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llamachat.answers.curves import Curve, measure_curve
from llamachat.answers.desk import Desk
from llamachat.answers.groups import Sampler
from llamachat.answers.store import Store
from llamachat.models.loading import load_policy
from llamachat.rollout import open_engine
from llamachat.runs.artifacts import read_artifact
from llamachat.scoring.standardising import Constants
from rejection_sampling.config import Config

if TYPE_CHECKING:
    from llamachat.runs.artifacts import Artifact

log = logging.getLogger(__name__)


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
    prompts = desk.prompts.validation[: config.sweep_prompts]
    found = []
    for temperature in temperatures:

        def make(temperature: float = temperature) -> dict[str, Any]:
            curve = measure_curve(
                desk,
                prompts,
                policy=policy,
                temperature=temperature,
                samples=config.sweep_samples,
                constants=constants,
                sampler=sampler,
            )
            return curve.to_plain()

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
