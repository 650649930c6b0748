"""Checks of policy and tuning before training, shared by all stages, and the proved tokenizer."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from llamachat import distributed
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.proof import load_proved_format
from llamachat.chat_format.tokenizer import write_tokenizer
from llamachat.config.sections import Base, Tuning, split_revision
from llamachat.errors import ConfigError
from llamachat.models.hub import tokenizer_folder
from llamachat.models.loading import SEVEN_PROJECTIONS, find_model
from llamachat.runs.artifacts import Artifact
from llamachat.runs.hub_commits import commit_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


def proved_start(base: Base, tuning: Tuning, policy: Artifact | None) -> tuple[str, ChatFormat]:
    """Folder or Hub name of the initial policy or, without one, of the base; and the chat format with its tokenizer."""
    if tuning.method == "qlora" and base.dtype != "bfloat16":  # TRL casts adapters on quantized models to bfloat16
        raise ConfigError(
            f"base.dtype: {base.dtype}, but tuning.method is qlora. Over a 4-bit base products and adapters are "
            "bfloat16; the optimizer keeps fp32 masters. Set base.dtype to bfloat16, or tuning.method to lora."
        )
    if base.dtype == "float16":
        raise ConfigError(
            "base.dtype: float16. Its gradients would need loss scaling, which is not implemented: gradients below 6e-8 become 0,"
            " and training silently gets worse. Set base.dtype to bfloat16, or to float32 on a card without it."
        )
    if policy is not None and is_adapter(policy):
        _check_same_adapter(tuning, policy)
    log.info("loading %s", policy.path if policy else base.model)
    location = str(policy.path) if policy else find_model(base.model, where="base.model")
    chat_format, warning = load_proved_format(
        tokenizer_folder(location), chat_format=base.chat_format, allow_unproved=base.allow_unproved_tokenizer
    )
    if policy is None and (commit := commit_of(base.model)) and split_revision(base.model)[1] is None:
        log.info("%s is at commit %s of the hub; base.model=%s@%s pins it", base.model, commit, base.model, commit)
    # Only warn about the base: a policy's tokenizer is the base's, compared with it when the policy was published.
    if warning and policy is None:
        log.warning("%s", warning)
    return location, chat_format


def is_adapter(artifact: Artifact) -> bool:
    """Whether the artifact is an adapter, with its base stored elsewhere."""
    return artifact.manifest.details.get("method") in ("lora", "qlora")


def fast_tokenizer(chat_format: ChatFormat, folder: Path) -> "PreTrainedTokenizerBase":
    """Write the artifact's tokenizer to `folder` and load it with transformers, as TRL's trainers require."""
    from transformers import AutoTokenizer

    write_tokenizer(chat_format.tokenizer, folder, chat_format.chat_template)
    return AutoTokenizer.from_pretrained(str(folder))


def shard_if_configured(model: nn.Module, tuning: Tuning) -> None:
    """Shard the model over the processes if they were launched with FSDP (configs/accelerate/fsdp2.yaml).

    Raises ConfigError for adapters, whose frozen base is replicated in each process.
    """
    if not distributed.are_sharded():
        return
    if tuning.method != "full":
        raise ConfigError(
            f"tuning.method: '{tuning.method}', but the launcher requests FSDP, which here shards only models"
            " whose weights are all trained. With adapters each card holds the whole base, in 4 bits with qlora. Launch"
            " with configs/accelerate/ddp.yaml, or set tuning.method to full."
        )
    distributed.shard_model(model)


def _check_same_adapter(tuning: Tuning, policy: Artifact) -> None:
    method: str = policy.manifest.details["method"]
    if tuning.method == "full":
        raise ConfigError(
            f"tuning.method: 'full', but the policy to continue ({policy.path}) is an adapter on a frozen base. Its base "
            f"would be trained under it. Set tuning.method to {method}, or export the policy merged and start from that."
        )
    if tuning.method != method:
        bits = {"lora": "the base in 16 or 32 bits", "qlora": "the base in 4 bits"}
        raise ConfigError(
            f"tuning.method: '{tuning.method}', but the adapter to continue ({policy.path}) was trained by {method}, on "
            f"{bits[method]}. It was trained for those weights. Set tuning.method to {method}, or train an "
            "adapter from the base."
        )
    adapter_config: Mapping[str, Any] = json.loads((policy.path / "adapter_config.json").read_text(encoding="utf-8"))
    targets = SEVEN_PROJECTIONS if tuning.targets == "all-linear" else tuning.targets
    compared = {
        "rank": (tuning.rank, adapter_config["r"]),
        "alpha": (tuning.alpha, adapter_config["lora_alpha"]),
        "targets": (sorted(targets), sorted(adapter_config["target_modules"])),
    }
    for key, (configured, saved) in compared.items():
        if configured != saved:
            raise ConfigError(
                f"tuning.{key}: {_words(configured)}, but the adapter to continue ({policy.path}) was made with {key} "
                f"{_words(saved)}. A step continues a copy of the adapter, so all steps of a run have adapters of one "
                f"shape. Set tuning.{key} to that."
            )


def _words(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else f"{value:g}"
