"""Which of the corpora that serve both the bundled base and data/ goes where.

Conversations below this fraction of `fraction(first turn, salt="pretraining")` belong to data/ (tuning), the others to
pretraining: none is in both.
"""

from llamachat.data.loading import fraction

TUNING_SHARE = 0.25


def is_kept_for_tuning(first_turn: str) -> bool:
    """Whether a conversation (or a story with its questions) of a corpus that serves both is kept out of pretraining."""
    return fraction(first_turn, salt="pretraining") < TUNING_SHARE
