"""The five roles of PPO and the judge, with as few weights as possible: one trunk, an adapter and a head for each role.

policy (trained), reference (the initial policy), critic (trained), helpfulness, safety and judge (reward models).
`llamachat.models.open_roles` creates the bank. `hidden` is the only way to run a role, so that adapters are switched in
one place. Between calls the policy's adapter is active, so code that samples from `policy_model()` need not know about
roles.

Adapters are PEFT layers, but not switched with PEFT: `set_adapter` makes the named adapter trainable and freezes all
others, and so does leaving `disable_adapter()` (https://github.com/huggingface/peft/issues/3447). So `switch` sets the
two fields of a layer that PEFT would set; `requires_grad` is set once, when the bank is opened.
Dropout is off: modules stay in evaluation mode, as dropout would make the ratio of new to old probabilities start away
from 1. A checkpointed block is recomputed in `backward` with its forward pass's adapter, whatever role has run since.
Shapes: B rows, T positions, D hidden size, N sequences or positions that are read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamachat.chat_format import ChatFormat
from llamachat.models import nf4
from llamachat.models.final_states import final_states
from llamachat.models.loading import ADAPTER_WEIGHTS, ONLY_ADAPTER, gpus, policy_details, save_policy
from llamachat.models.reward_model import RewardModel
from llamachat.models.scoring_head import read_out, score_rows
from llamachat.models.sequence_attention import use_sequence_attention
from llamachat.models.weights import file_weights

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import LlamaModel

    from llamachat.models.loading import LanguageModel

Role = Literal["policy", "reference", "critic", "helpfulness", "safety", "judge"]
LanguageRole = Literal["policy", "reference"]
RewardRole = Literal["helpfulness", "safety", "judge"]
CriticKind = Literal["separate", "shared", "none"]
Trained = Literal["policy", "critic"]
REWARD_ROLES: tuple[RewardRole, ...] = ("helpfulness", "safety", "judge")
CRITIC_BEGINS_AS: tuple[RewardRole, ...] = ("helpfulness", "safety")  # the first available; never the judge
FILE_PREFIX = "base_model.model."  # of every name in PEFT's files
TRUNK_PREFIX = f"{FILE_PREFIX}model."


@dataclass(frozen=True, slots=True)
class RoleSlot:
    """The location of a role: a trunk and the name of its adapter there (None: the trunk without adapter)."""

    trunk: "LlamaModel"
    adapter: str | None


class RoleBank:
    """All roles, ready to run. Created by `open_roles`, which has set `requires_grad`."""

    def __init__(
        self,
        *,
        slots: Mapping[Role, RoleSlot],
        policy_model: "LanguageModel",
        lm_heads: Mapping[LanguageRole, nn.Module],
        value_head: nn.Linear | None,
        reward_models: Mapping[RewardRole, RewardModel],
        other_vocabulary: frozenset[RewardRole],
        chat_format: ChatFormat,
        base: str,
        critic: CriticKind | None,
        critic_begins_as: RewardRole | None,
        checkpointing: bool,
    ) -> None:
        """Take the models that `open_roles` has prepared.

        `critic` is None if nothing is trained and "none" if the policy is trained without one; `value_head` is None
        in both cases. `critic_begins_as` is the reward model whose head the critic's copies (None: zeros).
        `other_vocabulary` lists the reward models that do not read the policy's token ids. `base` is the folder or Hub
        name of the weights under the policy's adapter, or of the initial policy. `checkpointing` recomputes blocks in
        the backward pass.
        """
        self.critic: CriticKind | None = critic
        self.critic_begins_as = critic_begins_as
        self.base = base
        self.chat_format = chat_format
        self._slots = slots
        self._policy_model = policy_model
        self._heads = lm_heads
        self._value_head = value_head
        self._reward_models = reward_models
        self._other_vocabulary = other_vocabulary
        self._trunks = {id(slot.trunk): slot.trunk for slot in self._slots.values()}
        if self.device.type == "cpu":
            for trunk in self._trunks.values():
                use_sequence_attention(trunk)
        self._layers = {key: adapter_layers(trunk) for key, trunk in self._trunks.items()}
        self._active: dict[int, str | None] = {}
        for slot in (*self._slots.values(), self._slots["policy"]):
            self._activate(slot)
        self._trained: dict[Trained, dict[str, nn.Parameter]] = {}
        if critic is not None:
            self._trained["policy"] = self._policy_weights()
        if value_head is not None:
            self._trained["critic"] = self._critic_weights(value_head)
        if checkpointing:
            for trunk in self._trunks.values():
                self._checkpoint(trunk)

    @property
    def roles(self) -> tuple[Role, ...]:
        """The available roles, including a critic that shares the policy's forward pass."""
        return tuple(self._slots)

    @property
    def device(self) -> torch.device:
        """The device for token ids."""
        return self._slots["policy"].trunk.device

    def hidden(self, role: Role, batch: Mapping[str, Tensor]) -> Tensor:
        """Final hidden states [B, T, D], in the trunk's dtype, of packed rows or of right-padded rows.

        `batch` has input_ids [B, T] and, if a row contains several sequences, position_ids that restart at 0 for each;
        other keys are ignored, and there is no attention mask. Only the states of policy and critic carry gradients, if
        torch records them. For a shared critic, they are the policy's.
        """
        return self._run(role, batch, lambda trunk, inputs: trunk(**inputs, use_cache=False).last_hidden_state)

    def states(self, role: Role, batch: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """Final hidden states [N, D] at these indices [N] into the flattened rows of `batch`; as `hidden`, but faster."""
        return self._run(role, batch, lambda trunk, inputs: final_states(trunk, positions, **inputs))

    def _run(
        self, role: Role, batch: Mapping[str, Tensor], forward: Callable[[Any, Mapping[str, Any]], Tensor]
    ) -> Tensor:
        slot = self._slots[role]
        records = role in ("policy", "critic") and torch.is_grad_enabled()
        with torch.set_grad_enabled(records), _Activated(self, slot), _checkpointing(slot.trunk, records):
            return forward(slot.trunk, {"input_ids": batch["input_ids"], "position_ids": batch.get("position_ids")})

    @property
    def has_critic(self) -> bool:
        return self._value_head is not None

    def lm_head(self, role: LanguageRole) -> nn.Module:
        """Maps hidden states to logits [.., V]. Both roles share a module, unless all of the policy's weights train."""
        return self._heads[role]

    def values(self, batch: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """The critic's values [N], fp32, at these indices [N] into the flattened rows of `batch`."""
        return self.values_of(self.states("critic", batch, positions))

    def values_of(self, hidden: Tensor) -> Tensor:
        """The critic's values [..], fp32, of states [.., D] from `hidden` or `states`; a shared critic uses the policy's:
        one pass serves both."""
        assert self._value_head is not None, "the bank has a critic"
        return read_out(self._value_head, hidden)

    @torch.no_grad()
    def scale_critic(self, *, mean: float, std: float) -> None:
        """Fold whitening into the critic: a value becomes (value - mean) / std."""
        assert std > 0, "scores that are all the same are not whitened"
        assert self._value_head is not None, "the bank has a critic"
        self._value_head.weight.div_(std)
        self._value_head.bias.sub_(mean).div_(std)

    def scores(
        self,
        role: RewardRole,
        rows: Sequence[Sequence[int]],
        *,
        row_tokens: int | None = None,
        advance: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Raw scores [N], fp32 on the CPU, of token rows that each end with an answer; as `score_rows`, no gradients.

        The ids must be in the reward model's vocabulary: the policy's ids if `reads_policy_ids`, else those of
        `reward_model(role).encode(messages)`.
        """
        with _Activated(self, self._slots[role]):
            return score_rows(self._reward_models[role].model, rows, row_tokens=row_tokens, advance=advance)

    def reward_model(self, role: RewardRole) -> RewardModel:
        """How a role reads dialogs: `encode`, `max_tokens`, `system`, `name`. Use `scores` for its scores."""
        return self._reward_models[role]

    def reads_policy_ids(self, role: RewardRole) -> bool:
        """Whether the role's model has the policy's vocabulary."""
        return role not in self._other_vocabulary

    def policy_model(self) -> "LanguageModel":
        """The model to sample from, always with the policy's weights. A rollout engine reads it at each `refresh`;
        nothing else may run it or change its mode or `requires_grad`."""
        return self._policy_model

    def trainable(self) -> dict[Trained, list[nn.Parameter]]:
        """The trained parameters in a fixed order, for the optimizer; asserts that only these require gradients."""
        trained = {id(weight) for weights in self._trained.values() for weight in weights.values()}
        for index, module in enumerate(self._modules()):
            for name, weight in module.named_parameters():
                is_trained = id(weight) in trained
                assert weight.requires_grad == is_trained, f"requires_grad of {index}.{name} has been changed"
        return {role: list(weights.values()) for role, weights in self._trained.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights by name ("policy.<..>", "critic.<..>"), not copied: save or clone them immediately."""
        return {
            f"{role}.{name}": weight.detach()
            for role, weights in self._trained.items()
            for name, weight in weights.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load, in place, a `state_dict` of a bank of the same recipe."""
        fill(self.state_dict(), state)

    def frozen_digest(self) -> str:
        """SHA-256 of all frozen weights; equal digests before and after mean that none has changed."""
        trained = {weight.data_ptr() for weights in self._trained.values() for weight in weights.values()}
        digest = sha256()
        for index, module in enumerate(self._modules()):
            for name, weight in sorted(module.state_dict().items()):
                if weight.data_ptr() not in trained:
                    digest.update(f"{index} {name} {weight.dtype} {tuple(weight.shape)}\n".encode())
                    digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save_policy(self, folder: Path) -> None:
        """Write only the policy, with `llamachat.models.loading.save_policy`."""
        save_policy(self._policy_model, folder)

    def policy_details(self, *, max_tokens: int, system: str | None) -> dict[str, Any]:
        """The manifest's details about a policy published from this bank."""
        how: dict[str, Any] = {"base": self.base, "chat_format": self.chat_format.name}
        return policy_details(self._policy_model, **how, max_tokens=max_tokens, system=system)

    def _activate(self, slot: RoleSlot) -> None:
        key = id(slot.trunk)
        if key not in self._active or self._active[key] != slot.adapter:
            switch(self._layers[key], slot.adapter)
            self._active[key] = slot.adapter

    def _checkpoint(self, trunk: "LlamaModel") -> None:
        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            adapter = self._active[id(trunk)]
            return nullcontext(), _Activated(self, RoleSlot(trunk, adapter))

        function = partial(checkpoint, use_reentrant=False, context_fn=contexts)
        for block in cast(Any, trunk.layers):
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = function

    def _policy_weights(self) -> dict[str, nn.Parameter]:
        slot = self._slots["policy"]
        if slot.adapter is None:
            return dict(self._policy_model.named_parameters())
        return adapter_weights(slot.trunk, slot.adapter)

    def _critic_weights(self, value_head: nn.Linear) -> dict[str, nn.Parameter]:
        head = {f"head.{name}": weight for name, weight in value_head.named_parameters()}
        if self.critic == "shared":
            return head
        slot = self._slots["critic"]
        own = dict(slot.trunk.named_parameters()) if slot.adapter is None else adapter_weights(slot.trunk, slot.adapter)
        return own | head

    def _modules(self) -> list[nn.Module]:
        """All modules with weights; a tied language-model head contains the embeddings again."""
        scores = [cast(Any, model.model).score for model in self._reward_models.values()]
        value_head = [] if self._value_head is None else [self._value_head]
        modules = [*self._trunks.values(), *self._heads.values(), *value_head, *scores]
        return list({id(module): module for module in modules}.values())


class _Activated:
    """Activate a role's adapter within a block and restore the previous one afterwards. Reentrant."""

    def __init__(self, bank: RoleBank, slot: RoleSlot) -> None:
        self._bank, self._slot = bank, slot
        self._before: list[RoleSlot] = []

    def __enter__(self) -> None:
        trunk = self._slot.trunk
        self._before.append(RoleSlot(trunk, self._bank._active[id(trunk)]))
        self._bank._activate(self._slot)

    def __exit__(self, *_: object) -> None:
        self._bank._activate(self._before.pop())


@contextmanager
def _checkpointing(trunk: "LlamaModel", records: bool) -> Iterator[None]:
    """Set only the blocks to training mode, required for checkpointing in transformers; dropout inside stays off."""
    blocks = list(cast(Any, trunk.layers)) if records else []
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False


def adapter_layers(trunk: "LlamaModel") -> list[Any]:
    """The projections of a trunk that have adapters."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in trunk.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        assert hasattr(layer, "_active_adapter") and hasattr(layer, "_disable_adapters"), "PEFT has other switches now"
    return layers


def switch(layers: Sequence[Any], adapter: str | None) -> None:
    """Activate this adapter in the forward pass (None: no adapter)."""
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]


def add_adapter(root: nn.Module, name: str, config: "LoraConfig", *, seed: int) -> None:
    """Add a new adapter of this shape to a model's projections; initially it does not change the output."""
    from peft import inject_adapter_in_model

    config = deepcopy(config)
    config.modules_to_save = None  # the bank manages the heads
    with torch.random.fork_rng(devices=gpus()), catch_warnings():
        simplefilter("ignore", UserWarning)  # about a second adapter, which is intended
        torch.manual_seed(seed)
        inject_adapter_in_model(config, root, adapter_name=name)
    nf4.cast_adapter(root)


def shape_in(folder: Path) -> "LoraConfig":
    """The shape of a folder's adapter."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


def shape_of(model: "PeftModel") -> "LoraConfig":
    """The shape of the policy's adapter."""
    from peft import LoraConfig

    config = model.peft_config[ONLY_ADAPTER]
    assert isinstance(config, LoraConfig)
    return config


def adapter_weights(trunk: "LlamaModel", adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's weights by name without the adapter's name, so that adapters of one shape have equal keys."""
    mark = f".{adapter}."
    named = trunk.named_parameters()
    return {name.replace(mark, "."): weight for name, weight in named if ".lora_" in name and mark in name}


def weights_in(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A folder's adapter weights, named as in `adapter_weights`, and the other trained weights next to them."""
    adapter: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, weight in file_weights(folder / ADAPTER_WEIGHTS):
        if ".lora_" in name:
            adapter[name.removeprefix(TRUNK_PREFIX)] = weight
        else:
            others[name.removeprefix(FILE_PREFIX)] = weight
    return adapter, others


@torch.no_grad()
def fill(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy these values to the weights of the same names, in place and in the weights' dtype."""
    assert weights.keys() == values.keys(), "an adapter's shape is read from where its values are"
    for name, weight in weights.items():
        weight.copy_(values[name])
