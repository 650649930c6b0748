"""One round of rejection sampling (Llama 2, arXiv:2307.09288, section 3.2.3): prompts, a policy and reward models ->
dialogs of the best answers -> a policy tuned on them.

K answers are sampled to each prompt from the policy as the round begins; the reward models score them; the best becomes
a new gold answer, pooled with those of all earlier rounds; the pool is learnt as in supervised tuning. Writes the step
folder's sampling/, metrics.jsonl, samples.jsonl, dialogs/, figures/, summary.json and, through the tuning, artifact/.
Killed at any moment, the same call goes on: each batch of answers is written down whole before the next is sampled. Where
`max_hours` ends the sampling, what was sampled by then is learnt: no batch is better than another.
"""

import logging
from collections import Counter
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

from llamachat.answers.curve_pictures import draw_best_of_n, draw_temperatures
from llamachat.answers.curves import Curve
from llamachat.answers.desk import Desk, open_desk
from llamachat.answers.evaluation import comparison, comparison_table
from llamachat.answers.groups import Sampler
from llamachat.answers.making import both_evaluations, first_evaluation, record, run_parts, setting_of, show_figures
from llamachat.answers.pictures import draw_comparison
from llamachat.answers.store import Store
from llamachat.errors import ConfigError
from llamachat.runs.artifacts import Artifact
from llamachat.runs.atomic import write_json
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.standardising import Constants
from llamachat.tracking.curves import draw_curves
from llamachat.training.hours import open_hours
from rejection_sampling.config import Config
from rejection_sampling.curves import best_temperature, load_sampler, sweep, sweep_of
from rejection_sampling.publishing import earlier_of, pool_figures, pool_of, publish_dialogs
from rejection_sampling.sampling import Round

log = logging.getLogger(__name__)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Sample, choose, pool and publish the dialogs; tune on them; compare; end the step."""
    # Its bars for loading and writing weights would break up ours.
    transformers_logging.disable_progress_bar()
    return run_parts(
        inputs,
        make=lambda: make_dialogs(config, inputs),
        over=config.sft,
        from_base=config.start == "base",
        sft_share=1.0 if config.start == "base" else 0.0,
        compare=lambda tuned: compare(config, inputs, tuned),
    )


def make_dialogs(config: Config, inputs: StepInputs) -> Artifact:
    """Everything up to the published dialogs; what was sampled before is not sampled again."""
    check_settings(config, inputs)
    store = Store(inputs.folder.sampling)
    hours = open_hours(inputs.step, "rejection_sampling", config.max_hours, inputs.deadline, store.folder)
    desk = _open(config, inputs, inputs.policy)
    counts: Counter[str] = Counter()
    # Before anything is sampled: a line that an edit broke is told now, and not after hours.
    earlier = earlier_of(inputs, desk, counts)
    with record(inputs, "rs", keeps_record=False) as tracker:
        _, constants = first_evaluation(desk, store)
        sampler = None if config.sampler is None else load_sampler(config.sampler, desk)
        curves = draw_sweep(config, inputs, desk, constants, store, sampler)
        temperatures = _temperatures(config, inputs, curves)
        hours.save(store.folder)  # a sweep takes its share of them
        sampled = Round(config, inputs, desk, constants, store, temperatures, sampler, hours, counts)
        figures = sampled.go(tracker)
        pool = pool_of(sampled, earlier)
        tracker.sync()
        # Before the dialogs, which end this part: a command killed between the two would never come back to write it.
        tracker.summary(figures | sweep_figures(curves) | pool_figures(pool, inputs.step))
        return publish_dialogs(sampled, pool)


def compare(config: Config, inputs: StepInputs, tuned: Artifact) -> None:
    """Final figures: the tuned policy against the one before on test prompts, and the pictures."""
    folder, store = inputs.folder, Store(inputs.folder.sampling)
    start, final = both_evaluations(_open(config, inputs, tuned), store)
    figures = comparison("rs", start, final)
    log.info("%s", comparison_table("rs", figures))
    if figures["rs/test/difference/score"] <= 0:
        log.warning(
            "%s: the tuned policy does not score above the one before on test prompts. More prompts or a larger K, more "
            "epochs (rejection_sampling.sft), or a reward model that tells answers apart better may help.",
            inputs.step,
        )
    draw_curves(folder.metrics, folder.curves)
    draw_comparison(start, final, folder.figures / "test_scores.png")
    with record(inputs, "rs", keeps_record=True) as tracker:
        show_figures(tracker, folder)
        tracker.summary(figures)


def check_settings(config: Config, inputs: StepInputs) -> None:
    """Refuse sampling that leaves nothing to choose from."""
    is_greedy = config.temperature is None and inputs.rollout.temperature == 0
    if is_greedy and config.samples_per_prompt > 1:
        raise ConfigError(
            f"rollout.temperature: 0, but rejection_sampling.samples_per_prompt is {config.samples_per_prompt}. At "
            "temperature 0 all answers to a prompt are the same one, and there is nothing to choose. Set it to 1, or "
            "rejection_sampling.temperature to sweep."
        )


def draw_sweep(
    config: Config, inputs: StepInputs, desk: Desk, constants: Constants, store: Store, sampler: Sampler | None
) -> list[Curve]:
    """Curves of what samples and of the SFT policy, drawn; none where no prompts are set apart for them."""
    if config.sweep_prompts == 0:
        return []
    temperatures = config.sweep_temperatures
    sampled_at = temperatures if config.temperature == "sweep" else _temperatures(config, inputs, [])
    temperatures = tuple(sorted({*temperatures, *sampled_at}))
    now = inputs.policy.manifest.step if inputs.policy else "base"
    name = now if sampler is None else "sampler"
    curves = sweep(desk, temperatures, config, constants, store, policy=name, sampler=sampler)
    if inputs.sft_policy is not None and inputs.sft_policy.manifest.step != name:
        curves = [*sweep_of(inputs.sft_policy, desk, temperatures, config, constants, store), *curves]
    places = inputs.folder.figures
    best = {
        policy: best_temperature([c for c in curves if c.policy == policy and c.temperature in sampled_at])
        for policy in {c.policy for c in curves}
    }
    draw_best_of_n([curve for curve in curves if curve.temperature == best[curve.policy]], places / "best_of_n.png")
    draw_temperatures(curves, places / "temperatures.png")
    write_json(places / "best_of_n.json", [curve.to_plain() for curve in curves])
    return [curve for curve in curves if curve.policy == name]


def sweep_figures(curves: Sequence[Curve]) -> dict[str, float]:
    """What the present policy's best and median answers are worth at each temperature."""
    found = {}
    for curve in curves:
        found[f"rs/sweep/best_at_{curve.temperature:g}"] = curve.reward
        found[f"rs/sweep/median_at_{curve.temperature:g}"] = curve.median[-1]
    return found


def _open(config: Config, inputs: StepInputs, policy: Artifact | None) -> Desk:
    held_out = (max(config.validation_prompts, config.sweep_prompts), config.test_prompts)
    return open_desk(setting_of(inputs), policy=policy, reward_models=inputs.reward_models, held_out=held_out)


def _temperatures(config: Config, inputs: StepInputs, curves: Sequence[Curve]) -> tuple[float, ...]:
    if config.temperature == "sweep":
        return (best_temperature(curves),)
    if config.temperature is None:
        return (inputs.rollout.temperature,)
    return config.temperature if isinstance(config.temperature, tuple) else (config.temperature,)
