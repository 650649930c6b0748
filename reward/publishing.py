"""How a trained reward model is published: weights, tokenizer and manifest, whole or not at all."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamachat import distributed
from llamachat.chat_format.proof import prove_written, require_proof
from llamachat.chat_format.tokenizer import write_tokenizer
from llamachat.models.reward_model import (
    RewardStart,
    reward_model_details,
    reward_trunk_digest,
    save_reward_model,
)
from llamachat.runs.artifacts import Artifact, Manifest, publish
from llamachat.runs.inputs import StepInputs

log = logging.getLogger(__name__)


def publish_reward_model(
    start: RewardStart, inputs: StepInputs, *, dropped: Mapping[str, int], safety_labels: int, notes: Mapping[str, Any]
) -> Artifact:
    """Publish the step's model; refuses a moved trunk and a tokenizer that reads back differently."""
    if start.frozen_digest is not None:
        assert reward_trunk_digest(start.model) == start.frozen_digest, "the trunk under an adapter is never written"

    weights = distributed.full_weights(start.model)

    def write(folder: Path) -> None:
        save_reward_model(start.model, folder, weights)
        write_tokenizer(start.chat_format.tokenizer, folder, start.chat_format.chat_template)
        report = prove_written(folder, start.chat_format)
        warning = require_proof(report, allow_unproved=inputs.base.allow_unproved_tokenizer)
        if warning:
            log.warning("%s", warning)

    details = reward_model_details(
        start.model,
        base=start.trunk,
        chat_format=inputs.base.chat_format,
        max_tokens=inputs.base.max_tokens,
        system=inputs.base.system,
    )
    details["which"] = inputs.which
    # Without any, sigmoid(score) is no probability, and a threshold on it means nothing.
    details["safety_labels"] = safety_labels
    if inputs.tuning.method != "full":
        details["rank"] = inputs.tuning.rank
    manifest = Manifest(
        kind="reward_model",
        step=inputs.step,
        fingerprint=inputs.fingerprint,
        identity=inputs.identity,
        inputs={"policy": str(inputs.policy.path)} if inputs.policy else {"base": inputs.base.model},
        seed=inputs.run.seed,
        dropped_records=dict(dropped),
        details=details | dict(notes),
    )
    return publish(inputs.folder, manifest, write)
