"""Open a role bank: which weights are shared, which are separate, and how each trained part is initialized.

If the policy is fully tuned, it is the trunk and the reference, and a new adapter is trained, which starts with the
trunk's logits. If it is an adapter, its base is the trunk, with a trained and a frozen copy of that adapter.
Reward models that are adapters on the same weights share the trunk. Others are loaded separately; two adapters on the
same other weights share one trunk. With `tuning.method` full, the policy and the critic are separate copies.
"""

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.tokenizer import FILLER_ID
from llamachat.config.section import from_home
from llamachat.config.sections import Base, Tuning
from llamachat.memory.role_bytes import place_reward_models
from llamachat.models import nf4
from llamachat.models.loading import (
    ONLY_ADAPTER,
    VALUES_PER_WEIGHT,
    adapter_dtype,
    attach_adapter,
    checked_details,
    device_of,
    load_base,
    load_policy,
    reading_of,
    rope_parameters,
)
from llamachat.models.reward_model import HEAD_WEIGHT, RewardModel, load_reward_model
from llamachat.models.roles import (
    CRITIC_BEGINS_AS,
    REWARD_ROLES,
    CriticKind,
    LanguageRole,
    RewardRole,
    Role,
    RoleBank,
    RoleSlot,
    adapter_weights,
    add_adapter,
    fill,
    shape_in,
    shape_of,
    weights_in,
)
from llamachat.models.scoring_head import ScoringLlama
from llamachat.models.start_checks import is_adapter, proved_start
from llamachat.models.weights import trunk_digest
from llamachat.runs.artifacts import MANIFEST, Artifact, read_artifact

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import LlamaForCausalLM, LlamaModel

    from llamachat.models.loading import LanguageModel

    Root = LlamaForCausalLM | ScoringLlama

log = logging.getLogger(__name__)
Source = Artifact | Path | str


def open_roles(
    *,
    policy: Artifact | None,
    base: Base,
    tuning: Tuning,
    reward_models: Mapping[RewardRole, Source],
    critic: CriticKind | None,
    seed: int,
    device: str = "auto",
    checkpointing: bool = False,
) -> RoleBank:
    """Open a bank with a policy, a reference, a critic and reward models (artifacts, folders or Hub names; or none).

    With policy None, training starts from the base. A separate critic starts from the helpfulness model, else from the
    safety model, else from the policy with a zero head; a shared one always from the policy with a zero head, since a
    reward model's head is meaningless on the policy's states. The judge does not take part in training. Critic "none"
    trains the policy without one; critic None trains nothing and opens only the policy and the reward models, without
    a reference. `seed` initializes new weights. The log lists the reward models that share the trunk, and the bytes of
    the others.
    """
    opening = _Opening(base, tuning, seed, device_of(device), *proved_start(base, tuning, policy))
    opening.place_policy(policy, with_reference=critic is not None)
    opening.place_reward_models(reward_models)
    value_head = None if critic in (None, "none") else opening.place_critic(critic, reward_models)
    return opening.bank(critic, value_head, checkpointing=checkpointing)


@dataclass(slots=True)
class _Trunk:
    """Weights that several adapters can share."""

    root: "Root"
    is_nf4: bool

    def carries(self, model: "_RewardSource") -> bool:
        """Whether the model is an adapter trained on exactly these weights, checked as in `load_policy`."""
        if model.artifact is None or not model.is_adapter or (model.details["method"] == "qlora") != self.is_nf4:
            return False
        if model.details["rope_parameters"] != rope_parameters(self.root.config):
            return False
        digest = nf4.source_digest(self.root)
        if digest is None:
            dtype = adapter_dtype(model.artifact.path)
            digest = trunk_digest(self.root, values_per_weight=VALUES_PER_WEIGHT, dtype=dtype)
        return digest == model.details["trunk"]


