"""Opening a role bank: which weights are shared, which lie beside, and what each trained part starts from.

Where the policy is fully tuned, it is the trunk and the reference; the policy trained is a new adapter, whose first
logits are the trunk's. Where it is an adapter, its base is the trunk, with a trained and a frozen copy of that adapter.
Reward models that are adapters on those same weights come onto the trunk; others are loaded beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llamachat.models.role_bank import CriticKind, RewardRole, RoleBank

if TYPE_CHECKING:
    from llamachat.config.sections import Base, Tuning
    from llamachat.runs.artifacts import Artifact


def open_roles(
    *,
    policy: "Artifact | None",
    base: "Base",
    tuning: "Tuning",
    reward_models: "Mapping[RewardRole, Artifact | Path | str]",
    critic: CriticKind,
    seed: int,
    device: str = "auto",
    checkpointing: bool = False,
) -> RoleBank:
    """A bank with a policy, a reference, a critic and these reward models: artifacts, folders or hub names; may be none.

    Policy None starts from the base. The critic starts from the helpfulness model, else from the safety model, else from
    the policy with a head of zeros; the judge has no part in training. `seed` draws what is new. The log says which
    reward models share the trunk, and the bytes of those that do not.
    """
    raise NotImplementedError
