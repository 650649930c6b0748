"""Evaluation: every policy of a run, and the reward models -> figures, and answers side by side.

Writes the step folder's sampling/, samples.jsonl, figures/, summary.json and artifact/ with `evaluation.json`, which
the report and comparisons of runs read. A killed step resumes after its last complete part.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.config import Config
from evaluation.figures import figures_of, figures_table, flat
from evaluation.guard import check_guard
from evaluation.results import PolicyResult, RunEvaluation
from llamachat.answers.best_of_n import draw_best_of_n, draw_temperatures
from llamachat.answers.refusals import TEST_ACCURACY, outcome_classifier
from llamachat.runs.artifacts import ANSWERS, EVALUATION, Artifact, StepFolder
from llamachat.runs.atomic import write_json
from llamachat.runs.inputs import StepInputs
from llamachat.runs.reader import Measure, step_of
from llamachat.tracking.tracker import open_record
from llamachat.training.publishing import publish_step

log = logging.getLogger(__name__)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Evaluate every policy, log the figures, and publish them."""
    check_guard(config.guard)
    results, trials = RunEvaluation(config, inputs).results()
    classifier = outcome_classifier()
    figures = {
        one.policy: figures_of(one, results[0], trials, classifier=classifier, tie=config.tie) for one in results
    }
    log.info("%s", figures_table(figures))
    folder = inputs.folder
    _draw(results, folder)
    samples = side_by_side(results, count=config.samples)
    content = _content(config, inputs, results, figures, samples)
    with open_record(inputs, "eval", resume_step=None) as tracker:
        tracker.samples(1, [_row(one) for one in samples])
        for picture in sorted(folder.figures.glob("*.png")):
            tracker.figure(picture.stem, picture)
        tracker.summary(flat(figures) | _sizes(results))
    return _publish(inputs, content, results)


def _draw(results: Sequence[PolicyResult], folder: StepFolder) -> None:
    curves = [curve for one in results for curve in one.curves]
    if not curves:
        return
    # The temperature at which the most policies have a curve.
    temperatures = [{curve.temperature for curve in one.curves} for one in results]
    shared = min(temperatures[0], key=lambda temperature: sum(temperature not in of_one for of_one in temperatures))
    draw_best_of_n([c for c in curves if c.temperature == shared], folder.figures / "best_of_n.png")
    ends = {results[0].policy, results[-1].policy}
    draw_temperatures([curve for curve in curves if curve.policy in ends], folder.figures / "temperatures.png")


def side_by_side(results: Sequence[PolicyResult], *, count: int) -> list[dict[str, Any]]:
    """Every policy's answers to some prompts, equally many harmless, unsafe and borderline."""
    first = results[0]
    harmless = [index for index, is_safety in enumerate(first.is_safety) if not is_safety]
    unsafe = [index for index, is_safety in enumerate(first.is_safety) if is_safety]
    kinds = [("helpfulness", harmless), ("safety", unsafe), ("borderline", list(range(len(first.borderline))))]
    kinds = [(kind, places) for kind, places in kinds if places]
    rows = []
    for number, (kind, places) in enumerate(kinds):
        share = count // len(kinds) + (number < count % len(kinds))
        stride = max(1, len(places) // max(1, share))
        for place in places[::stride][:share]:
            prompts = first.borderline_prompts if kind == "borderline" else first.prompts
            answers = {one.policy: _answer(one, kind, place) for one in results}
            rows.append({"kind": kind, "prompt": prompts[place], "answers": answers})
    return rows


def _answer(one: PolicyResult, kind: str, place: int) -> dict[str, Any]:
    if kind == "borderline":
        scores, lists = {}, (one.borderline, one.borderline_tokens, one.borderline_finished)
    else:
        scores = {name: round(values[place], 4) for name, values in one.evaluation.scores().items()}
        lists = (one.evaluation.texts, one.evaluation.tokens, one.evaluation.finished)
    text, tokens, is_finished = (values[place] for values in lists)
    return {"text": text, "tokens": tokens, "finished": is_finished, "scores": scores}


def _row(sample: dict[str, Any]) -> dict[str, Any]:
    """A logged sample: the question and each policy's answer."""
    answers = {policy: answer["text"] for policy, answer in sample["answers"].items()}
    return {"kind": sample["kind"], "prompt": sample["prompt"][-1]["content"], **answers}


def _sizes(results: Sequence[PolicyResult]) -> dict[str, float]:
    first = results[0]
    return {
        "eval/prompts": float(len(first.prompts)),
        "eval/safety_prompts": float(sum(first.is_safety)),
        "eval/borderline_prompts": float(len(first.borderline)),
    }


def _content(
    config: Config,
    inputs: StepInputs,
    results: Sequence[PolicyResult],
    figures: dict[str, dict[str, Measure]],
    samples: list[dict[str, Any]],
) -> dict[str, Any]:
    rollout = inputs.rollout
    return {
        "reference": results[0].policy,
        "policies": [one.policy for one in results],
        "temperature": rollout.temperature,
        "max_new_tokens": rollout.max_new_tokens,
        "seed": inputs.run.seed,
        "tie": config.tie,
        "prompts": {name.removeprefix("eval/"): count for name, count in _sizes(results).items()},
        "figures": {
            policy: {name: asdict(figure) for name, figure in by_name.items()} for policy, by_name in figures.items()
        },
        "curves": [asdict(curve) for one in results for curve in one.curves],
        "outcome_classifier": {name: asdict(measure) for name, measure in TEST_ACCURACY.items()},
        "reward_models": _reward_tables(inputs),
        "samples": samples,
    }


def _reward_tables(inputs: StepInputs) -> dict[str, dict[str, float]]:
    """Figures of each reward model on its test pairs, including those by rating, from its own step."""
    tables = {}
    for which, model in inputs.reward_models.items():
        if values := step_of(model).summary:
            tables[which] = {name: value for name, value in values.items() if name.startswith(f"rm/{which}/")}
    return tables


def _publish(inputs: StepInputs, content: dict[str, Any], results: Sequence[PolicyResult]) -> Artifact:
    def write(place: Path) -> None:
        write_json(place / EVALUATION, content)
        for one in results:
            write_json(place / ANSWERS / f"{one.policy}.json", asdict(one.evaluation))

    read: dict[str, Artifact | str] = {f"policy/{policy.manifest.step}": policy for policy in inputs.policies}
    read |= {f"reward_model/{which}": model for which, model in inputs.reward_models.items()}
    read |= {"reward_function": inputs.reward_function} if inputs.reward_function is not None else {}
    details = {"policies": content["policies"], "reference": content["reference"]}
    return publish_step(inputs, "evaluation", write, read=read, details=details)
