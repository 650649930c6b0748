"""What is said in the dialogs: sequences of user turns, from the dialogs of `data.sft`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Dialog, Message
from llamachat.config.sections import Data
from llamachat.data.loading import load_mixture
from llamachat.data.packing import epoch_order
from llamachat.errors import DataError

log = logging.getLogger(__name__)

Turns = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sequences:
    """User turns by side; no dialog is on two of them."""

    train: list[Turns]
    validation: list[Turns]
    test: list[Turns]


def load_sequences(data: Data, chat_format: ChatFormat, *, turns: int, most_tokens: int, seed: int) -> Sequences:
    """Sequences of `turns` user turns of at most `most_tokens` tokens each.

    A dialog that is shorter is gone on with by other dialogs of its side: what matters is that many turns lie between
    the instruction and the last answer, not that they are about one thing (ours; the paper takes dialogs as they are).
    """
    mixture = load_mixture(data.sft, data.split, Dialog, forbidden=chat_format.forbidden, seed=seed)
    train, validation, test = (
        joined(dialogs, chat_format, turns=turns, most_tokens=most_tokens, key=_key(seed, side))
        for side, dialogs in (("train", mixture.train), ("validation", mixture.validation), ("test", mixture.test))
    )
    if not train or not test:
        raise DataError(
            f"data.sft: its dialogs give {len(train)} sequences of {turns} user turns of at most {most_tokens} tokens to "
            f"learn from and {len(test)} to measure with, after splitting by first user turn. Ghost Attention needs both. "
            "Add dialogs, or lower gatt.turns and gatt.evaluation_turns."
        )
    return Sequences(train, validation, test)


def held_out_sequences(data: Data, chat_format: ChatFormat, *, turns: int, most_tokens: int, seed: int) -> list[Turns]:
    """Those of the test side alone, where measuring is all there is to do; none where `data.sft` gives none."""
    if not data.sft:
        return []
    mixture = load_mixture(data.sft, data.split, Dialog, forbidden=chat_format.forbidden, seed=seed)
    return joined(mixture.test, chat_format, turns=turns, most_tokens=most_tokens, key=_key(seed, "test"))


def _key(seed: int, side: str) -> str:
    return f"gatt {seed} {side}"


def joined(
    dialogs: Sequence[Dialog], chat_format: ChatFormat, *, turns: int, most_tokens: int, key: str
) -> list[Turns]:
    """User turns of the dialogs in a seeded order, in sequences of so many; a dialog that says a long turn is left out."""
    found: list[Turns] = []
    begun: list[str] = []
    for place in epoch_order(len(dialogs), 1, key):
        said = [message.content for message in dialogs[place].messages if message.role == "user"]
        lengths = (len(chat_format.encode_prompt((Message("user", text),))) for text in said)
        if any(length > most_tokens for length in lengths):
            continue
        begun += said
        if len(begun) >= turns:
            found.append(tuple(begun[:turns]))
            begun = []
    return found
