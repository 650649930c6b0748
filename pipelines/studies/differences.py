"""The differences between two runs as values: configuration keys, and figures with a 95% interval if possible.

If both runs keep their answers to the same prompts, the differences are paired, prompt by prompt; otherwise the
interval combines the two intervals. Scores are compared only if they come from the same reward model: the scales of
two models differ, so a difference of their numbers is meaningless. A difference is the second run minus the first.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from llamachat.runs.artifacts import ANSWERS
from llamachat.runs.fingerprints import ABSENT, changed_values, fingerprint, is_digest, leaves
from llamachat.runs.reader import Measure, RunStep, read_object
from llamachat.tracking.metrics import METRICS, find_metric

Kind = Literal["result", "input", "operational", "software"]
KINDS: dict[Kind, str] = {
    "result": "changes the result",
    "input": "result of an earlier step",
    "operational": "changes speed or records, not the result",
    "software": "versions of the software",
}
# Neither a run's path nor the step's own name counts as a difference.
_PLACES = {"run.dir", "run.parent", "run.gpu"}
_NAMES = {"step", "command"}

# The part of a name that says which models its number comes from; the first match counts.
_SCORED_BY = (
    (re.compile(r"judge"), {"judge"}),
    (
        re.compile(r"reward_combined|/combined|superiority|reward/(?:combined|shaped)|rs/reward_"),
        {"helpfulness", "safety"},
    ),
    (re.compile(r"(?:/|_)score(?:$|_low|_high)|standardised|rs/sweep/"), {"helpfulness", "safety"}),
    (re.compile(r"reward_helpfulness|reward/helpfulness"), {"helpfulness"}),
    (
        re.compile(r"reward_safety|reward/safety|distill/(?:test/)?(?:safety|effect)|violation|gate_fraction"),
        {"safety"},
    ),
)
_ON_SCALE = _SCORED_BY[2][0]  # figures in standard deviations of the first policy's answers
# Figures that measure how far a policy is from the one it was compared with.
_AGAINST = re.compile(r"/difference/|superiority|win_rate|/ties/|kl_to_reference|distinct_2_ratio")
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
class Change:
    """One key that differs, with its values as JSON text, and the steps in which it differs."""

    key: str
    a: str
    b: str
    kind: Kind
    steps: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of both runs; the difference is b minus a, None if it is meaningless."""

    name: str
    unit: str
    a: Measure
    b: Measure
    difference: float | None
    low: float | None = None
    high: float | None = None
    how: Literal["paired", "independent"] | None = None
    remark: str = ""

    @property
    def leaves_out_zero(self) -> bool:
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def changes(a: Mapping[str, RunStep], b: Mapping[str, RunStep]) -> list[Change]:
    """Every key that differs in a step of both runs; a key that differs equally in several steps is listed once.

    Keys of identities change the result; keys that only the recipe has (micro-batches, tracking) do not.
    """
    steps: dict[tuple[str, str, str, Kind], list[str]] = {}
    for name in (name for name in a if name in b):
        for change in _step_changes(a[name], b[name]):
            steps.setdefault(change, []).append(name)
    order = list(KINDS)
    return sorted((Change(*key, tuple(names)) for key, names in steps.items()), key=lambda one: order.index(one.kind))


def _step_changes(a: RunStep, b: RunStep) -> Iterator[tuple[str, str, str, Kind]]:
    ours, theirs = _own_recipe(a), _own_recipe(b)
    names_a, names_b = leaves(ours), leaves(theirs)
    for key, then, now in changed_values(a.identity, b.identity):
        if key not in _NAMES:
            kind: Kind = "input" if key.startswith("inputs.") else "result"
            yield key, _readable(then, names_a.get(key)), _readable(now, names_b.get(key)), kind
    decided = leaves(a.identity).keys() | leaves(b.identity).keys()
    for key, then, now in changed_values(ours, theirs):
        if key not in decided | _PLACES:
            yield key, then, now, "operational"
    for key, then, now in changed_values(_software(a), _software(b)):
        yield key, then, now, "software"


def _own_recipe(step: RunStep) -> dict[str, Any]:
    """The sections of the recipe that the step reads, and the overrides in its entry in `steps`."""
    sections = {key: value for key, value in step.recipe.items() if key in step.identity or key == "tracking"}
    if isinstance(sections.get("data"), dict) and isinstance(step.identity.get("data"), dict):
        # The other kinds of data belong to other steps.
        sections["data"] = {key: value for key, value in sections["data"].items() if key in step.identity["data"]}
    entries = step.recipe.get("steps")
    over = next(
        (
            entry[step.name]
            for entry in (entries if isinstance(entries, list) else ())
            if isinstance(entry, dict) and isinstance(entry.get(step.name), dict)
        ),
        {},
    )
    # The identity already contains the identity keys of a step's entry.
    known = {key.partition(".")[2] for key in leaves(step.identity)} | leaves(step.identity).keys()
    said = {key: json.loads(value) for key, value in leaves(over).items() if key not in known}
    return {**sections, **({"steps": {step.name: said}} if said else {})}


def _software(step: RunStep) -> dict[str, Any]:
    manifest = step.manifest
    if manifest is None:
        return {}
    commit = manifest.git_commit
    code = f"{commit[:12]}{' and edits' if manifest.git_is_edited else ''}" if commit else None
    return {"versions": manifest.versions, "code": code}


