"""The reward models that score answers: the recipe's own, or those that `scoring` names in their place."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

from llamachat.config.sections import Scoring
from llamachat.models.roles import RewardRole
from llamachat.runs.artifacts import MANIFEST, Artifact, Manifest, read_artifact
from llamachat.scoring.requirements import MODELS, ModelName, RewardModelFacts, check_scoring, facts_of, models_read

log = logging.getLogger(__name__)


def named_models(scoring: Scoring, made: Mapping[str, Artifact]) -> dict[RewardRole, Artifact | str]:
    """By what they judge; `made` are those that steps of the recipe have made."""
    found: dict[RewardRole, Artifact | str] = {cast(RewardRole, role): artifact for role, artifact in made.items()}
    if scoring.helpfulness is not None:
        found["helpfulness"] = scoring.helpfulness
    if scoring.safety is not None:
        found["safety"] = scoring.safety
    return found


def checked_models(
    scoring: Scoring, made: Mapping[str, Artifact], *, also: Collection[RewardRole] = ("judge",)
) -> dict[RewardRole, Artifact | str]:
    """Those whose scores the recipe's rule reads, and `also` these; ConfigError where the rule cannot work with them."""
    models = named_models(scoring, made)
    facts = model_facts(models)
    for warning in check_scoring(scoring, facts):
        log.warning("%s", warning)
    read = {*models_read(scoring, facts), *also}
    return {role: model for role, model in models.items() if role in read}


def model_facts(models: Mapping[RewardRole, Artifact | str]) -> dict[ModelName, RewardModelFacts]:
    """What their manifests say of the models that may decide."""
    found: dict[ModelName, RewardModelFacts] = {}
    for role in MODELS:
        model = models.get(role)
        if isinstance(model, Artifact):
            found[role] = facts_of(str(model.path), model.manifest)
        elif model is not None:
            found[role] = facts_of(model, _manifest_at(model))
    return found


def _manifest_at(name: str) -> Manifest | None:
    """The manifest of a local artifact of ours; None of any other model."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or ((folder / "config.json").is_file() and not (folder / MANIFEST).is_file()):
        return None
    return read_artifact(folder, "reward_model", reader="scoring").manifest
