"""What of a conversation a policy is shown: the newest whole pairs that leave room for an answer."""

from collections.abc import Sequence

from llamachat import rollout
from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import Rollout
from llamachat.models.loading import Policy
from llamachat.rollout.engine import LocalEngine


def open_engine(policy: Policy, *, rows_per_batch: int | None = None) -> LocalEngine:
    """The fastest engine that samples from the policy, at most `rows_per_batch` answers at once."""
    return rollout.open_engine(policy.model, policy.chat_format, Rollout(), rows_per_batch=rows_per_batch)


def longest_dialog(policy: Policy, engine: LocalEngine) -> int:
    """Tokens of prompt and answer together: no more than the policy was trained with or has positions for."""
    return min(policy.max_tokens, engine.context)


def fit(
    chat_format: ChatFormat, messages: Sequence[Message], *, limit: int, max_new_tokens: int
) -> tuple[Message, ...] | None:
    """The conversation without its oldest whole pairs, so that the answer has room; None where it cannot fit.

    The answer gets its `max_new_tokens`, at most half of `limit`; where the last question alone is longer than that
    leaves, what is left.
    """
    for room in (limit - min(max_new_tokens, limit // 2), limit - 1):
        fitting = chat_format.shorten(messages, max_tokens=room)
        if fitting is not None:
            return fitting
    return None
