"""Provenance of a policy for its card: the preceding steps and their data, with licences.

Reads manifests and recipes of the run; the chain ends where something was moved or deleted. Bundled data files are
recognised by content and shown with their origins; of a user's file, only the name is shown.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat.config.sections import bundled, hub_set, is_hub_name, split_revision
from llamachat.errors import ArtifactError
from llamachat.runs.artifacts import Artifact, StepFolder, read_artifact
from llamachat.runs.fingerprints import digest_of_file
from llamachat.runs.reader import step_of

# The kinds of data that a step may read, in the card's order.
_KINDS = ("sft", "helpfulness", "safety", "open", "labels", "prompts", "adversarial", "borderline")
# Hub data sets from which bundled files were extracted.
_ON_THE_HUB = {
    "hh-rlhf-harmless-base": "Anthropic/hh-rlhf",
    "oasst-en-100": "OpenAssistant/oasst1",
    "dolly-15k-387": "databricks/databricks-dolly-15k",
    "gsm8k": "openai/gsm8k",
}
_CUT = re.compile(r"^- `(?P<stem>[^`]+)` from (?P<origins>[^.]+)\.", re.MULTILINE)
_ORIGIN = re.compile(r"^### (?P<name>\S+)$(?P<lines>.*?)(?=^### |\Z)", re.MULTILINE | re.DOTALL)
_DONE = re.compile(r"shortened: |(?:[a-z ]+ )?left out: ")
_LICENCE = re.compile(r"^- licence: (?P<licence>[^(;\n]+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Source:
    """One entry of the recipe's data, with origins and licences if the file is bundled."""

    kind: str
    line: str
    hub_names: tuple[str, ...]
    origins: tuple[tuple[str, str], ...] | None  # None: not bundled


def chain(artifact: Artifact) -> list[Artifact]:
    """The chain of policies from the first one to this artifact."""
    policies = [artifact]
    while (before := _before(policies[0])) is not None:
        policies.insert(0, before)
    return policies


def run_of(artifact: Artifact) -> Path:
    """The run folder of an artifact `<run>/<step>/artifact`; an unrelated folder if it was moved."""
    above = artifact.path.absolute().parents
    return above[min(len(Path(artifact.manifest.step).parts), len(above) - 1)]


def hub_name(steps: Sequence[Artifact]) -> str | None:
    """The base's name on the hub; None for a folder."""
    details = steps[0].manifest.details
    base = str(details["base"])
    is_folder = details.get("base_is_folder", not is_hub_name(base))
    return None if is_folder else split_revision(base)[0]


def dropped_lines(steps: Sequence[Artifact]) -> list[str]:
    """Counts of records that each step dropped or shortened, including its sampled dialogs."""
    lines = []
    for artifact in steps:
        counts = Counter(artifact.manifest.dropped_records)
        with suppress(ArtifactError):  # most steps publish no dialogs
            counts.update(read_artifact(StepFolder(artifact.path.parent).dialogs, "dialogs").manifest.dropped_records)
        if counts:
            # Most reasons start with what was done to the records; the others are reasons for dropping records.
            words = [f"{'' if _DONE.match(reason) else 'left out: '}{reason} ({n})" for reason, n in counts.items()]
            lines.append(f"`{artifact.manifest.step}`: {'; '.join(words)}")
    return lines


def sources(steps: Sequence[Artifact], kinds: Sequence[str]) -> list[Source]:
    """Distinct data entries read by the steps; `kinds` are the data kinds of a step that does not record them."""
    entries = []
    for artifact in steps:
        data = artifact.manifest.identity.get("data", {})
        recipe: Any = None
        with suppress(ArtifactError):  # empty if the recipe is no longer next to the artifact
            recipe = step_of(artifact).recipe.get("data")
        for kind in [kind for kind in _KINDS if kind in data] or kinds:
            digests = [entry.get("path", "") for entry in data.get(kind, ())]
            for place, entry in enumerate((recipe.get(kind) if isinstance(recipe, dict) else None) or ()):
                entries.append(_source(kind, entry, digests[place] if place < len(digests) else ""))
    return list(dict.fromkeys(entries))


def by_kind(read: Sequence[Source]) -> dict[str, list[Source]]:
    """The data by kind, without empty kinds."""
    return {kind: of_kind for kind in _KINDS if (of_kind := [source for source in read if source.kind == kind])}


def _before(artifact: Artifact) -> Artifact | None:
    """The policy that this one was trained from, at its recorded path or in the run's current folder."""
    policy_path = artifact.manifest.inputs.get("policy")
    if policy_path is None:
        return None
    run = run_of(artifact)
    parts = Path(policy_path).parts
    for place in (run.joinpath(*parts[-2:]), run.joinpath(*parts[-3:]), Path(policy_path)):
        try:
            policy = read_artifact(place, "policy")
        except ArtifactError:
            continue
        digest = artifact.manifest.identity.get("inputs", {}).get("policy", policy.digest)
        if policy.digest == digest and policy.path.resolve() != artifact.path.resolve():
            return policy
    return None


def _source(kind: str, entry: Mapping[str, Any], digest: str) -> Source:
    path = str(entry["path"])
    limit = f", at most {entry['limit']} of them" if entry.get("limit") else ""
    weight = f", weight {entry['weight']:g}" if entry.get("weight", 1.0) != 1.0 else ""
    # Do not publish local paths.
    name = Path(path).name if Path(path).is_absolute() else path
    hub_data, origins = hub_set(path), origins_of(Path(path), digest)
    hub_names = [hub_data.name] if hub_data else [_ON_THE_HUB[name] for name, _ in origins or () if name in _ON_THE_HUB]
    return Source(kind, f"`{name}`{limit}{weight}", tuple(hub_names), origins)


def origins_of(path: Path, digest: str) -> tuple[tuple[str, str], ...] | None:
    """A bundled file's origins, with licences from its folder's SOURCE.md; None for other files."""
    for candidate in sorted(bundled("data").glob(f"*/{path.name}")):
        is_it = digest_of_file(candidate) == digest if digest else path.resolve() == candidate.resolve()
        source = candidate.parent / "SOURCE.md"
        if is_it and source.is_file():
            return _licences(source.read_text(encoding="utf-8"), candidate.name.partition(".")[0])
    return None


def _licences(text: str, stem: str) -> tuple[tuple[str, str], ...]:
    licences = {
        match["name"]: licence["licence"].strip()
        for match in _ORIGIN.finditer(text)
        if (licence := _LICENCE.search(match["lines"])) is not None
    }
    cut = next((match["origins"].split(", ") for match in _CUT.finditer(text) if match["stem"] == stem), [*licences])
    return tuple((name, licences[name]) for name in cut if name in licences)
