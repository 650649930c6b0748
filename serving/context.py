"""The engine that samples from a policy, and how long a dialog it can read."""

from llamachat import rollout
from llamachat.config.sections import Rollout
from llamachat.models.loading import Policy
from llamachat.rollout.engine import LocalEngine


def open_engine(policy: Policy, *, rows_per_batch: int | None = None) -> LocalEngine:
    """The fastest engine that samples from the policy, at most `rows_per_batch` answers at once."""
    return rollout.open_engine(policy.model, policy.chat_format, Rollout(), rows_per_batch=rows_per_batch)


def longest_dialog(policy: Policy, engine: LocalEngine) -> int:
    """Tokens of prompt and answer together: no more than the policy was trained with or has positions for."""
    return min(policy.max_tokens, engine.context)
