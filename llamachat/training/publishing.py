"""How a step publishes its result: files and a manifest that describes them; for a model also its checked tokenizer."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.proof import prove_written, require_proof
from llamachat.chat_format.tokenizer import write_tokenizer
from llamachat.runs.artifacts import Artifact, Kind, Manifest, publish
from llamachat.runs.inputs import StepInputs

log = logging.getLogger(__name__)


def publish_step(
    inputs: StepInputs,
    kind: Kind,
    write: Callable[[Path], object],
    *,
    read: Mapping[str, Artifact | str],
    dropped: Mapping[str, int] | None = None,
    details: Mapping[str, Any] | None = None,
    ends_step: bool = True,
) -> Artifact:
    """Publish the files that `write` puts into a folder.

    `read` contains what they were made from, by role (`sources_of`), `dropped` the records that were left out, by
    reason.
    """
    manifest = Manifest(
        kind=kind,
        step=inputs.step,
        fingerprint=inputs.fingerprint,
        identity=inputs.identity,
        inputs={role: str(one.path) if isinstance(one, Artifact) else one for role, one in read.items()},
        seed=inputs.run.seed,
        dropped_records=dict(dropped or {}),
        details=dict(details or {}),
    )
    return publish(inputs.folder, manifest, write, ends_step=ends_step)


def publish_model(
    inputs: StepInputs,
    kind: Kind,
    save: Callable[[Path], object],
    *,
    chat_format: ChatFormat,
    details: Mapping[str, Any],
    notes: Mapping[str, Any],
    read: Mapping[str, Artifact | str],
    dropped: Mapping[str, int],
    ends_step: bool = True,
) -> Artifact:
    """Publish the weights that `save` writes, with their tokenizer; refuses a tokenizer that reads back differently.

    `details` are those of the model (`policy_details`), `notes` are further entries of the manifest.
    """
    rank = {} if inputs.tuning.method == "full" else {"rank": inputs.tuning.rank}

    def write(folder: Path) -> None:
        save(folder)
        write_tokenizer(chat_format.tokenizer, folder, chat_format.chat_template)
        report = prove_written(folder, chat_format)
        warning = require_proof(report, allow_unproved=inputs.base.allow_unproved_tokenizer)
        if warning:
            log.warning("%s", warning)

    details = {**details, **rank, **notes}
    return publish_step(inputs, kind, write, read=read, dropped=dropped, details=details, ends_step=ends_step)


def sources_of(inputs: StepInputs, models: Mapping[str, Artifact | str] | None = None) -> dict[str, Artifact | str]:
    """What a step's weights or dialogs were made from: its policy, or the base without one, and these reward models."""
    start: dict[str, Artifact | str] = {"policy": inputs.policy} if inputs.policy else {"base": inputs.base.model}
    return start | {f"reward_model/{role}": model for role, model in (models or {}).items()}