def _readable(value: str, name: str | None) -> str:
    """A digest replaced by the recipe's name for it; two files with one name still differ by the digest."""
    digest = value.strip('"')
    if value == ABSENT or not is_digest(digest):
        return value
    return f"{json.loads(name)} ({digest[:12]})" if name else f"({digest[:12]})"


def first_policy(run: Mapping[str, RunStep], step: RunStep) -> str | None:
    """The identity of the policy whose answers a step's standardised scores are based on, and that it compares with."""
    if step.evaluation is None:
        return step.identity.get("inputs", {}).get("policy")
    reference = run.get(step.evaluation.reference)
    files = reference.manifest.files if reference and reference.manifest else None
    # A missing policy equals none.
    return fingerprint(files) if files else step.folder.path.as_posix()


def compared_figures(a: RunStep, b: RunStep, *, scale_is_equal: bool) -> list[Compared]:
    """The figures that both runs have, in the order of the table of metrics.

    `scale_is_equal` says whether both have the same `first_policy`.
    """
    ours, theirs = _figures(a), _figures(b)
    inputs = [step.identity.get("inputs", {}) for step in (a, b)]
    roles = {role for read in inputs for role in read if role.startswith("reward_model/")}
    other_models = {role.partition("/")[2] for role in roles if inputs[0].get(role) != inputs[1].get(role)}
    paired = dict(_paired(a, b))
    compared = []
    for name in sorted(ours.keys() & theirs.keys(), key=_place):
        remark = _why_not(name, other_models, scale_is_equal)
        one = _compared(name, ours[name], theirs[name], None if remark else paired.get(name), remark)
        if not remark and not scale_is_equal and _AGAINST.search(name):
            one = replace(one, remark="each relative to its own first policy")
        compared.append(one)
    return compared


def _figures(step: RunStep) -> dict[str, Measure]:
    """The final figures: of `evaluation.json` if the step has one, in addition to those of `summary.json`."""
    figures = step.measures()
    for policy, measures in (step.evaluation.figures if step.evaluation else {}).items():
        figures |= {f"eval/{policy}/{name}": one for name, one in measures.items() if one is not None}
    return figures


def _compared(
    name: str, a: Measure, b: Measure, paired: tuple[list[float], list[float]] | None, remark: str
) -> Compared:
    from llamachat.maths.intervals import Difference, independent_difference, paired_bootstrap

    row = find_metric(name)
    unit = row.unit if row else ""
    if remark:
        return Compared(name, unit, a, b, None, remark=remark)
    gap = b.value - a.value
    if paired is not None:
        difference = paired_bootstrap(paired[1], paired[0])
        # Lists that do not reproduce the figures belong to other prompts.
        if math.isclose(difference.value, gap, rel_tol=1e-4, abs_tol=1e-6):
            if not math.isfinite(difference.low):  # one prompt
                return Compared(name, unit, a, b, gap)
            return Compared(name, unit, a, b, gap, difference.low, difference.high, "paired")
    if a.interval is None or b.interval is None:
        return Compared(name, unit, a, b, gap)
    difference = independent_difference(Difference(b.value, *b.interval), Difference(a.value, *a.interval))
    return Compared(name, unit, a, b, gap, difference.low, difference.high, "independent")


def _why_not(name: str, other_models: set[str], scale_is_equal: bool) -> str:
    """The reason why a difference of these two numbers is meaningless; empty if it is meaningful."""
    if name.startswith("rm/"):  # figures about a reward model, not scored by one
        return ""
    needed = next((models for pattern, models in _SCORED_BY if pattern.search(name)), set())
    others = sorted(needed & other_models)
    if others:
        return f"scored by another {' and '.join(others)} model in each"
    return "each on the scale of its own first policy" if _ON_SCALE.search(name) and not scale_is_equal else ""


def _paired(a: RunStep, b: RunStep) -> Iterator[tuple[str, tuple[list[float], list[float]]]]:
    """Values of figures, prompt by prompt, if both runs used the same prompts."""
    if not a.identity or _prompts(a) != _prompts(b):
        return
    ours, theirs = dict(_values(a)), dict(_values(b))
    for name in ours:
        if name in theirs and len(ours[name]) == len(theirs[name]):
            yield name, (ours[name], theirs[name])


def _prompts(step: RunStep) -> list[Any]:
    """What determines the held-out prompts: the data, and the base and the maximum answer length, which drop long
    ones."""
    base = {key: value for key, value in step.identity.get("base", {}).items() if key not in ("dtype", "attention")}
    return [step.identity.get("data"), base, step.identity.get("rollout", {}).get("max_new_tokens")]


def _values(step: RunStep) -> Iterator[tuple[str, list[float]]]:
    """The values that each figure is the mean of: one per prompt."""
    answers = dict(_answers(step))
    reference = step.evaluation.reference if step.evaluation else None
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


def _answers(step: RunStep) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The files of answers of a step, by the first part of their figures' names."""
    places = {f"eval/{path.stem}": path for path in sorted((step.folder.artifact / ANSWERS).glob("*.json"))}
    for moment, file in (("start", "test-first.json"), ("final", "test-final.json")):
        places[f"{step.command}/test/{moment}"] = step.folder.sampling / file
    for prefix, path in places.items():
        values = read_object(path)
        if values:
            # The scale next to a step's first policy comes from that policy's answers.
            yield prefix, values.get("evaluation", values)


def _place(name: str) -> tuple[int, str]:
    row = find_metric(name)
    return list(METRICS).index(row.name) if row else len(METRICS), name
