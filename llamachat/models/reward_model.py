"""Reward models: a policy with a scalar head on the last token instead of its language-model head.

Built from the policy (Llama 2, arXiv:2307.09288, section 3.2.2: from chat checkpoints), saved in the formats of plain
transformers and PEFT, loaded and used for scoring. Reads and writes artifacts of kind `reward_model`, whose manifests
have the same details as a policy's; also reads other models with one label.
Shapes: N sequences, B rows, T positions. The head starts at zero, so before training every score is 0 and the
ranking loss is log 2.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.chat_format.dialog import DialogError, Message, check_messages, with_system
from llamachat.chat_format.format import shorten_alike
from llamachat.chat_format.proof import load_proved_format
from llamachat.chat_format.tokenizer import FILLER_ID, Tokenizer
from llamachat.config.section import from_home
from llamachat.config.sections import Base, Tuning
from llamachat.errors import ArtifactError
from llamachat.models import nf4
from llamachat.models.hub import tokenizer_folder
from llamachat.models.loading import (
    ADAPTER_WEIGHTS,
    VALUES_PER_WEIGHT,
    attach_adapter,
    check_trunk,
    checked_details,
    device_of,
    dtype_of,
    find_trunk,
    is_plain_model,
    load_adapted,
    load_config,
    load_full,
    load_llama,
    reading_of,
    reading_of_plain,
    save_policy,
    saved_dtype,
    scale_rope,
)
from llamachat.models.scoring_head import ScoringLlama, score_rows
from llamachat.models.start_checks import is_adapter, proved_start, shard_if_configured
from llamachat.models.weights import file_weights, language_head, trunk_digest
from llamachat.runs.artifacts import Artifact, read_artifact

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaConfig

    Scorer = ScoringLlama | PeftModel

log = logging.getLogger(__name__)

HEAD = "score"  # the head's name in transformers
HEAD_WEIGHT = f"{HEAD}.weight"
PLAIN_CLASS = "LlamaForSequenceClassification"


@dataclass(frozen=True, slots=True)
class RewardStart:
    """A reward model before training; the weights selected by `tuning.method` and the head are trainable."""

    model: "Scorer"
    chat_format: ChatFormat
    trunk: str  # folder or Hub name of the weights under an adapter, or of the initial weights in full tuning
    frozen_digest: str | None  # of the trunk under an adapter, which training must not change

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def language_head(self) -> Tensor:
        """The frozen language-model head [V, D] of the initial weights, read from their files."""
        return language_head(nf4.model_folder(self.trunk)).to(self.device)


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model ready for scoring."""

    model: "Scorer"
    tokenizer: Tokenizer
    chat_format: ChatFormat
    max_tokens: int  # of a whole dialog, as in training
    system: str | None  # the system text of its training, for dialogs without one
    name: str

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Encode a dialog that ends with an answer for scoring; the oldest pairs are dropped if it is too long.

        Raises `DialogError` if the dialog violates a rule or its last pair alone is too long.
        """
        check_messages(messages, ends_with="assistant")
        return self.encode_answers(messages[:-1], messages[-1:])[0]

    def encode_answers(self, prompt: Sequence[Message], answers: Sequence[Message]) -> list[tuple[int, ...]]:
        """Encode each answer to one prompt, dropping the same pairs for all until each fits, as in training."""
        prompt = with_system(prompt, self.system)
        dialogs = shorten_alike(self.chat_format, [(*prompt, answer) for answer in answers], max_tokens=self.max_tokens)
        if dialogs is None:
            raise DialogError(
                f"messages[{len(prompt)}]",
                f"is, with its question, longer than the {self.max_tokens} tokens that this reward model reads: a part "
                "of an answer has another score.",
                "Shorten question or answer, or drop the record.",
            )
        return [self.chat_format.encode_dialog(dialog, train_on=TrainOn.LAST_ANSWER).input_ids for dialog in dialogs]

    def score(self, dialogs: Sequence[Sequence[Message]]) -> list[float]:
        """The raw score of each dialog's last answer, before any sigmoid."""
        return self.score_ids([self.encode(dialog) for dialog in dialogs]).tolist()

    def score_ids(
        self,
        rows: Sequence[Sequence[int]],
        *,
        row_tokens: int | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Scores [N], fp32 on the CPU, of token rows: `score_rows` with this model."""
        return score_rows(self.model, rows, row_tokens=row_tokens, advance=advance)


def build_reward_model(
    base: Base, tuning: Tuning, *, policy: Artifact | None, seed: int, device: str = "auto"
) -> RewardStart:
    """Add a new head to the policy for training: on all its weights, a copy of its adapter, or a new adapter."""
    location, chat_format = proved_start(base, tuning, policy)
    continued = policy if policy is not None and is_adapter(policy) else None
    details: Mapping[str, Any] = {} if continued is None else checked_details(continued)
    where = "base.model"
    if continued is not None:
        location, where = find_trunk(continued, details)
    config = load_config(location, where=where)
    if continued is None:
        scale_rope(config, base.rope_scaling, max_tokens=base.max_tokens)
    else:
        config.rope_parameters = details["rope_parameters"]
    how: dict[str, Any] = {"dtype": dtype_of(base.dtype), "attention": base.attention, "device": device_of(device)}
    if tuning.method == "full":
        model = _load_scoring(location, config, has_head=False, **how)
        shard_if_configured(model, tuning)
        return RewardStart(model, chat_format, location, None)
    model = _load_trunk(location, config, is_nf4=tuning.method == "qlora", **how)
    shard_if_configured(model, tuning)
    if continued is not None:
        check_trunk(model, continued, details, where=where)
    adapted = attach_adapter(model, tuning, seed=seed, head=HEAD)
    if continued is not None:
        _copy_adapter(adapted, continued)
    trunk = str(details["base"]) if continued is not None else location
    return RewardStart(adapted, chat_format, trunk, reward_trunk_digest(adapted))


def reward_trunk_digest(model: "Scorer") -> str:
    """SHA-256 of all weights under head and adapter; equal digests mean that none has changed."""
    adapted: Any = model
    scoring = adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted
    return trunk_digest(scoring.model)


def save_reward_model(model: "Scorer", folder: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the weights so that `AutoModelForSequenceClassification`, with PEFT for an adapter, loads them.

    `weights` as in `save_policy`.
    """
    save_policy(model, folder, weights)
    if hasattr(model, "get_base_model"):  # PEFT's
        # PEFT lists every name that a head may have, some of them twice.
        _edit(folder / "adapter_config.json", {"modules_to_save": [HEAD]})
    else:
        _edit(folder / "config.json", {"architectures": [PLAIN_CLASS], "use_cache": False})


def load_reward_model(
    path: Path | str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    attention: str = "auto",
    is_trainable: bool = False,
    allow_unproved: bool = False,
) -> RewardModel:
    """Load the reward model of an artifact, or a plain Llama model with one label from a folder or Hub name.

    With `allow_unproved`, the plain model's tokenizer may have other ids than Llama 2's; this logs a warning.
    """
    device = device_of(device)
    if is_plain_model(path):
        chat_format, warning = load_proved_format(tokenizer_folder(str(path)), allow_unproved=allow_unproved)
        if warning:
            log.warning("%s", warning)
        how: dict[str, Any] = {"dtype": dtype, "attention": attention, "device": device}
        return _load_plain(str(path), chat_format, **how, is_trainable=is_trainable)
    artifact = read_artifact(Path(from_home(str(path))), "reward_model", reader="scoring")
    details = checked_details(artifact)
    how = {"dtype": dtype, "attention": attention, "device": device, "is_trainable": is_trainable}
    if details["method"] == "full":
        model: Any = load_full(artifact, details, _load_scoring, **how)
    else:
        model = load_adapted(artifact, details, _load_trunk, **how)
    return RewardModel(model.train(is_trainable), **reading_of(artifact, details))


def _load_plain(
    location: str, chat_format: ChatFormat, *, dtype: str, device: str, attention: str, is_trainable: bool
) -> RewardModel:
    config = load_config(location, where="reward model")
    if config.num_labels != 1:
        raise ArtifactError(
            f"{location}: its config.json has {config.num_labels} labels. A reward model has one, the score. Give a "
            "model that was saved from AutoModelForSequenceClassification with num_labels=1."
        )
    model = _load_scoring(location, config, dtype=saved_dtype(config, dtype), attention=attention, device=device)
    model = model.requires_grad_(is_trainable).train(is_trainable)
    return RewardModel(model, **reading_of_plain(location, config, chat_format))


def _load_scoring(location: str, config: "LlamaConfig", *, has_head: bool = True, **how: Any) -> ScoringLlama:
    """Load a folder's weights into a model with a head, which is zero if the folder has none."""
    config.num_labels = 1
    config.pad_token_id = FILLER_ID  # scores are read at the ends of rows; `write_tokenizer` writes the real pad id
    model: ScoringLlama = load_llama(
        location, config, kind=ScoringLlama, may_lack=() if has_head else (HEAD_WEIGHT,), **how
    )
    if not has_head:
        nn.init.zeros_(model.score.weight)
    return model


def _load_trunk(location: str, config: "LlamaConfig", **how: Any) -> ScoringLlama:
    """Load a trunk for an adapter, with a new head and the digest that matches an artifact to its base.

    The digest is the same as a policy's on this base. It is computed from the folder, since it includes the
    language-model head, which this model does not have.
    """
    model = _load_scoring(location, config, has_head=False, **how)
    if nf4.source_digest(model) is None:
        folder = nf4.model_folder(location)
        digest = trunk_digest(folder, values_per_weight=VALUES_PER_WEIGHT, dtype=model.dtype)
        nf4.remember_source(model, digest)
    return model


def _copy_adapter(adapted: "PeftModel", policy: Artifact) -> None:
    """Copy the values of the policy's adapter to the new one, which has the same shape."""
    weights = file_weights(policy.path / ADAPTER_WEIGHTS)
    policy_weights = {name.replace(".weight", ".default.weight"): weight for name, weight in weights}
    own = {name: weight for name, weight in adapted.named_parameters() if ".lora_" in name}
    assert policy_weights.keys() == own.keys(), "rank, alpha and targets were compared before"
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(policy_weights[name])


def _edit(file: Path, changes: Mapping[str, Any]) -> None:
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
