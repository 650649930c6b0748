"""Figures of two runs side by side: the second less the first, with a 95% interval wherever there is one to be made.

Where both runs keep their answers to the same prompts the differences are paired, prompt by prompt; else the interval
comes from the two intervals. A score is compared only where the same reward model gave it: the scales of two models
differ, and a difference of their numbers says nothing of the policies.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llamachat.errors import ArtifactError
from llamachat.runs.contents import StepContents
from llamachat.runs.fingerprints import fingerprint
from llamachat.tracking.metrics import METRICS, UnknownMetricError, metric_of

How = Literal["paired", "independent"]

# The part of a name that says which models its number comes from.
_JUDGED = re.compile(r"judge")
_HELPFUL = re.compile(r"reward_helpfulness|reward/helpfulness")
_SAFE = re.compile(r"reward_safety|reward/safety|distill/(?:test/)?(?:safety|effect)|violation|gate_fraction")
_COMBINED = re.compile(r"reward_combined|reward/(?:combined|shaped)|rs/reward_")
_ON_SCALE = re.compile(r"(?:/|_)score(?:$|_low|_high)|standardised|rs/sweep/")
# Figures that say how far a policy is from the one it was compared with.
_AGAINST = re.compile(r"/difference/|win_rate|/ties/|kl_to_reference|distinct_2_ratio")
# Lists in a file of answers (llamachat.answers.evaluation.Evaluation as plain values) by the last part of the figure.
_LISTS = {
    "reward_helpfulness": "helpfulness",
    "reward_safety": "safety",
    "judge": "judge",
    "reward_combined": "combined",
    "score": "standardised",
    "response_tokens": "tokens",
    "finished_fraction": "finished",
    "kl_to_reference": "kl",
}


@dataclass(frozen=True, slots=True)
class Side:
    """A figure as one run has it."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of both runs; the difference is that of b less a, None where it would say nothing."""

    name: str
    unit: str
    a: Side
    b: Side
    difference: float | None
    low: float | None = None
    high: float | None = None
    how: How | None = None
    remark: str = ""

    @property
    def leaves_out_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def first_policy(run: Mapping[str, StepContents], step: StepContents) -> str | None:
    """What tells the policy on whose answers a step's standardised scores stand, and with which it compares."""
    evaluation = _read(step.folder.artifact / "evaluation.json")
    if evaluation is None:
        return step.identity.get("inputs", {}).get("policy")
    reference = run.get(str(evaluation.get("reference")))
    files = reference.manifest.get("files") if reference else None
    # A policy that is not there any more is equal to none.
    return fingerprint(files) if files else step.folder.path.as_posix()


def compared_figures(a: StepContents, b: StepContents, *, scale_is_equal: bool) -> list[Compared]:
    """The figures that both have, in the order of the table of metrics.

    `scale_is_equal` says whether both have the same `first_policy`.
    """
    ours, theirs = figures(a), figures(b)
    other_models = _other_models(a, b)
    paired = dict(_paired(a, b))
    found = []
    for name in sorted(ours.keys() & theirs.keys(), key=_place):
        remark = _why_not(name, other_models, scale_is_equal)
        found.append(_compared(name, ours[name], theirs[name], None if remark else paired.get(name), remark))
        if not remark and not scale_is_equal and _AGAINST.search(name):
            found[-1] = _remarked(found[-1], "each against its own first policy")
    return found


def figures(step: StepContents) -> dict[str, Side]:
    """The final figures with their intervals: of `evaluation.json` where the step has one, else of `summary.json`."""
    values = step.summary
    found = {}
    for name, value in values.items():
        stem, _, end = name.rpartition("_")
        if end in ("low", "high") and stem in values:
            continue
        found[name] = Side(value, values.get(f"{name}_low"), values.get(f"{name}_high"))
    evaluation = _read(step.folder.artifact / "evaluation.json") or {}
    for policy, measured in evaluation.get("figures", {}).items():
        for name, side in measured.items():
            if side.get("value") is not None:
                found[f"eval/{policy}/{name}"] = Side(side["value"], side.get("low"), side.get("high"), side.get("n"))
    return found


def _compared(name: str, a: Side, b: Side, paired: tuple[list[float], list[float]] | None, remark: str) -> Compared:
    from llamachat.maths.intervals import Difference, independent_difference, paired_bootstrap

    unit = _unit(name)
    if remark:
        return Compared(name, unit, a, b, None, remark=remark)
    gap = b.value - a.value
    if paired is not None:
        found = paired_bootstrap(paired[1], paired[0])
        # Lists that do not give the figures belong to other work.
        if math.isclose(found.value, gap, rel_tol=1e-4, abs_tol=1e-6):
            return Compared(name, unit, a, b, gap, found.low, found.high, "paired")
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return Compared(name, unit, a, b, gap)
    found = independent_difference(Difference(b.value, b.low, b.high), Difference(a.value, a.low, a.high))
    return Compared(name, unit, a, b, gap, found.low, found.high, "independent")


