"""Which side of a split a conversation falls on: a hash of its first user turn, the same in every step.

Because the key is the first user turn, two conversations that open alike are never on both sides of a split.
"""

import hashlib
from typing import Literal

from llamachat.config.sections import Split

SplitName = Literal["test", "validation", "judge", "train"]


def fraction(text: str, *, salt: str = "split") -> float:
    """A number in [0, 1) that depends on the stripped text and the salt alone (SHA-256, so the same on every machine)."""
    digest = hashlib.sha256(f"{salt}\n{text.strip()}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def split_of(first_user_turn: str, split: Split) -> SplitName:
    """The part that a conversation belongs to: the fractions from 0 up are test, validation, judge, and the rest train."""
    position = fraction(first_user_turn)
    if position < split.test:
        return "test"
    if position < split.test + split.validation:
        return "validation"
    return "judge" if position < split.test + split.validation + split.judge else "train"


# Some corpora serve both the bundled base (pretraining) and data/ (tuning). Conversations below this fraction of
# `fraction(first turn, salt="pretraining")` belong to data/, the others to pretraining: none is in both.
TUNING_SHARE = 0.25


def is_kept_for_tuning(first_turn: str) -> bool:
    """Whether a conversation (or a story with its questions) of a corpus that serves both is kept out of pretraining."""
    return fraction(first_turn, salt="pretraining") < TUNING_SHARE
