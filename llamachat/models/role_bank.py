"""The five roles of PPO, and the judge, on as few weights as there can be: one trunk, an adapter and a head for each.

policy (trained), reference (the policy as it began), critic (trained), helpfulness, safety and judge (reward models).
`llamachat.models.role_opening.open_roles` makes the bank; `hidden` is the only way to run a role, so that the switching
of adapters lies in one place. Between calls the policy's adapter is the active one: what samples from `policy_model()`
needs to know nothing of roles. Adapters are switched past PEFT, whose own switches set `requires_grad`
(docs: https://github.com/huggingface/peft/issues/3447); here it is set once, when the bank is opened.
Two things surprise. Nothing is ever dropped: modules stay in evaluation mode, since with dropout the ratio of new to old
probabilities would not begin at 1. And a checkpointed block that is computed again during `backward` is computed with
the adapter of its forward pass, whatever role has run since.
Shapes: B rows, T positions, D hidden size, N sequences or positions that are read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamachat.models.loading import policy_details, save_policy
from llamachat.models.reward_model import RewardModel, score_rows
from llamachat.models.role_adapters import adapter_layers, switch

if TYPE_CHECKING:
    from transformers import LlamaModel

    from llamachat.chat_format import ChatFormat
    from llamachat.models.loading import LanguageModel

Role = Literal["policy", "reference", "critic", "helpfulness", "safety", "judge"]
RewardRole = Literal["helpfulness", "safety", "judge"]
CriticKind = Literal["separate", "shared"]
REWARD_ROLES: tuple[RewardRole, ...] = ("helpfulness", "safety", "judge")


@dataclass(frozen=True, slots=True)
class Seat:
    """Where a role sits: a trunk, and the name of its adapter there; None is the trunk as it is."""

    trunk: "LlamaModel"
    adapter: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Fittings:
    """What a bank is made of; `open_roles` gathers it."""

    seats: Mapping[Role, Seat]
    policy_model: "LanguageModel"
    reference_head: nn.Module  # the language-model head of the reference; the policy's own unless all weights train
    value_head: nn.Linear
    reward_models: Mapping[RewardRole, RewardModel]
    chat_format: "ChatFormat"
    base: str  # folder or hub name of the weights under the policy's adapter


class RoleBank:
    """All roles, ready to run. Make one with `open_roles`."""

    def __init__(self, fittings: Fittings, *, critic: CriticKind, checkpointing: bool) -> None:
        """With `checkpointing`, blocks keep only their input for a backward pass and are computed again in it."""
        self.critic: CriticKind = critic
        self.base = fittings.base  # what `policy_details(base=...)` says of a policy that is published from here
        self.chat_format = fittings.chat_format
        self._fittings = fittings
        self._checkpointing = checkpointing

    @property
    def roles(self) -> tuple[Role, ...]:
        """The roles that there are; the critic is one also where it shares the policy's trunk pass."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        raise NotImplementedError

    def hidden(self, role: Role, batch: Mapping[str, Tensor]) -> Tensor:
        """Final hidden states [B, T, D], in the trunk's dtype, of packed rows or of rows padded on the right.

        `batch` has input_ids [B, T] and, where a row holds several sequences, position_ids that begin anew with each;
        other keys are not read, and there is no attention mask. Of policy and critic the states carry gradients where
        torch records them; of the others never. A shared critic's are the policy's.
        """
        raise NotImplementedError

    def lm_head(self, role: Literal["policy", "reference"]) -> nn.Module:
        """From hidden states to logits [.., V]. One module for both, unless all of the policy's weights train."""
        raise NotImplementedError

    def values(self, batch: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """The critic's values [N], fp32, at these indices [N] into the flattened rows of `batch`."""
        raise NotImplementedError

    def values_of(self, hidden: Tensor) -> Tensor:
        """The critic's values [..], fp32, of hidden states [.., D] that `hidden` gave for it: for a shared critic, those
        of the policy, so that one pass serves both."""
        raise NotImplementedError

    def scale_critic(self, *, mean: float, std: float) -> None:
        """Fold a whitening into the critic: from now on a value is (value - mean) / std of what it was."""
        raise NotImplementedError

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
        raise NotImplementedError

    def reward_model(self, role: RewardRole) -> RewardModel:
        """How a role reads dialogs: `encode`, `max_tokens`, `system`, `name`. Its scores come from `scores` alone."""
        raise NotImplementedError

    def reads_policy_ids(self, role: RewardRole) -> bool:
        """Whether token ids mean the same text to the role's model as to the policy."""
        raise NotImplementedError

    def policy_model(self) -> "LanguageModel":
        """The model that answers are sampled from, always with the policy's weights. A rollout engine reads it at each
        `refresh`; nothing else runs it, and nothing sets its mode or its `requires_grad`."""
        raise NotImplementedError

    def trainable(self) -> dict[Literal["policy", "critic"], list[nn.Parameter]]:
        """What is trained, in a fixed order, for the optimizer; asserts that these and no others require gradients."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights by name ("policy.<..>", "critic.<..>"): not copied, so save or clone them at once."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back, in place, what `state_dict` gave in a bank of the same recipe."""
        raise NotImplementedError

    def frozen_digest(self) -> str:
        """SHA-256 of all weights that are not trained: equal before and after = none of them has moved."""
        raise NotImplementedError

    def storages(self) -> dict[int, int]:
        """Bytes by address of every weight there is, each counted once, whatever roles share it."""
        raise NotImplementedError

    def save_policy(self, folder: Path) -> None:
        """Write the policy as `llamachat.models.loading.save_policy` does, without the other roles."""
        raise NotImplementedError

    def policy_details(self, *, max_tokens: int, system: str | None) -> dict[str, Any]:
        """What the manifest of a policy published from here says about it."""
        raise NotImplementedError
