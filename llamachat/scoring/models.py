"""The reward models that score answers: the recipe's own, or those that `scoring` names instead; and which of them each
way of combining needs. Imports no torch, since planning checks this too.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from llamachat.config.section import from_home
from llamachat.config.sections import Scoring, function_name
from llamachat.errors import ConfigError
from llamachat.runs.artifacts import MANIFEST, Artifact, Manifest, read_artifact

if TYPE_CHECKING:
    from llamachat.models.roles import RewardRole

log = logging.getLogger(__name__)

ModelName = Literal["helpfulness", "safety"]
MODELS: tuple[ModelName, ...] = ("helpfulness", "safety")


@dataclass(frozen=True, slots=True)
class RewardModelFacts:
    """Facts about a reward model that are known before it is loaded."""

    name: str  # a path or Hub name, for messages
    safety_labels: int | None  # labelled answers in its training; None: not trained here, so unknown
    unfit: str | None = None  # the probe's verdict if the model failed


def named_models(scoring: Scoring, recipe_models: Mapping[str, Artifact]) -> dict["RewardRole", Artifact | str]:
    """The reward models by role; `recipe_models` are those trained by steps of the recipe."""
    named = {"helpfulness": scoring.helpfulness, "safety": scoring.safety}
    models = {**recipe_models, **{role: name for role, name in named.items() if name is not None}}
    return cast("dict[RewardRole, Artifact | str]", models)


def checked_models(
    scoring: Scoring, recipe_models: Mapping[str, Artifact], *, also: Collection["RewardRole"] = ("judge",)
) -> dict["RewardRole", Artifact | str]:
    """The models whose scores the recipe's rule reads, plus those in `also`; raise ConfigError if the rule cannot
    work with them."""
    models = named_models(scoring, recipe_models)
    facts = model_facts(models)
    for warning in check_scoring(scoring, facts):
        log.warning("%s", warning)
    read = {*models_read(scoring, facts), *also}
    return {role: model for role, model in models.items() if role in read}


def model_facts(models: Mapping["RewardRole", Artifact | str]) -> dict[ModelName, RewardModelFacts]:
    """Facts from the manifests of the models that may decide."""
    facts: dict[ModelName, RewardModelFacts] = {}
    for role in MODELS:
        model = models.get(role)
        if isinstance(model, Artifact):
            facts[role] = facts_of(str(model.path), model.manifest)
        elif model is not None:
            facts[role] = facts_of(model, _manifest_at(model))
    return facts


def _manifest_at(name: str) -> Manifest | None:
    """The manifest of a local llamachat artifact, or None for any other model."""
    folder = Path(from_home(name))
    if not folder.is_dir() or ((folder / "config.json").is_file() and not (folder / MANIFEST).is_file()):
        return None
    return read_artifact(folder, "reward_model", reader="scoring").manifest


def facts_of(name: str, manifest: Manifest | None) -> RewardModelFacts:
    """Facts about a llamachat artifact, or about a model without a manifest."""
    if manifest is None:
        return RewardModelFacts(name, None)
    probe = manifest.details.get("probe", {"is_fit": True})
    unfit = None if probe["is_fit"] else str(probe["verdict"])
    return RewardModelFacts(name, int(manifest.details.get("safety_labels", 0)), unfit)


def models_read(scoring: Scoring, models: Mapping[ModelName, RewardModelFacts]) -> tuple[ModelName, ...]:
    """The available models whose scores decide; `check_scoring` has checked that none is missing."""
    present: tuple[ModelName, ...] = tuple(name for name in MODELS if name in models)
    if scoring.combine == "single":
        return present[:1]
    if scoring.combine == "weighted":
        return tuple(name for name in MODELS if getattr(scoring.weights, name) != 0)
    return MODELS if function_name(scoring.combine) is None else present


def check_scoring(scoring: Scoring, models: Mapping[ModelName, RewardModelFacts]) -> list[str]:
    """Raise ConfigError if `scoring.combine` cannot work with the available models; return warnings."""
    for name in models_read(scoring, models) or MODELS[:1]:
        if name not in models and function_name(scoring.combine) is None:
            raise ConfigError(_absent(scoring, name, models))
    warnings = _gate_warnings(models["safety"]) if scoring.combine == "llama2_gate" else []
    return warnings + [_unfit(name, models[name]) for name in models_read(scoring, models) if models[name].unfit]


def _unfit(name: ModelName, model: RewardModelFacts) -> str:
    return (
        f"the {name} reward model {model.name} is {model.unfit}. A policy trained against it will exploit what it"
        " prefers. See the step's figures/probe.png, raise reward.contrast.share or add preferences to"
        f" data.{name}, and train it again (`make rm`) before rejection sampling and PPO."
    )


def _absent(scoring: Scoring, name: ModelName, models: Mapping[ModelName, RewardModelFacts]) -> str:
    there = ", ".join(f"{other} ({models[other].name})" for other in MODELS if other in models) or "none"
    reasons = {
        "llama2_gate": "The gate chooses between two models: safety for unsafe answers and prompts, else helpfulness",
        "weighted": f"scoring.weights.{name} is {getattr(scoring.weights, name):g}, and the sum needs its scores",
        "single": "Without one nothing can be scored",
    }
    ways = f"Train it (`make rm`), or name one: scoring.{name}=FOLDER_OR_HUB_NAME"
    if scoring.combine == "weighted":
        ways += f", or do without it: scoring.weights.{name}=0"
    elif scoring.combine == "llama2_gate" and models:
        ways += ", or use the only one: scoring.combine=single"
    return (
        f"scoring.combine: {scoring.combine} needs a {name} reward model, but there is none (available: {there})."
        f" {reasons[scoring.combine]}. {ways}."
    )


def _gate_warnings(safety: RewardModelFacts) -> list[str]:
    if safety.safety_labels is None:
        return [
            f"scoring.combine: llama2_gate reads sigmoid(score) of {safety.name} as the probability that an answer is"
            " safe. It was not trained here, so this is unchecked: watch ppo/reward/gate_fraction."
        ]
    if safety.safety_labels == 0:
        raise ConfigError(
            f"scoring.combine: llama2_gate compares sigmoid(score) of the safety model with scoring.safety_threshold, but"
            f" {safety.name} saw no safety labels. Trained on pairs alone it knows which answer is safer, not whether one"
            " is safe: a threshold on its score has no meaning. Train it with labels (chosen_is_safe and"
            " rejected_is_safe in data.safety, or data.labels), or combine without a gate: scoring.combine=weighted or"
            " single."
        )
    return []