@dataclass(frozen=True, slots=True)
class _RewardSource:
    """A reward model before it is loaded."""

    place: Path | str
    artifact: Artifact | None  # None for a plain model
    details: Mapping[str, Any]  # for an adapter: those of its manifest, checked

    @property
    def is_adapter(self) -> bool:
        return self.artifact is not None and is_adapter(self.artifact)


@dataclass(slots=True)
class _Opening:
    base: Base
    tuning: Tuning
    seed: int
    device: str
    location: str
    chat_format: ChatFormat
    slots: dict[Role, RoleSlot] = field(default_factory=dict)
    trunks: list[_Trunk] = field(default_factory=list)  # shareable ones, the policy's first
    reward_models: dict[RewardRole, RewardModel] = field(default_factory=dict)
    other_vocabulary: set[RewardRole] = field(default_factory=set)
    shapes: dict[Role, "LoraConfig"] = field(default_factory=dict)  # of the adapters
    reference: "LlamaForCausalLM | None" = None
    policy_model: "LanguageModel | None" = None
    base_name: str = ""
    critic_begins_as: RewardRole | None = None

    def place_policy(self, policy: Artifact | None, *, with_reference: bool) -> None:
        """Load the policy and the reference."""
        self.base_name = self.location
        if self.tuning.method == "full":
            own = self._load_base()
            self.policy_model = own
            self.slots["policy"] = RoleSlot(own.model, None)
            if with_reference:
                self.reference = self._load_base()
                self.slots["reference"] = RoleSlot(self.reference.model, None)
            self.trunks.append(_Trunk(self.reference or own, is_nf4=False))
            return
        if policy is not None and is_adapter(policy):
            self.base_name = str(policy.manifest.details["base"])
            how = {"dtype": self.base.dtype, "device": self.device, "attention": self.base.attention}
            adapted = cast(Any, load_policy(policy.path, **how, is_trainable=True).model)
        else:
            adapted = cast(Any, attach_adapter(self._load_base(), self.tuning, seed=self.seed))
        root: LlamaForCausalLM = adapted.get_base_model()
        trunk = root.model
        self.policy_model = adapted
        self.shapes["policy"] = shape_of(adapted)
        self.trunks.append(_Trunk(root, is_nf4=self.tuning.method == "qlora"))
        self.slots["policy"] = RoleSlot(trunk, ONLY_ADAPTER)
        if with_reference:
            self.reference = root
            is_continued = policy is not None and is_adapter(policy)
            self.slots["reference"] = (
                self._copy_of("policy", "reference", root) if is_continued else RoleSlot(trunk, None)
            )

    def place_reward_models(self, sources: Mapping[RewardRole, Source]) -> None:
        """Load each reward model onto a loaded trunk or its own."""
        models: dict[RewardRole, _RewardSource] = {
            role: _reward_source(sources[role]) for role in REWARD_ROLES if role in sources
        }
        place_reward_models(
            models,
            self.trunks[0],
            carries=_Trunk.carries,
            share=self._place_adapter,
            load=self._load_beside,
        )

    def place_critic(self, critic: CriticKind, sources: Mapping[RewardRole, Source]) -> nn.Linear:
        """Create the critic's trunk or adapter; return its head, copied from a reward model or zero."""
        readable: list[RewardRole | None] = [
            role for role in CRITIC_BEGINS_AS if self.slots.get(role) and role not in self.other_vocabulary
        ]
        begins_as = None if critic == "shared" else next(iter(readable), None)
        if critic == "shared":
            self.slots["critic"] = self.slots["policy"]
        elif self.tuning.method == "full":
            own = None if begins_as is None else self._own_weights(begins_as, sources[begins_as])
            begins_as = None if own is None else begins_as
            self.slots["critic"] = RoleSlot(own or self._load_base().model, None)
        else:
            begun: Role = begins_as or "policy"
            self.slots["critic"] = self._copy_of(begun, "critic", self._root_of(self.slots[begun].trunk))
        head = _head(self.slots["critic"].trunk, dtype=torch.float32, has_bias=True)
        if begins_as is not None:
            fill({HEAD_WEIGHT: head.weight}, {HEAD_WEIGHT: cast(Any, self.reward_models[begins_as].model).score.weight})
            log.info("critic (%s): initialised from the %s model", critic, begins_as)
        else:
            log.info("critic (%s): initialised from the policy, with values of 0", critic)
        self.critic_begins_as = begins_as
        return head

    def bank(self, critic: CriticKind | None, value_head: nn.Linear | None, *, checkpointing: bool) -> RoleBank:
        """Freeze everything except the trained weights and set evaluation mode."""
        assert self.policy_model is not None, "the policy is placed first"
        models: list[nn.Module] = [self.policy_model]
        models += [part for part in (self.reference, value_head) if part is not None]
        models += [slot.trunk for slot in self.slots.values()]
        models += [model.model for model in self.reward_models.values()]
        for model in models:
            model.requires_grad_(False).eval()
        if value_head is not None:
            value_head.requires_grad_(True)
        if critic is not None:
            trained: list[Role] = ["policy", "critic"] if critic == "separate" else ["policy"]
            for slot in (self.slots[role] for role in trained):
                named = {} if slot.adapter is None else adapter_weights(slot.trunk, slot.adapter)
                for weight in named.values() if slot.adapter is not None else slot.trunk.parameters():
                    weight.requires_grad_(True)
            if self.tuning.method == "full":
                self.policy_model.requires_grad_(True)
        heads: dict[LanguageRole, nn.Module] = {"policy": cast(Any, self.policy_model).get_output_embeddings()}
        if self.reference is not None:
            heads["reference"] = cast(nn.Module, self.reference.get_output_embeddings())
        return RoleBank(
            slots=self.slots,
            policy_model=self.policy_model,
            lm_heads=heads,
            value_head=value_head,
            reward_models=self.reward_models,
            other_vocabulary=frozenset(self.other_vocabulary),
            chat_format=self.chat_format,
            base=self.base_name,
            critic=critic,
            critic_begins_as=self.critic_begins_as,
            checkpointing=checkpointing,
        )

    def _load_base(self) -> "LlamaForCausalLM":
        is_nf4 = self.tuning.method == "qlora"
        return load_base(self.base, source=self.location, device=self.device, is_nf4=is_nf4)

    def _place_adapter(self, role: RewardRole, model: "_RewardSource", trunk: _Trunk) -> None:
        """Load a reward model as another adapter on a loaded trunk."""
        artifact, root = model.artifact, trunk.root
        assert artifact is not None, "an adapter is an artifact of ours"
        self.shapes[role] = shape_in(artifact.path)
        values, others = weights_in(artifact.path)
        add_adapter(root, role, self.shapes[role], seed=self.seed)
        fill(adapter_weights(root.model, role), values)
        head = _head(root.model, dtype=root.dtype, has_bias=False)
        fill({HEAD_WEIGHT: head.weight}, others)
        self.slots[role] = RoleSlot(root.model, role)
        self.reward_models[role] = RewardModel(_scorer(root, head), **reading_of(artifact, model.details))
        name = self.reward_models[role].name
        log.debug("%s: %s is an adapter on weights that are loaded already", role, name)

    def _load_beside(self, role: RewardRole, model: "_RewardSource") -> _Trunk | None:
        """Load a reward model with its own weights; return its trunk if other adapters can share it."""
        allow_unproved = self.base.allow_unproved_tokenizer
        how: dict[str, Any] = {
            "device": self.device,
            "attention": self.base.attention,
            "allow_unproved": allow_unproved,
        }
        loaded = load_reward_model(model.place, **how)
        adapted: Any = loaded.model
        root: ScoringLlama = adapted.get_base_model() if model.is_adapter else adapted
        trunk = None
        if model.is_adapter:
            self.shapes[role] = shape_of(adapted)
            trunk = _Trunk(root, is_nf4=nf4.compute_dtype(root) is not None)
            self.trunks.append(trunk)
            root.score = cast(Any, root.score).modules_to_save[ONLY_ADAPTER]
        self.slots[role] = RoleSlot(root.model, ONLY_ADAPTER if model.is_adapter else None)
        self.reward_models[role] = replace(loaded, model=root)
        if not _same_ids(loaded.chat_format, self.chat_format):
            self.other_vocabulary.add(role)
        loaded_bytes = sum(weight.nbytes for weight in root.parameters())
        log.debug(
            "%s: %s has its own base, which is loaded separately: %.2f GiB",
            role,
            loaded.name,
            loaded_bytes / 2**30,
        )
        return trunk

    def _copy_of(self, role: Role, name: Literal["critic", "reference"], root: "Root") -> RoleSlot:
        """Copy a role's adapter to a new one on the same trunk; if there is none, create one of the recipe's shape."""
        slot = self.slots[role]
        shape = self.shapes.get(role) or self.shapes["policy"]
        add_adapter(root, name, shape, seed=self.seed)
        if slot.adapter is not None:
            fill(adapter_weights(slot.trunk, name), adapter_weights(slot.trunk, slot.adapter))
        return RoleSlot(slot.trunk, name)

    def _own_weights(self, role: RewardRole, source: Source) -> "LlamaModel | None":
        """A copy of a reward model's weights with its adapter merged; None for 4-bit weights, which cannot train."""
        slot = self.slots[role]
        if nf4.compute_dtype(self._root_of(slot.trunk)):
            return None
        path = source.path if isinstance(source, Artifact) else str(source)
        how: dict[str, Any] = {"dtype": self.base.dtype, "device": self.device, "attention": self.base.attention}
        model: Any = load_reward_model(path, **how, allow_unproved=self.base.allow_unproved_tokenizer).model
        return (model if slot.adapter is None else model.merge_and_unload()).model

    def _root_of(self, trunk: "LlamaModel") -> "Root":
        roots: list[Any] = [known.root for known in self.trunks] + [
            model.model for model in self.reward_models.values()
        ]
        return next(root for root in roots if root.model is trunk)


