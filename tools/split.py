"""Split corpora that are used for both the bundled base and data/.

Conversations with `fraction(first turn, salt="pretraining")` below this threshold are used for data/ (tuning), the
others for pretraining; none is in both.
"""

from llamachat.data.loading import fraction

TUNING_SHARE = 0.25


def is_kept_for_tuning(first_turn: str) -> bool:
    """Whether a conversation (or a story with its questions) of a shared corpus is kept out of pretraining."""
    return fraction(first_turn, salt="pretraining") < TUNING_SHARE
