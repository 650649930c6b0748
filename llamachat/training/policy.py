"""The policy that a training starts from, and the one that it publishes."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from llamachat import distributed
from llamachat.chat_format import ChatFormat
from llamachat.models.loading import (
    attach_adapter,
    load_base,
    load_policy,
    policy_details,
    save_policy,
    trunk_digest,
)
from llamachat.models.start_checks import is_adapter, proved_start, shard_if_configured
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.training.publishing import publish_model, sources_of

if TYPE_CHECKING:
    from llamachat.models.loading import LanguageModel


@dataclass(frozen=True, slots=True)
class Start:
    """A model whose trainable weights are those of `tuning.method`."""

    model: "LanguageModel"
    chat_format: ChatFormat
    trunk: str  # folder or hub name of the weights under an adapter, or of the base
    frozen_digest: str | None  # of the trunk under an adapter: it must be unchanged when training ends

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_start(inputs: StepInputs) -> Start:
    """Load the earlier policy if the step has one, else the base; attach an adapter if the recipe asks for one."""
    location, chat_format = proved_start(inputs.base, inputs.tuning, inputs.policy)
    model, trunk = _load_model(inputs, location)
    shard_if_configured(model, inputs.tuning)
    has_adapter = inputs.tuning.method != "full"
    return Start(model, chat_format, trunk, trunk_digest(model) if has_adapter else None)


def _load_model(inputs: StepInputs, trunk: str) -> "tuple[LanguageModel, str]":
    tuning, policy = inputs.tuning, inputs.policy
    if policy and is_adapter(policy):
        dtype, attention = inputs.base.dtype, inputs.base.attention
        loaded = load_policy(policy.path, dtype=dtype, device="auto", attention=attention, is_trainable=True)
        return loaded.model, str(policy.manifest.details["base"])
    model = load_base(inputs.base, source=trunk, device="auto", is_nf4=tuning.method == "qlora")
    if tuning.method == "full":
        return model, trunk
    return attach_adapter(model, tuning, seed=inputs.run.seed), trunk


def publish_policy(
    start: Start, inputs: StepInputs, *, dropped: Mapping[str, int], notes: Mapping[str, Any]
) -> Artifact:
    """Publish weights, tokenizer and manifest; refuses a changed trunk, and a tokenizer that reads back differently."""
    if start.frozen_digest is not None:
        assert trunk_digest(start.model) == start.frozen_digest, "the trunk under an adapter never changes"
    dialogs = inputs.dialogs
    if dialogs and "ended_by" in dialogs.manifest.details:
        notes = {"ended_by": dialogs.manifest.details["ended_by"], **notes}  # of the sampling
    return publish_model(
        inputs,
        "policy",
        partial(save_policy, start.model, weights=distributed.full_weights(start.model)),
        chat_format=start.chat_format,
        details=policy_details(
            start.model,
            base=start.trunk,
            chat_format=inputs.base.chat_format,
            max_tokens=inputs.base.max_tokens,
            system=inputs.base.system,
        ),
        notes=notes,
        read=sources_of(inputs) | ({"dialogs": dialogs} if dialogs else {}),
        dropped=dropped,
        ends_step=dialogs is None,
    )