def _reward_source(source: Source) -> _RewardSource:
    """The reward model's artifact, if the folder is one; plain models and Hub names have none."""
    folder = Path(from_home(str(source.path if isinstance(source, Artifact) else source)))
    artifact = source if isinstance(source, Artifact) else None
    if artifact is None and (folder / MANIFEST).is_file():
        artifact = read_artifact(folder, "reward_model", reader="ppo")
    if artifact is None:
        return _RewardSource(str(source), None, {})
    return _RewardSource(artifact.path, artifact, checked_details(artifact) if is_adapter(artifact) else {})


def _scorer(root: "Root", head: nn.Linear) -> ScoringLlama:
    """A reward model from a shared trunk and its own head."""
    config = deepcopy(root.config)
    config.num_labels, config.pad_token_id = 1, FILLER_ID
    with torch.device("meta"):  # its own weights are never allocated
        model = ScoringLlama(config)
    model.model, model.score = root.model, head
    return model


def _head(trunk: "LlamaModel", *, dtype: torch.dtype, has_bias: bool) -> nn.Linear:
    """A linear head with one output for a trunk, all zeros; does not change torch's random state."""
    head = nn.utils.skip_init(nn.Linear, trunk.config.hidden_size, 1, bias=has_bias, dtype=dtype, device=trunk.device)
    for weight in head.parameters():
        nn.init.zeros_(weight)
    return cast(nn.Linear, head)


def _same_ids(one: ChatFormat, other: ChatFormat) -> bool:
    """Whether both formats encode every dialog to the same token ids."""
    if one.name != other.name or one.tokenizer.control != other.tokenizer.control:
        return False
    models = (one.tokenizer.sentencepiece_model, other.tokenizer.sentencepiece_model)
    if None not in models:
        return models[0] == models[1]
    return one.tokenizer.fast().to_str() == other.tokenizer.fast().to_str()