def _remarked(one: Compared, remark: str) -> Compared:
    return Compared(one.name, one.unit, one.a, one.b, one.difference, one.low, one.high, one.how, remark)


def _why_not(name: str, other_models: set[str], scale_is_equal: bool) -> str:
    """Why a difference of these two numbers says nothing; empty where it does say something."""
    if name.startswith("rm/"):  # those are figures of a reward model, not by one
        return ""
    needed = set()
    is_on_scale = bool(_ON_SCALE.search(name))
    if _JUDGED.search(name):
        needed = {"judge"}
    elif _COMBINED.search(name) or is_on_scale:
        needed = {"helpfulness", "safety"}
    elif _HELPFUL.search(name):
        needed = {"helpfulness"}
    elif _SAFE.search(name):
        needed = {"safety"}
    others = sorted(needed & other_models)
    if others:
        return f"scored by another {' and '.join(others)} model in each"
    return "each on the scale of its own first policy" if is_on_scale and not scale_is_equal else ""


def _other_models(a: StepContents, b: StepContents) -> set[str]:
    inputs = [step.identity.get("inputs", {}) for step in (a, b)]
    roles = {role for read in inputs for role in read if role.startswith("reward_model/")}
    return {role.partition("/")[2] for role in roles if inputs[0].get(role) != inputs[1].get(role)}


def _paired(a: StepContents, b: StepContents) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """Values of figures, prompt by prompt, where both runs asked the same prompts."""
    if not _same_prompts(a, b):
        return
    ours, theirs = dict(_values(a)), dict(_values(b))
    for name in ours:
        if name in theirs and len(ours[name]) == len(theirs[name]):
            yield name, (ours[name], theirs[name])


def _values(step: StepContents) -> Iterator[tuple[str, list[float]]]:
    """What each figure is the mean of: a value for each prompt."""
    answers = dict(_answers(step))
    reference = (_read(step.folder.artifact / "evaluation.json") or {}).get("reference")
    for prefix, lists in answers.items():
        owner, _, moment = prefix.rpartition("/")
        before = answers.get(f"eval/{reference}" if owner == "eval" else f"{owner}/start", {})
        place = f"{prefix}/difference" if owner == "eval" else f"{owner}/difference"
        for name, key in _LISTS.items():
            values, first = lists.get(key), before.get(key)
            if not values:
                continue
            yield f"{prefix}/{name}", values
            if first and len(first) == len(values) and moment != "start":
                yield f"{place}/{name}", [value - other for value, other in zip(values, first, strict=True)]


def _same_prompts(a: StepContents, b: StepContents) -> bool:
    """Held-out prompts follow from the data, and which are too long from the base and the longest answer."""
    return bool(a.identity) and _choosing(a) == _choosing(b)


def _choosing(step: StepContents) -> list[Any]:
    identity = step.identity
    base = {key: value for key, value in identity.get("base", {}).items() if key not in ("dtype", "attention")}
    return [identity.get("data"), base, identity.get("rollout", {}).get("max_new_tokens")]


def _answers(step: StepContents) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The files of answers that a step keeps, by the beginning of their figures' names."""
    places = {f"eval/{path.stem}": path for path in sorted((step.folder.artifact / "answers").glob("*.json"))}
    for moment, file in (("start", "test-first.json"), ("final", "test-final.json")):
        places[f"{step.command}/test/{moment}"] = step.folder.sampling / file
    for prefix, path in places.items():
        values = _read(path)
        if values is not None:
            # That of a step's first policy has the scale beside it, which the policy's answers gave.
            yield prefix, values.get("evaluation", values)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path}: cannot be understood ({error}). The comparison reads figures and scores of answers there. Copy it"
            " whole from where it came from, or make the step again with `--overwrite`."
        ) from error
    return values if isinstance(values, dict) else None


def _unit(name: str) -> str:
    try:
        return metric_of(name).unit
    except UnknownMetricError:  # a record of another version of the table is still shown
        return ""


def _place(name: str) -> tuple[int, str]:
    try:
        row = metric_of(name).name
    except UnknownMetricError:
        return len(METRICS), name
    return list(METRICS).index(row), name
