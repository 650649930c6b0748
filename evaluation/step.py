"""Evaluation: every policy of a run, and the reward models -> figures, and answers side by side.

Writes the step folder's sampling/, samples.jsonl, figures/, summary.json and artifact/ with `evaluation.json`, which is
what the report and a comparison of two runs read. Killed at any moment, the same call goes on.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from evaluation.config import Config
from evaluation.figures import Figure, figures_of, flat
from evaluation.measuring import Examiner, Measured
from evaluation.tables import figures_table
from llamachat.answers.curve_pictures import draw_best_of_n, draw_temperatures
from llamachat.answers.making import record
from llamachat.answers.refusals import RefusalClassifier, everyday_answers, labelled_answers, train_classifier
from llamachat.runs.artifacts import ANSWERS, EVALUATION, Artifact, Manifest, publish
from llamachat.runs.atomic import write_json
from llamachat.runs.folder import StepFolder
from llamachat.runs.inputs import StepInputs

log = logging.getLogger(__name__)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Measure every policy, tell, and publish."""
    # Its bars for loading and writing weights would break up ours.
    transformers_logging.disable_progress_bar()
    measured, trials = Examiner(config, inputs).measure_all()
    classifier = _classifier(measured)
    figures = {
        one.policy: figures_of(one, measured[0], trials, classifier=classifier, tie=config.tie) for one in measured
    }
    log.info("%s", figures_table(figures))
    folder = inputs.folder
    _draw(measured, folder)
    shown = side_by_side(measured, count=config.samples)
    content = _content(config, inputs, measured, figures, classifier, shown)
    with record(inputs, "eval", keeps_record=False) as tracker:
        tracker.samples(1, [_row(one) for one in shown])
        for picture in sorted(folder.figures.glob("*.png")):
            tracker.figure(picture.stem, picture)
        tracker.summary(flat(figures) | _sizes(measured, classifier))
    return _publish(inputs, content, measured)


def _classifier(measured: Sequence[Measured]) -> RefusalClassifier | None:
    if not (measured[0].borderline or any(measured[0].is_safety)):
        return None
    return train_classifier(labelled_answers(), everyday_answers())


def _draw(measured: Sequence[Measured], folder: StepFolder) -> None:
    curves = [curve for one in measured for curve in one.curves]
    if not curves:
        return
    shared = min({curve.temperature for curve in measured[0].curves}, key=lambda t: _missing(measured, t))
    draw_best_of_n([c for c in curves if c.temperature == shared], folder.figures / "best_of_n.png")
    ends = {measured[0].policy, measured[-1].policy}
    draw_temperatures([curve for curve in curves if curve.policy in ends], folder.figures / "temperatures.png")


def _missing(measured: Sequence[Measured], temperature: float) -> int:
    """How many policies have no curve at this temperature."""
    return sum(all(curve.temperature != temperature for curve in one.curves) for one in measured)


def side_by_side(measured: Sequence[Measured], *, count: int) -> list[dict[str, Any]]:
    """Every policy's answer to some prompts: as many each that are harmless, ask for something unsafe, or only look so."""
    first = measured[0]
    harmless = [index for index, is_safety in enumerate(first.is_safety) if not is_safety]
    unsafe = [index for index, is_safety in enumerate(first.is_safety) if is_safety]
    kinds = [("helpfulness", harmless), ("safety", unsafe), ("borderline", list(range(len(first.borderline))))]
    kinds = [(kind, places) for kind, places in kinds if places]
    found = []
    for number, (kind, places) in enumerate(kinds):
        share = count // len(kinds) + (number < count % len(kinds))
        stride = max(1, len(places) // max(1, share))
        for place in places[::stride][:share]:
            prompts = first.borderline_prompts if kind == "borderline" else first.prompts
            answers = {one.policy: _answer(one, kind, place) for one in measured}
            found.append({"kind": kind, "prompt": prompts[place], "answers": answers})
    return found


def _answer(one: Measured, kind: str, place: int) -> dict[str, Any]:
    if kind == "borderline":
        return {
            "text": one.borderline[place],
            "tokens": one.borderline_tokens[place],
            "finished": one.borderline_finished[place],
            "scores": {},
        }
    evaluation = one.evaluation
    return {
        "text": evaluation.texts[place],
        "tokens": evaluation.tokens[place],
        "finished": evaluation.finished[place],
        "scores": {name: round(values[place], 4) for name, values in evaluation.scores().items()},
    }


def _row(shown: dict[str, Any]) -> dict[str, Any]:
    """For people to read: the question and each policy's answer."""
    answers = {policy: answer["text"] for policy, answer in shown["answers"].items()}
    return {"kind": shown["kind"], "prompt": shown["prompt"][-1]["content"], **answers}


def _sizes(measured: Sequence[Measured], classifier: RefusalClassifier | None) -> dict[str, float]:
    first = measured[0]
    found = {
        "eval/prompts": float(len(first.prompts)),
        "eval/safety_prompts": float(sum(first.is_safety)),
        "eval/borderline_prompts": float(len(first.borderline)),
    }
    if classifier is not None:
        place = "eval/refusal_classifier_accuracy"
        found |= {place: classifier.accuracy, f"{place}_low": classifier.low, f"{place}_high": classifier.high}
    return found


def _content(
    config: Config,
    inputs: StepInputs,
    measured: Sequence[Measured],
    figures: dict[str, dict[str, Figure]],
    classifier: RefusalClassifier | None,
    shown: list[dict[str, Any]],
) -> dict[str, Any]:
    rollout = inputs.rollout
    return {
        "reference": measured[0].policy,
        "policies": [one.policy for one in measured],
        "temperature": rollout.temperature,
        "max_new_tokens": rollout.max_new_tokens,
        "seed": inputs.run.seed,
        "tie": config.tie,
        "prompts": {name.removeprefix("eval/"): count for name, count in _sizes(measured, None).items()},
        "figures": {
            policy: {name: figure.to_plain() for name, figure in by_name.items()} for policy, by_name in figures.items()
        },
        "curves": [curve.to_plain() for one in measured for curve in one.curves],
        "refusal_classifier": None
        if classifier is None
        else Figure(classifier.accuracy, classifier.low, classifier.high, classifier.answers).to_plain(),
        "reward_models": _reward_tables(inputs),
        "samples": shown,
    }


def _reward_tables(inputs: StepInputs) -> dict[str, dict[str, float]]:
    """The figures of each reward model on its test pairs, by rating among them, as its own step measured them."""
    found = {}
    for which, model in inputs.reward_models.items():
        path = StepFolder(model.path.parent).summary
        if path.is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            found[which] = {name: value for name, value in values.items() if name.startswith(f"rm/{which}/")}
    return found


def _publish(inputs: StepInputs, content: dict[str, Any], measured: Sequence[Measured]) -> Artifact:
    manifest = Manifest(
        kind="evaluation",
        step=inputs.step,
        fingerprint=inputs.fingerprint,
        identity=inputs.identity,
        inputs={f"policy/{policy.manifest.step}": str(policy.path) for policy in inputs.policies}
        | {f"reward_model/{which}": str(model.path) for which, model in inputs.reward_models.items()},
        seed=inputs.run.seed,
        details={"policies": content["policies"], "reference": content["reference"]},
    )

    def write(place: Path) -> None:
        write_json(place / EVALUATION, content)
        for one in measured:
            write_json(place / ANSWERS / f"{one.policy}.json", one.evaluation.to_plain())

    return publish(inputs.folder, manifest, write)
