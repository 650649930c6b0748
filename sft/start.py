"""What a training starts from: the base or an earlier policy, its proved tokenizer, and how the result is published."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.proof import load_proved_format, prove_written, require_proof
from llamachat.config.sections import Tuning
from llamachat.errors import ConfigError
from llamachat.models.hub import tokenizer_folder
from llamachat.models.loading import (
    SEVEN_PROJECTIONS,
    attach_adapter,
    find_model,
    load_base,
    load_policy,
    policy_details,
    save_policy,
    trunk_digest,
)
from llamachat.runs.artifacts import Artifact, Manifest, publish
from llamachat.runs.folder import StepFolder
from llamachat.tokenizer import write_tokenizer
from sft.config import Inputs

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
        from transformers import AutoTokenizer

        write_tokenizer(self.chat_format.tokenizer, folder, self.chat_format.chat_template)
        return AutoTokenizer.from_pretrained(str(folder))


def load_start(inputs: Inputs) -> Start:
    """Load the earlier policy where the step has one, else the base; attach an adapter where the recipe asks."""
    _check_dtype(inputs)
    log.info("loading %s", inputs.policy.path if inputs.policy else inputs.base.model)
    trunk = str(inputs.policy.path) if inputs.policy else find_model(inputs.base.model, where="base.model")
    chat_format, warning = load_proved_format(
        tokenizer_folder(trunk),
        chat_format=inputs.base.chat_format,
        allow_unproved=inputs.base.allow_unproved_tokenizer,
    )
    if warning:
        log.warning("%s", warning)
    model, trunk = _load_model(inputs, trunk)
    is_adapter = inputs.tuning.method != "full"
    return Start(model, chat_format, trunk, trunk_digest(model) if is_adapter else None)


def _check_dtype(inputs: Inputs) -> None:
    # TRL gives adapters on a quantised model bfloat16, whatever they have.
    if inputs.tuning.method == "qlora" and inputs.base.dtype != "bfloat16":
        raise ConfigError(
            f"base.dtype: {inputs.base.dtype}, but tuning.method is qlora. Over a 4-bit base products and adapters are "
            "bfloat16; the optimizer keeps fp32 masters. Set base.dtype to bfloat16, or tuning.method to lora."
        )


def _load_model(inputs: Inputs, trunk: str) -> "tuple[LanguageModel, str]":
    tuning, policy = inputs.tuning, inputs.policy
    made_by = policy.manifest.details.get("method") if policy else None
    if policy and made_by in ("lora", "qlora"):
        _check_same_adapter(tuning, policy)
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


def _check_same_adapter(tuning: Tuning, policy: Artifact) -> None:
    made_by: str = policy.manifest.details["method"]
    if tuning.method == "full":
        raise ConfigError(
            f"tuning.method: 'full', but the policy to continue ({policy.path}) is an adapter on a frozen base. Its base "
            f"would be trained under it. Set tuning.method to {made_by}, or export the policy merged and start from that."
        )
    if tuning.method != made_by:
        bits = {"lora": "the base in 16 or 32 bits", "qlora": "the base in 4 bits"}
        raise ConfigError(
            f"tuning.method: '{tuning.method}', but the adapter to continue ({policy.path}) was trained by {made_by}, on "
            f"{bits[made_by]}. It has learnt to go with those very weights. Set tuning.method to {made_by}, or train an "
            "adapter anew from the base."
        )
    made: Mapping[str, Any] = json.loads((policy.path / "adapter_config.json").read_text(encoding="utf-8"))
    targets = SEVEN_PROJECTIONS if tuning.targets == "all-linear" else tuning.targets
    compared = {
        "rank": (tuning.rank, made["r"]),
        "alpha": (tuning.alpha, made["lora_alpha"]),
        "targets": (sorted(targets), sorted(made["target_modules"])),
    }
    for key, (asked, found) in compared.items():
        if asked != found:
            raise ConfigError(
                f"tuning.{key}: {_words(asked)}, but the adapter to continue ({policy.path}) was made with {key} "
                f"{_words(found)}. A step continues a copy of the adapter, so all steps of a run have adapters of one "
                f"shape. Set tuning.{key} to that."
            )


def _words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else f"{value:g}"


def publish_policy(start: Start, inputs: Inputs, *, dropped: Mapping[str, int]) -> Artifact:
    """Publish weights, tokenizer and manifest; refuses a moved trunk and a tokenizer that reads back differently."""
    if start.frozen_digest is not None:
        assert trunk_digest(start.model) == start.frozen_digest, "the trunk under an adapter is never written"

    def write(folder: Path) -> None:
        save_policy(start.model, folder)
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
    manifest = Manifest(
        kind="policy",
        step=inputs.step,
        fingerprint=inputs.fingerprint,
        identity=inputs.identity,
        inputs={"policy": str(inputs.policy.path)} if inputs.policy else {"base": inputs.base.model},
        seed=inputs.run.seed,
        dropped_records=dict(dropped),
        details=details,
    )
    return publish(StepFolder(inputs.folder), manifest, write)
