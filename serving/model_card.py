"""The model card of an exported folder: what the model is, what made it, what was measured, how to load it, licences.

The text is in templates/; here are the facts. They come from the manifest and, where the run is still around the
artifact, from the files of its steps. No text of the users' data is in it, and of their files only names. The front
matter is in the form that the hub reads.
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
# The hub's short name of a base's licence by the beginning of the base's name.
_LICENCES = {"meta-llama/Llama-2": "llama2", "TinyLlama/": "apache-2.0"}
# The section of a recipe by command, where it has another name.
_SECTIONS = {"rm": "reward", "rs": "rejection_sampling", "distill": "context_distillation"}
# By format, what loads it.
_LIBRARIES = {"merged": "transformers", "adapter": "peft", "gguf": "gguf", "ollama": "gguf"}
_TASKS = {"text-generation": "Text Generation", "text-classification": "Text Classification"}
_TUNED = {"full": "all weights tuned", "lora": "LoRA", "qlora": "QLoRA (LoRA on a base in NF4)"}
# Of a step's own figures, those that say how good the result is, for the hub's index.
_RESULTS = re.compile(
    r"[a-z]+/eval_loss|[a-z]+/test/final/(?:score|judge|reward_\w+|kl_to_reference)|rm/\w+/test/\w+/accuracy|rm/\w+/auroc"
    r"|gatt/consistency/final/turn_\d+|distill/(?:false_)?refusal/final"
)


@dataclass(frozen=True)
class Facts:
    """What the card is about."""

    artifact: Artifact
    name: str
    base: Path  # the folder with the weights that are not the adapter's
    note: Mapping[str, Any]  # the content of export.json

    @property
    def details(self) -> Mapping[str, Any]:
        return self.artifact.manifest.details

    @cached_property
    def steps(self) -> list[Artifact]:
        """The policies that led here, and this artifact last."""
        return provenance.chain(self.artifact)

    @property
    def origin(self) -> str:
        """The base that all began with."""
        return str(self.steps[0].manifest.details["base"])

    @property
    def is_whole(self) -> bool:
        """Whether the chain goes back to a base, and none of its policies is missing."""
        return "policy" not in self.steps[0].manifest.inputs

    @property
    def is_tiny(self) -> bool:
        """Whether all began with the tiny base that comes with this code."""
        return Path(self.origin).resolve() == bundled("assets/base") or self.origin == "assets/base"

    @cached_property
    def own_figures(self) -> dict[str, Measure]:
        """The final figures of the step; nothing where its summary is not around the artifact, or torn."""
        with suppress(ArtifactError):
            return step_of(self.artifact).measures()
        return {}

    @cached_property
    def evaluated(self) -> dict[str, Measure]:
        """The figures of the run's evaluation for this very policy, by the last part of their names."""
        run, policy = provenance.run_of(self.artifact), self.artifact.manifest.step
        for place in sorted(run.glob(f"*/artifact/{EVALUATION}")):
            with suppress(ArtifactError):
                step = read_step(run, place.parents[1].name)
                evaluation = step.evaluation
                inputs = step.identity.get("inputs", {})
                digests = [digest for role, digest in inputs.items() if "policy" in role or "policies" in role]
                # The evaluated policy of this name had these weights: the step may have been run again since.
                is_same = not digests or self.artifact.digest in digests
                if evaluation and policy in evaluation.figures and is_same:
                    return {name: one for name, one in evaluation.figures[policy].items() if one is not None}
        return {}


def model_card(facts: Facts) -> str:
    """README.md of an exported policy, with the front matter that the hub reads."""
    # How often the policy harms and refuses; None: not measured.
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
    """The template with what both cards show; `kinds` are the data of a step whose identity does not name its own."""
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
    is_other = short_name == "other"  # then the hub asks for a name and a link
    values = {
        "library_name": _LIBRARIES[facts.note["format"]],
        "pipeline_tag": task,
        "license": short_name,
        "license_name": "licences-of-the-training-data" if is_other else None,
        "license_link": "README.md" if is_other else None,
        "base_model": provenance.hub_name(facts.steps),
        # The language of a user's data is not known; that of the bundled ones is.
        "language": ["en"] if sources and all(source.origins is not None for source in sources) else None,
        "datasets": sorted({name for source in sources for name in source.hub_names}),
        "tags": ["llama", "llamachat", *(["lora"] if facts.note["format"] == "adapter" else [])],
        "model-index": model_index(facts, task),
    }
    return yaml.safe_dump({key: value for key, value in values.items() if value}, sort_keys=False)


def model_index(facts: Facts, task: str) -> list[dict[str, Any]]:
    """What was measured, in the hub's form: by the evaluation where it has this policy, else by the step itself."""
    measured, where = facts.evaluated, "held-out prompts of the run's evaluation"
    if not measured:
        measured = {name: one for name, one in facts.own_figures.items() if _RESULTS.fullmatch(name)}
        where = f"held-out part of the data of step {facts.artifact.manifest.step}"
    metrics = [
        {
            # A short name that no other figure of the same policy has.
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
    """The configuration of the last step; a planned amount that the step did not reach says so."""
    identity = facts.artifact.manifest.identity
    command = str(identity.get("command", ""))
    section = identity.get(_SECTIONS.get(command, command), {})
    settings = {**identity.get("tuning", {}), **(section if isinstance(section, dict) else {})}
    settings = {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
    end = step_of(facts.artifact).ending
    return settings | ({end.key: end.words()} if end and end.key and end.key in settings else {})


def _is_lengthened(facts: Facts) -> bool:
    """Whether training lengthened the context, so that the adapter's base needs other positions than its own."""
    rope = facts.details.get("rope_parameters", {})
    if facts.note["format"] != "adapter" or rope.get("rope_type", "default") == "default":
        return False
    return json.loads((facts.base / "config.json").read_text(encoding="utf-8")).get("rope_parameters") != rope


def plain_name(name: str) -> str:
    """The policy's name in the characters that file names and Ollama take."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def _copied_licences(facts: Facts) -> list[str]:
    """The licence files of the base that are in the exported folder too."""
    if facts.note["format"] == "adapter" or facts.note["method"] == "full":
        return []
    return sorted(file.name for pattern in LICENCE_FILES for file in facts.base.glob(pattern))


def _licence_name(facts: Facts) -> str | None:
    """The hub's short name of the licence; 'other' for that of the bundled data, None for one that is not known."""
    if facts.is_tiny:
        return "other"
    return next((name for beginning, name in _LICENCES.items() if facts.origin.startswith(beginning)), None)


def _fenced(text: str, language: str = "") -> str:
    end = "" if text.endswith("\n") else "\n"
    return f"{fence(text)}{language}\n{text}{end}{fence(text)}\n"
