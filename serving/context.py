"""The engine that samples from a policy, and the maximum length of a dialog."""

from llamachat import rollout
from llamachat.config.sections import Rollout
from llamachat.models.loading import Policy
from llamachat.rollout.engine import LocalEngine


def open_engine(policy: Policy, *, rows_per_batch: int | None = None) -> LocalEngine:
    """The fastest engine for the policy, with at most `rows_per_batch` answers at once."""
    return rollout.open_engine(policy.model, policy.chat_format, Rollout(), rows_per_batch=rows_per_batch)


def longest_dialog(policy: Policy, engine: LocalEngine) -> int:
    """Maximum tokens of prompt and answer together: the length in training, or the number of positions if smaller."""
    return min(policy.max_tokens, engine.context)
