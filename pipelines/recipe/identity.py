"""What makes a step the step that it is: identity keys of its sections, contents of its data, base and inputs.

Local files and folders count by content, not by name: moving them changes nothing, editing them does. Sets and models
of the hub count by name, since their content is not here to be read.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamachat.config.section import Section, identity
from llamachat.config.sections import Base, DataSource, Scoring, Tuning, function_name, here_or_bundled
from llamachat.runs.artifacts import Artifact, read_artifact
from llamachat.runs.fingerprints import digest_of_file, digest_of_folder, digest_of_weights
from pipelines.recipe.recipe import Recipe, Step
from sft.config import VERSION as SFT_VERSION


def step_identity(recipe: Recipe, step: Step, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """Everything that decides what the step makes, as plain JSON values; `inputs` are the artifacts that it reads."""
    section = {key: value for key, value in identity(step.config).items() if key not in step.product.unread}
    if section.get("sampler") and Path(section["sampler"]).is_dir():
        section["sampler"] = read_artifact(Path(section["sampler"]), "policy", reader=step.name).digest
    if "lists" in section:
        section["lists"] = {name: digest_of_file(here_or_bundled(path)) for name, path in section["lists"].items()}
    return {
        "step": step.name,
        "command": step.stage.command,
        "stage_version": step.stage.version,
        **({"sft_version": SFT_VERSION} if step.stage.tunes else {}),
        "run": identity(recipe.run),
        "base": _base_identity(recipe.base),
        "tuning": _tuning_identity(step.tuning),
        "data": {key: _data_identity(getattr(recipe.data, key)) for key in (*step.product.data, "split")},
        step.stage.section: section,
        **{
            key: _shared_identity(step.rollout if key == "rollout" else getattr(recipe.sections, key))
            for key in step.stage.shared
        },
        "inputs": {key: artifact.digest for key, artifact in inputs.items()},
    }


def _base_identity(base: Base) -> dict[str, Any]:
    values = identity(base)
    del values["policy"]  # counts as an input, where the step reads it
    if Path(base.model).is_dir():
        values["model"] = digest_of_weights(Path(base.model))
    return values


def _tuning_identity(tuning: Tuning) -> dict[str, Any]:
    # Rank and targets of adapters say nothing about a step that tunes all weights.
    return {"method": "full"} if tuning.method == "full" else identity(tuning)


def _shared_identity(section: Section) -> dict[str, Any]:
    values = identity(section)
    if isinstance(section, Scoring):
        function = function_name(section.combine)
        if function is not None and function.path.is_file():
            values["combine"] = f"{digest_of_file(function.path)}:{function.function}"
        for key in ("helpfulness", "safety"):
            if values[key] is not None and Path(values[key]).is_dir():
                values[key] = digest_of_weights(_model_folder(Path(values[key])))
    return values


def _model_folder(folder: Path) -> Path:
    """Where the weights lie of a step folder, or of a model folder."""
    return folder / "artifact" if (folder / "artifact").is_dir() else folder


def _data_identity(part: Any) -> Any:
    return [_source_identity(source) for source in part] if isinstance(part, tuple) else identity(part)


def _source_identity(source: DataSource) -> dict[str, Any]:
    values = identity(source)
    path = Path(source.path)
    if path.is_file():
        values["path"] = digest_of_file(path)
    elif path.is_dir():
        values["path"] = digest_of_folder(path)
    return values
