"""The model card of an exported folder: description, training, evaluation, how to load it, licences.

The text is in templates/; the facts are collected here from the manifest and, if the run folder still exists, from the
files of its steps. The card contains no text of the users' data, and of their files only the names. The front matter is
in the hub's format.
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from llamachat.config.sections import bundled
from llamachat.errors import ArtifactError
from llamachat.models.hub import LICENCE_FILES
from llamachat.runs.artifacts import EVALUATION, Artifact
from llamachat.runs.reader import Measure, read_benchmarks, read_step, step_of
from llamachat.tables import fence
from serving import provenance

_TEMPLATES = Path(__file__).with_name("templates")
# The hub's short name of a base's licence, by prefix of the base's name.
_LICENCES = {"meta-llama/Llama-2": "llama2", "TinyLlama/": "apache-2.0"}
# The recipe section of a command, if it has another name.
_SECTIONS = {"rm": "reward", "rs": "rejection_sampling", "distill": "context_distillation"}
# By format, the library that loads it.
_LIBRARIES = {"merged": "transformers", "adapter": "peft", "gguf": "gguf", "ollama": "gguf"}
_TASKS = {"text-generation": "Text Generation", "text-classification": "Text Classification"}
_TUNED = {"full": "all weights tuned", "lora": "LoRA", "qlora": "QLoRA (LoRA on a base in NF4)"}
# Quality metrics among a step's own figures, for the hub's model index.
_RESULTS = re.compile(
    r"[a-z]+/eval_loss|[a-z]+/test/final/(?:score|judge|reward_\w+|kl_to_reference)|rm/\w+/test/\w+/accuracy|rm/\w+/auroc"
    r"|gatt/consistency/final/turn_\d+|distill/(?:false_)?refusal/final"
)


@dataclass(frozen=True)
class Facts:
    """The facts on the card."""

    artifact: Artifact
    name: str
    base: Path  # the folder with the base weights
    note: Mapping[str, Any]  # the content of export.json

    @property
    def details(self) -> Mapping[str, Any]:
        return self.artifact.manifest.details

    @cached_property
    def steps(self) -> list[Artifact]:
        """The preceding policies in order, ending with this artifact."""
        return provenance.chain(self.artifact)

    @property
    def origin(self) -> str:
        """The base at the start of the chain."""
        return str(self.steps[0].manifest.details["base"])

    @property
    def is_whole(self) -> bool:
        """Whether the chain is complete, back to a base."""
        return "policy" not in self.steps[0].manifest.inputs

    @property
    def is_tiny(self) -> bool:
        """Whether the chain starts from the bundled tiny base."""
        return Path(self.origin).resolve() == bundled("assets/base") or self.origin == "assets/base"

    @cached_property
    def own_figures(self) -> dict[str, Measure]:
        """The final figures of the step; empty if its summary is missing or corrupt."""
        with suppress(ArtifactError):
            return step_of(self.artifact).measures()
        return {}

    @cached_property
    def evaluated(self) -> dict[str, Measure]:
        """The run's evaluation figures for this exact policy, by the last part of their names."""
        run, policy = provenance.run_of(self.artifact), self.artifact.manifest.step
        for place in sorted(run.glob(f"*/artifact/{EVALUATION}")):
            with suppress(ArtifactError):
                step = read_step(run, place.parents[1].name)
                evaluation = step.evaluation
                inputs = step.identity.get("inputs", {})
                digests = [digest for role, digest in inputs.items() if "policy" in role or "policies" in role]
                # Compare weights, since the step may have been run again after the evaluation.
                is_same = not digests or self.artifact.digest in digests
                if evaluation and policy in evaluation.figures and is_same:
                    return {name: one for name, one in evaluation.figures[policy].items() if one is not None}
        return {}


def model_card(facts: Facts) -> str:
    """README.md of an exported policy, with front matter for the hub."""
    # Violation and refusal rates; None: not measured.
    own = {key: facts.own_figures.get(f"distill/{key}/final") for key in ("refusal", "false_refusal")}
    shares = {key: (facts.evaluated or own).get(key) for key in ("violation", "refusal", "false_refusal")}
    return _rendered(
        "policy_card.md.jinja",
        facts,
        task="text-generation",
        kinds=("sft",),
        is_lengthened=_is_lengthened(facts),
        tuned=_TUNED[facts.note["method"]],
        evaluated=facts.evaluated,
        benchmarks=read_benchmarks(facts.artifact),
        shares=shares,
    )


def reward_card(facts: Facts) -> str:
    """README.md of an exported reward model."""
    kinds = ("helpfulness", "safety", "labels", "open")
    return _rendered("reward_card.md.jinja", facts, task="text-classification", kinds=kinds)


