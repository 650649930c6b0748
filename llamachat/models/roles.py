"""The five roles of PPO, and the judge, on as few weights as possible: one trunk, an adapter and a head for each.

policy (trained), reference (the policy as it began), critic (trained), helpfulness, safety and judge (reward models).
`llamachat.models.open_roles` makes the bank; `hidden` is the only way to run a role, so that adapters are switched in
one place. Between calls the policy's adapter is the active one: what samples from `policy_model()` needs to know
nothing of roles.

Adapters are PEFT's layers, without its switches: `set_adapter` makes the named adapter trainable and freezes all others,
and leaving `disable_adapter()` does so again (https://github.com/huggingface/peft/issues/3447). So `switch` sets the two
fields of a layer that PEFT's own switches write; `requires_grad` is set once, when the bank is opened.
There is no dropout: modules stay in evaluation mode, since with dropout the ratio of new to old probabilities would not
begin at 1. A checkpointed block that is computed again during `backward` is computed with the adapter of its forward
pass, whatever role has run since.
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
CRITIC_BEGINS_AS: tuple[RewardRole, ...] = ("helpfulness", "safety")  # the first that there is; the judge only tells
FILE_PREFIX = "base_model.model."  # of every name in PEFT's files
TRUNK_PREFIX = f"{FILE_PREFIX}model."


@dataclass(frozen=True, slots=True)
class RoleSlot:
    """Where a role sits: a trunk, and the name of its adapter there; None is the trunk as it is."""

    trunk: "LlamaModel"
    adapter: str | None


class RoleBank:
    """All roles, ready to run. Made by `open_roles`, which has set what requires gradients."""

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
        """`critic` is None where nothing is trained, "none" where the policy is and there is no critic: `value_head` is None in
        both; `critic_begins_as` is the reward model whose head the
        critic's is a copy of (None: it is zeros); `other_vocabulary` are the reward models that do not read the policy's
        token ids; `base` is the folder or hub name of the weights under the policy's adapter, or that the policy began as. With `checkpointing`, blocks keep only their input for a backward pass and are computed again
        in it.
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
        """The roles that there are; the critic is one also where it shares the policy's trunk pass."""
        return tuple(self._slots)

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return self._slots["policy"].trunk.device

    def hidden(self, role: Role, batch: Mapping[str, Tensor]) -> Tensor:
        """Final hidden states [B, T, D], in the trunk's dtype, of packed rows or of rows padded on the right.

        `batch` has input_ids [B, T] and, where a row holds several sequences, position_ids that restart at 0 with each;
        other keys are not read, and there is no attention mask. Of policy and critic the states carry gradients where
        torch records them; of the others never. A shared critic's are the policy's.
        """
        slot = self._slots[role]
        records = role in ("policy", "critic") and torch.is_grad_enabled()
        with torch.set_grad_enabled(records), _Activated(self, slot), _checkpointing(slot.trunk, records):
            ids_BT, positions_BT = batch["input_ids"], batch.get("position_ids")
            return cast(Any, slot.trunk)(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).last_hidden_state

    @property
    def has_critic(self) -> bool:
        return self._value_head is not None

    def lm_head(self, role: LanguageRole) -> nn.Module:
        """From hidden states to logits [.., V]. One module for both, unless all of the policy's weights train."""
        return self._heads[role]

    def values(self, batch: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """The critic's values [N], fp32, at these indices [N] into the flattened rows of `batch`."""
        return self.values_of(self.hidden("critic", batch).flatten(0, 1)[positions])

    def values_of(self, hidden: Tensor) -> Tensor:
        """The critic's values [..], fp32, of hidden states [.., D] that `hidden` gave for it: for a shared critic, those
        of the policy, so that one pass serves both."""
        assert self._value_head is not None, "the bank has a critic"
        return read_out(self._value_head, hidden)

    @torch.no_grad()
    def scale_critic(self, *, mean: float, std: float) -> None:
        """Fold a whitening into the critic: from now on a value is (value - mean) / std of what it was."""
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

        The ids must be in the model's own vocabulary: the policy's where `reads_policy_ids`, else from
        `reward_model(role).encode(messages)`.
        """
        with _Activated(self, self._slots[role]):
            return score_rows(self._reward_models[role].model, rows, row_tokens=row_tokens, advance=advance)

    def reward_model(self, role: RewardRole) -> RewardModel:
        """How a role reads dialogs: `encode`, `max_tokens`, `system`, `name`. Its scores come from `scores` alone."""
        return self._reward_models[role]

    def reads_policy_ids(self, role: RewardRole) -> bool:
        """Whether token ids mean the same text to the role's model as to the policy."""
        return role not in self._other_vocabulary

    def policy_model(self) -> "LanguageModel":
        """The model that answers are sampled from, always with the policy's weights. A rollout engine reads it at each
        `refresh`; nothing else runs it, and nothing sets its mode or its `requires_grad`."""
        return self._policy_model

    def trainable(self) -> dict[Trained, list[nn.Parameter]]:
        """What is trained, in a fixed order, for the optimizer; asserts that these and no others require gradients."""
        trained = {id(weight) for weights in self._trained.values() for weight in weights.values()}
        for index, module in enumerate(self._modules()):
            for name, weight in module.named_parameters():
                is_trained = id(weight) in trained
                assert weight.requires_grad == is_trained, f"requires_grad of {index}.{name} has been changed"
        return {role: list(weights.values()) for role, weights in self._trained.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights by name ("policy.<..>", "critic.<..>"): not copied, so save or clone them at once."""
        return {
            f"{role}.{name}": weight.detach()
            for role, weights in self._trained.items()
            for name, weight in weights.items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back, in place, what `state_dict` gave in a bank of the same recipe."""
        fill(self.state_dict(), state)

    def frozen_digest(self) -> str:
        """SHA-256 of all weights that are not trained: equal before and after = none of them has moved."""
        trained = {weight.data_ptr() for weights in self._trained.values() for weight in weights.values()}
        digest = sha256()
        for index, module in enumerate(self._modules()):
            for name, weight in sorted(module.state_dict().items()):
                if weight.data_ptr() not in trained:
                    digest.update(f"{index} {name} {weight.dtype} {tuple(weight.shape)}\n".encode())
                    digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def save_policy(self, folder: Path) -> None:
        """Write the policy as `llamachat.models.loading.save_policy` does, without the other roles."""
        save_policy(self._policy_model, folder)

    def policy_details(self, *, max_tokens: int, system: str | None) -> dict[str, Any]:
        """What the manifest of a policy published from here says about it."""
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
        """Everything that holds weights; a language-model head may hold the embeddings once more."""
        scores = [cast(Any, model.model).score for model in self._reward_models.values()]
        value_head = [] if self._value_head is None else [self._value_head]
        modules = [*self._trunks.values(), *self._heads.values(), *value_head, *scores]
        return list({id(module): module for module in modules}.values())


class _Activated:
    """A role at work: its adapter is the active one; afterwards the one before is. May be entered again."""

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
    """Put the blocks into training mode, since transformers checkpoints only there; not the modules inside, so no dropout."""
    blocks = list(cast(Any, trunk.layers)) if records else []
    for block in blocks:
        block.training = True
    try:
        yield
    finally:
        for block in blocks:
            block.training = False


def adapter_layers(trunk: "LlamaModel") -> list[Any]:
    """The projections of a trunk that hold adapters."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in trunk.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        assert hasattr(layer, "_active_adapter") and hasattr(layer, "_disable_adapters"), "PEFT has other switches now"
    return layers


def switch(layers: Sequence[Any], adapter: str | None) -> None:
    """Make this adapter the one that takes part in the forward pass; None: none does."""
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]


def add_adapter(root: nn.Module, name: str, config: "LoraConfig", *, seed: int) -> None:
    """A new adapter of this shape on the projections of a model, which adds nothing yet."""
    from peft import inject_adapter_in_model

    config = deepcopy(config)
    config.modules_to_save = None  # heads are kept by the bank
    with torch.random.fork_rng(devices=gpus()), catch_warnings():
        simplefilter("ignore", UserWarning)  # that there is another adapter: that is what is wanted
        torch.manual_seed(seed)
        inject_adapter_in_model(config, root, adapter_name=name)
    nf4.cast_adapter(root)


def shape_in(folder: Path) -> "LoraConfig":
    """The shape of the adapter in a folder."""
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
    """An adapter's weights by their names without the adapter's own: two adapters of one shape have the same."""
    mark = f".{adapter}."
    named = trunk.named_parameters()
    return {name.replace(mark, "."): weight for name, weight in named if ".lora_" in name and mark in name}


def weights_in(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter's weights in a folder by the names of `adapter_weights`, and what was trained beside it."""
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
    """Put these values into weights of the same names, in place and in the weights' dtype."""
    assert weights.keys() == values.keys(), "an adapter's shape is read from where its values are"
    for name, weight in weights.items():
        weight.copy_(values[name])
