"""The inputs of a step's run."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sft
from llamachat import distributed
from llamachat.config.layers import merged
from llamachat.config.loading import from_plain
from llamachat.runs.artifacts import MANIFEST, Artifact, read_artifact
from llamachat.runs.folder import StepFolder
from llamachat.runs.inputs import StepInputs, Tune
from pipelines.execution.resolve import Taken
from pipelines.recipe.recipe import Recipe, Step
from sft.config import Config as SftConfig


def stage_inputs(
    recipe: Recipe,
    step: Step,
    taken: Taken,
    *,
    folder: StepFolder,
    identity: dict[str, Any],
    fingerprint: str,
    deadline: float | None = None,
) -> StepInputs:
    """Everything that the step's stage may read besides its own section."""
    which: Any = step.product.makes.which  # one of the three reward models, or None: the stage's products say which
    inputs = StepInputs(
        step=step.name,
        folder=folder,
        identity=identity,
        fingerprint=fingerprint,
        run=recipe.run,
        base=recipe.base,
        tuning=step.tuning,
        data=recipe.data,
        tracking=recipe.sections.tracking,
        rollout=step.rollout,
        scoring=recipe.scoring,
        deadline=deadline,
        policy=taken.policy,
        reward_models=taken.reward_models,
        which=which,
        sft_policy=taken.sft_policy,
        pooled=taken.pooled,
        surveyed=tuple(taken.surveyed.values()),
        recipe=recipe.sections.model_dump(mode="json"),
    )
    return replace(inputs, tune=_tuner(recipe, inputs)) if step.stage.tunes else inputs


def _tuner(recipe: Recipe, inputs: StepInputs) -> Tune:
    """Supervised tuning on the dialogs that a step has made, in the step's folder."""

    def tune(
        dialogs: Artifact, *, over: Mapping[str, Any], from_base: bool = False, sft_share: float = 0.0
    ) -> Artifact:
        tuned, deadline = inputs.folder.tuned, inputs.deadline
        if (tuned / MANIFEST).is_file():
            return read_artifact(tuned, "policy", reader=inputs.step)
        if deadline is not None and distributed.broadcast_object(time.monotonic() > deadline):
            deadline = None  # what was sampled when the command's hours were over is learnt, not one step of it
        policy = None if from_base else inputs.policy
        of_dialogs = replace(inputs, deadline=deadline, policy=policy, dialogs=dialogs, sft_share=sft_share)
        return sft.run(tuning_section(recipe, over), of_dialogs)

    return tune


def tuning_section(recipe: Recipe, over: Mapping[str, Any]) -> SftConfig:
    """The section sft with the values that a step's own section puts over it."""
    return from_plain(SftConfig, merged(recipe.sections.sft.model_dump(mode="json"), over))
