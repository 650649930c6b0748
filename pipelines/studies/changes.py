"""What two runs were told to do otherwise, key by key: from the steps' identities, and from their recipes for the rest.

An identity decides what comes out; keys that are in the recipe alone (micro-batches, cadences, tracking) do not. Data and
weights stand in an identity as digests: they are shown by the names in the recipe, and a file that only moved is no change.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from llamachat.runs.contents import StepContents
from llamachat.runs.fingerprints import ABSENT, changed_values, is_digest, leaves

Kind = Literal["result", "input", "operational", "software"]
KINDS: dict[Kind, str] = {
    "result": "decides what comes out",
    "input": "what an earlier step made",
    "operational": "decides speed or the record, not the result",
    "software": "versions of the code",
}

# Where a run lies is no difference, and the record of the step's own name is none either.
_PLACES = {"run.dir", "run.parent", "run.gpu"}
_NAMES = {"step", "command"}


@dataclass(frozen=True, slots=True)
class Change:
    """One key that differs, with its values as JSON text, and the steps in which it does so."""

    key: str
    a: str
    b: str
    kind: Kind
    steps: tuple[str, ...]


def changes(a: Mapping[str, StepContents], b: Mapping[str, StepContents]) -> list[Change]:
    """Every key that differs in a step of both runs; one that differs equally in several steps is told once."""
    by_change: dict[tuple[str, str, str, Kind], list[str]] = {}
    for name in (name for name in a if name in b):
        for found in _step_changes(a[name], b[name]):
            by_change.setdefault(found, []).append(name)
    order = list(KINDS)
    told = [Change(*found, tuple(steps)) for found, steps in by_change.items()]
    return sorted(told, key=lambda change: order.index(change.kind))


def _step_changes(a: StepContents, b: StepContents) -> Iterator[tuple[str, str, str, Kind]]:
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


def _own_recipe(step: StepContents) -> dict[str, Any]:
    """The sections of the recipe that the step reads, and what its entry in `steps` says over them."""
    sections = {key: value for key, value in step.recipe.items() if key in step.identity or key == "tracking"}
    if isinstance(sections.get("data"), dict) and isinstance(step.identity.get("data"), dict):
        # The other kinds of data are other steps'.
        sections["data"] = {key: value for key, value in sections["data"].items() if key in step.identity["data"]}
    over = _entry(step.recipe.get("steps"), step.name)
    # What a step's entry says of identity keys is in its identity already.
    known = {key.partition(".")[2] for key in leaves(step.identity)} | leaves(step.identity).keys()
    said = {key: json.loads(value) for key, value in leaves(over).items() if key not in known}
    return {**sections, **({"steps": {step.name: said}} if said else {})}


def _entry(steps: Any, name: str) -> dict[str, Any]:
    for step in steps if isinstance(steps, list) else ():
        if isinstance(step, dict) and isinstance(step.get(name), dict):
            return step[name]
    return {}


def _software(step: StepContents) -> dict[str, Any]:
    if not step.is_finished:
        return {}
    commit = step.manifest.get("git_commit")
    return {
        "versions": step.manifest.get("versions", {}),
        "code": f"{str(commit)[:12]}{' and edits' if step.manifest.get('git_is_edited') else ''}" if commit else None,
    }


def _readable(value: str, name: str | None) -> str:
    """A digest by what the recipe calls it; two files of one name still differ by the digest."""
    if value == ABSENT or not is_digest(value.strip('"')):
        return value
    digest = value.strip('"')[:12]
    return f"{json.loads(name)} ({digest})" if name else f"({digest})"
