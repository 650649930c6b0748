"""What was measured of a policy, for its card: the figures of its step and of the run's evaluation, and their limits."""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from llamachat.errors import ArtifactError
from llamachat.runs.artifacts import EVALUATION, Artifact
from llamachat.runs.reader import Measure, read_step, step_of
from llamachat.tables import markdown_table
from serving.provenance import run_of

# Of a step's own figures, those that say how good the result is, for the hub's index.
_RESULTS = re.compile(
    r"[a-z]+/eval_loss|[a-z]+/test/final/(?:score|judge|reward_\w+|kl_to_reference)|rm/\w+/test/\w+/accuracy|rm/\w+/auroc"
    r"|gatt/consistency/final/turn_\d+|distill/(?:false_)?refusal/final"
)
_TASKS = {"text-generation": "Text Generation", "text-classification": "Text Classification"}


def own_figures(artifact: Artifact) -> dict[str, Measure]:
    """The final figures of the step; nothing where its summary is not around the artifact, or torn."""
    with suppress(ArtifactError):
        return step_of(artifact).measures()
    return {}


def evaluated(artifact: Artifact) -> dict[str, Measure]:
    """The figures of the run's evaluation for this very policy, by the last part of their names."""
    run = run_of(artifact)
    for place in sorted(run.glob(f"*/artifact/{EVALUATION}")):
        with suppress(ArtifactError):
            step = read_step(run, place.parents[1].name)
            evaluation, policy = step.evaluation, artifact.manifest.step
            if evaluation and policy in evaluation.figures and _is_of(artifact, step.identity):
                return {name: one for name, one in evaluation.figures[policy].items() if one is not None}
    return {}


def table(measured: Mapping[str, Measure]) -> list[str]:
    """Figures with their 95% intervals, as a table."""
    rows = [("figure", "value", "95% interval")]
    for name, one in measured.items():
        ends = f"{one.interval[0]:.4g} to {one.interval[1]:.4g}" if one.interval else ""
        rows.append((name, f"{one.value:.6g}", f"{ends}{f' (of {one.n})' if one.n else ''}"))
    return [*markdown_table(rows), ""]


def model_index(artifact: Artifact, name: str, task: str) -> list[dict[str, Any]]:
    """What was measured, in the hub's form; of the evaluation where it holds this policy, else of the step's own tests."""
    measured, where = evaluated(artifact), "held-out prompts of the run's evaluation"
    if not measured:
        measured = {name: side for name, side in own_figures(artifact).items() if _RESULTS.fullmatch(name)}
        where = f"held-out part of the data of step {artifact.manifest.step}"
    metrics = [
        {"type": _type(name), "value": round(side.value, 6), "name": f"{name}{_in_words(side)}"}
        for name, side in measured.items()
        if not name.startswith(("difference/", "ties/", "chance/"))
    ]
    if not metrics:
        return []
    dataset = {"type": "held-out", "name": where}
    return [
        {
            "name": name,
            "results": [{"task": {"type": task, "name": _TASKS[task]}, "dataset": dataset, "metrics": metrics}],
        }
    ]


def _type(name: str) -> str:
    """A short name that no other figure of the same policy has."""
    return name.replace("/", "_") if name.startswith(("win_rate/", "consistency/")) else name.rpartition("/")[2]


def limits(artifact: Artifact, *, is_tiny: bool) -> list[str]:
    """What is known against the model, and what nobody looked at."""
    lines = []
    if is_tiny:
        lines.append(
            "- The base is the tiny one that comes with llamachat, of 5 million parameters: it writes plausible English,"
            " knows next to nothing and often makes little sense. It is for learning, testing and debugging the recipe."
        )
    lines.append(
        "- Scores, win rates and violations are given by models, not by people. A policy that was tuned against reward"
        " models can please them without being better; the judge, which no step was tuned against, is a model too."
    )
    measured = evaluated(artifact) or _of_distillation(artifact)
    for key, meaning in (
        ("violation", "of its answers to prompts that ask for harm are violations, as the safety model judges them"),
        ("refusal", "of its answers to these prompts are refusals, by a trained classifier"),
        ("false_refusal", "of its answers to harmless prompts that look unsafe are refusals"),
    ):
        side = measured.get(key)
        told = "Not measured: what share" if side is None else f"{100 * side.value:.1f}%{_in_words(side, 100, '%')}"
        lines.append(f"- {told} {meaning}.")
    lines.append(
        "- Nobody has red-teamed it. Truth of what it says, bias, toxicity, and other languages than those of its data were"
        " not tested. It can say false, harmful and offensive things."
    )
    return lines


def _of_distillation(artifact: Artifact) -> dict[str, Measure]:
    return {
        name.split("/")[1]: side
        for name, side in own_figures(artifact).items()
        if name in ("distill/refusal/final", "distill/false_refusal/final")
    }


def _in_words(side: Measure, factor: float = 1, unit: str = "") -> str:
    if side.low is None or side.high is None:
        return ""
    return f" (95% interval {factor * side.low:.3g}{unit} to {factor * side.high:.3g}{unit})"


def _is_of(artifact: Artifact, identity: Mapping[str, Any]) -> bool:
    """Whether the evaluated policy of this name had these weights: the step may have been run again since."""
    inputs = identity.get("inputs", {})
    digests = [digest for role, digest in inputs.items() if "policy" in role or "policies" in role]
    return not digests or artifact.digest in digests
