"""Before a round, measure reward by number of answers and select the temperature.

Llama 2, arXiv:2307.09288, section 3.2.3: the best temperature changes with the policy, so it is tuned again before each
round, here on validation prompts.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any, cast

from llamachat.answers.best_of_n import draw_best_of_n, draw_temperatures, measure_curve
from llamachat.answers.dialog_step import DialogStep
from llamachat.answers.groups import Sampler
from llamachat.answers.session import AnswerSession
from llamachat.models.loading import load_policy
from llamachat.rollout import open_engine
from llamachat.runs.artifacts import read_artifact
from llamachat.runs.atomic import write_json
from llamachat.runs.reader import Curve
from llamachat.scoring.standardising import Constants
from rejection_sampling.config import Config

log = logging.getLogger(__name__)


def run_sweep(
    config: Config, step: DialogStep, session: AnswerSession, constants: Constants, sampler: Sampler | None
) -> list[Curve]:
    """Measure and draw the curves of the sampling policy and of the SFT policy; return those of the sampling policy.

    Empty if the configuration reserves no prompts for the sweep.
    """
    if config.sweep_prompts == 0:
        return []
    inputs = step.inputs
    sampled_at = config.sweep_temperatures
    if config.temperature != "sweep":
        sampled_at = round_temperatures(config, inputs.rollout.temperature, [])
    temperatures = sorted({*config.sweep_temperatures, *sampled_at})

    def sweep(policy: str, load: Callable[[], Sampler | None]) -> list[Curve]:
        return [
            _curve(config, step, session, constants, policy=policy, temperature=temperature, load=load)
            for temperature in temperatures
        ]

    name = inputs.policy.manifest.step if inputs.policy else "base"
    name = name if sampler is None else "sampler"
    curves = sweep(name, lambda: sampler)
    sft_policy = inputs.sft_policy
    if sft_policy is not None and sft_policy.manifest.step != name:
        # Loaded once, and only if a curve is missing.
        curves = [*sweep(sft_policy.manifest.step, cache(lambda: load_sampler(sft_policy.path, session))), *curves]
    best = {
        policy: best_temperature(
            [c for c in curves if c.policy == policy and c.temperature in sampled_at], samples=config.samples_per_prompt
        )
        for policy in {c.policy for c in curves}
    }
    figures = inputs.folder.figures
    draw_best_of_n([curve for curve in curves if curve.temperature == best[curve.policy]], figures / "best_of_n.png")
    draw_temperatures(curves, figures / "temperatures.png")
    write_json(figures / "best_of_n.json", [asdict(curve) for curve in curves])
    return [curve for curve in curves if curve.policy == name]


def _curve(
    config: Config,
    step: DialogStep,
    session: AnswerSession,
    constants: Constants,
    *,
    policy: str,
    temperature: float,
    load: Callable[[], Sampler | None],
) -> Curve:
    """The curve of a policy on validation prompts, from the cache if present."""

    def make() -> dict[str, Any]:
        curve = measure_curve(
            session,
            session.prompts.validation[: config.sweep_prompts],
            policy=policy,
            temperature=temperature,
            samples=config.sweep_samples,
            constants=constants,
            sampler=load(),
        )
        return asdict(curve)

    curve = Curve(**step.cache.get_or_make(f"curve-{policy.replace('/', '-')}-{temperature:g}", make))
    log.info(
        "%s at temperature %g: best of %d %+.3f, median %+.3f",
        policy,
        temperature,
        config.sweep_samples,
        curve.reward,
        curve.median[-1],
    )
    return curve


def load_sampler(place: Path | str, session: AnswerSession) -> Sampler:
    """Load a policy to sample from, in addition to the session's own."""
    base = session.inputs.base
    artifact = read_artifact(Path(place), "policy")
    policy = load_policy(artifact.path, dtype=base.dtype, device="auto", attention=base.attention)
    engine = open_engine(cast(Any, policy.model), policy.chat_format, session.inputs.rollout)
    return Sampler(engine, policy.chat_format)


def round_temperatures(config: Config, default: float, curves: Sequence[Curve]) -> tuple[float, ...]:
    """The temperatures among which a round's K samples are divided; `default` is rollout.temperature."""
    if config.temperature == "sweep":
        return (best_temperature(curves, samples=config.samples_per_prompt),)
    if config.temperature is None:
        return (default,)
    return config.temperature if isinstance(config.temperature, tuple) else (config.temperature,)


def best_temperature(curves: Sequence[Curve], *, samples: int) -> float:
    """The temperature with the highest mean reward of the best of `samples` answers; the lowest in a tie."""
    return max(
        sorted(curves, key=lambda curve: curve.temperature), key=lambda curve: _best_of(curve, samples)
    ).temperature


def _best_of(curve: Curve, samples: int) -> float:
    """Expected reward of the best of K answers, or of all the sweep's answers if it has fewer."""
    return curve.best[min(samples, len(curve.best)) - 1]


def sweep_figures(curves: Sequence[Curve], *, samples: int) -> dict[str, float]:
    """Reward of the best of `samples` answers and of the median answer, by temperature."""
    figures = {}
    for curve in curves:
        figures[f"rs/sweep/best_at_{curve.temperature:g}"] = _best_of(curve, samples)
        figures[f"rs/sweep/median_at_{curve.temperature:g}"] = curve.median[-1]
    return figures