def _rendered(template: str, facts: Facts, *, task: str, kinds: Sequence[str], **more: Any) -> str:
    """Render a template with the facts of both cards; `kinds` are the data kinds of steps that record none."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"fenced": _fenced, "plain_name": plain_name, "repr": repr}
    manifest = facts.artifact.manifest
    sources = provenance.sources(facts.steps, kinds)
    libraries = ("torch", "transformers", "trl", "peft")
    text = environment.get_template(template).render(
        facts=facts,
        note=facts.note,
        manifest=manifest,
        details={"system": None, **facts.details},
        front_matter=_front_matter(facts, task, sources),
        steps=[step_of(artifact) for artifact in facts.steps],
        sources=provenance.by_kind(sources),
        settings=_settings(facts),
        figures=facts.own_figures,
        dropped=provenance.dropped_lines(facts.steps),
        versions=", ".join(f"{key} {value}" for key, value in manifest.versions.items() if key in libraries),
        licence_name=_licence_name(facts),
        licence_files=_copied_licences(facts),
        **more,
    )
    return text.strip("\n") + "\n"


def _front_matter(facts: Facts, task: str, sources: Sequence[provenance.Source]) -> str:
    short_name = _licence_name(facts)
    is_other = short_name == "other"  # the hub then requires a name and a link
    values = {
        "library_name": _LIBRARIES[facts.note["format"]],
        "pipeline_tag": task,
        "license": short_name,
        "license_name": "licences-of-the-training-data" if is_other else None,
        "license_link": "README.md" if is_other else None,
        "base_model": provenance.hub_name(facts.steps),
        # The language of the users' data is unknown; that of the bundled data is English.
        "language": ["en"] if sources and all(source.origins is not None for source in sources) else None,
        "datasets": sorted({name for source in sources for name in source.hub_names}),
        "tags": ["llama", "llamachat", *(["lora"] if facts.note["format"] == "adapter" else [])],
        "model-index": model_index(facts, task),
    }
    return yaml.safe_dump({key: value for key, value in values.items() if value}, sort_keys=False)


def model_index(facts: Facts, task: str) -> list[dict[str, Any]]:
    """Results in the hub's format, from the evaluation if it includes this policy, otherwise from the step itself."""
    measured, where = facts.evaluated, "held-out prompts of the run's evaluation"
    if not measured:
        measured = {name: one for name, one in facts.own_figures.items() if _RESULTS.fullmatch(name)}
        where = f"held-out part of the data of step {facts.artifact.manifest.step}"
    metrics = [
        {
            # A short name that is unique among the policy's figures.
            "type": name.replace("/", "_")
            if name.startswith(("win_rate/", "consistency/"))
            else name.rpartition("/")[2],
            "value": round(one.value, 6),
            "name": name + (f" (95% interval {one.interval[0]:.3g} to {one.interval[1]:.3g})" if one.interval else ""),
        }
        for name, one in measured.items()
        if not name.startswith(("difference/", "ties/", "chance/"))
    ]
    if not metrics:
        return []
    dataset = {"type": "held-out", "name": where}
    return [
        {
            "name": facts.name,
            "results": [{"task": {"type": task, "name": _TASKS[task]}, "dataset": dataset, "metrics": metrics}],
        }
    ]


def _settings(facts: Facts) -> dict[str, Any]:
    """The configuration of the last step; planned amounts that were not reached are marked."""
    identity = facts.artifact.manifest.identity
    command = str(identity.get("command", ""))
    section = identity.get(_SECTIONS.get(command, command), {})
    settings = {**identity.get("tuning", {}), **(section if isinstance(section, dict) else {})}
    settings = {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
    end = step_of(facts.artifact).ending
    return settings | ({end.key: end.words()} if end and end.key and end.key in settings else {})


def _is_lengthened(facts: Facts) -> bool:
    """Whether training lengthened the context, so that the adapter's base needs a changed position encoding."""
    rope = facts.details.get("rope_parameters", {})
    if facts.note["format"] != "adapter" or rope.get("rope_type", "default") == "default":
        return False
    return json.loads((facts.base / "config.json").read_text(encoding="utf-8")).get("rope_parameters") != rope


def plain_name(name: str) -> str:
    """The policy's name, restricted to characters valid in file names and in Ollama."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def _copied_licences(facts: Facts) -> list[str]:
    """The base's licence files that were copied to the exported folder."""
    if facts.note["format"] == "adapter" or facts.note["method"] == "full":
        return []
    return sorted(file.name for pattern in LICENCE_FILES for file in facts.base.glob(pattern))


def _licence_name(facts: Facts) -> str | None:
    """The hub's short name of the licence: 'other' for the bundled data, None if unknown."""
    if facts.is_tiny:
        return "other"
    return next((name for beginning, name in _LICENCES.items() if facts.origin.startswith(beginning)), None)


def _fenced(text: str, language: str = "") -> str:
    end = "" if text.endswith("\n") else "\n"
    return f"{fence(text)}{language}\n{text}{end}{fence(text)}\n"
