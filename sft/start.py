"""What a training starts from: the base or an earlier policy, its proved tokenizer, and how the result is published."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llamachat import distributed
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.proof import prove_written, require_proof
from llamachat.chat_format.tokenizer import write_tokenizer
from llamachat.models.loading import (
    attach_adapter,
    load_base,
    load_policy,
    policy_details,
    save_policy,
    trunk_digest,
)
from llamachat.models.start_checks import fast_tokenizer, is_adapter, proved_start, shard_if_configured
from llamachat.runs.artifacts import Artifact, Manifest, publish
from llamachat.runs.inputs import StepInputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamachat.models.loading import LanguageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """A model whose trainable weights are those that `tuning.method` names."""

    model: "LanguageModel"
    chat_format: ChatFormat
    trunk: str  # folder or hub name of the weights under an adapter, or of the base
    frozen_digest: str | None  # of the trunk under an adapter: it must be the same when training ends

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def fast_tokenizer(self, folder: Path) -> "PreTrainedTokenizerBase":
        """The tokenizer that the artifact will ship, written to `folder`: the trainer wants one of transformers'."""
        return fast_tokenizer(self.chat_format, folder)


def load_start(inputs: StepInputs) -> Start:
    """Load the earlier policy where the step has one, else the base; attach an adapter where the recipe asks."""
    location, chat_format = proved_start(inputs.base, inputs.tuning, inputs.policy)
    model, trunk = _load_model(inputs, location)
    shard_if_configured(model, inputs.tuning)
    has_adapter = inputs.tuning.method != "full"
    return Start(model, chat_format, trunk, trunk_digest(model) if has_adapter else None)


def _load_model(inputs: StepInputs, trunk: str) -> "tuple[LanguageModel, str]":
    tuning, policy = inputs.tuning, inputs.policy
    if policy and is_adapter(policy):
        loaded = load_policy(
            policy.path,
            dtype=inputs.base.dtype,
            device="auto",
            attention=inputs.base.attention,
            is_trainable=True,
        )
        return loaded.model, str(policy.manifest.details["base"])
    model = load_base(inputs.base, source=trunk, device="auto", is_nf4=tuning.method == "qlora")
    if tuning.method == "full":
        return model, trunk
    return attach_adapter(model, tuning, seed=inputs.run.seed), trunk


def publish_policy(
    start: Start, inputs: StepInputs, *, dropped: Mapping[str, int], notes: Mapping[str, Any]
) -> Artifact:
    """Publish weights, tokenizer and manifest; refuses a moved trunk and a tokenizer that reads back differently."""
    if start.frozen_digest is not None:
        assert trunk_digest(start.model) == start.frozen_digest, "the trunk under an adapter is never written"

    weights = distributed.full_weights(start.model)

    def write(folder: Path) -> None:
        save_policy(start.model, folder, weights)
        write_tokenizer(start.chat_format.tokenizer, folder, start.chat_format.chat_template)
        report = prove_written(folder, start.chat_format)
        warning = require_proof(report, allow_unproved=inputs.base.allow_unproved_tokenizer)
        if warning:
            log.warning("%s", warning)

    details = policy_details(
        start.model,
        base=start.trunk,
        chat_format=inputs.base.chat_format,
        max_tokens=inputs.base.max_tokens,
        system=inputs.base.system,
    )
    if inputs.tuning.method != "full":
        details["rank"] = inputs.tuning.rank
    if inputs.dialogs and "ended_by" in inputs.dialogs.manifest.details:
        details["ended_by"] = inputs.dialogs.manifest.details["ended_by"]  # of the sampling
    taken = {"policy": str(inputs.policy.path)} if inputs.policy else {"base": inputs.base.model}
    manifest = Manifest(
        kind="policy",
        step=inputs.step,
        fingerprint=inputs.fingerprint,
        identity=inputs.identity,
        inputs=taken | ({"dialogs": str(inputs.dialogs.path)} if inputs.dialogs else {}),
        seed=inputs.run.seed,
        dropped_records=dict(dropped),
        details=details | dict(notes),
    )
    return publish(inputs.folder, manifest, write, ends_step=inputs.dialogs is None)
