"""The chat format protocol: the only conversion of a conversation to token ids and loss mask, and back.

The loss mask is built from token positions while encoding, never by searching strings. It includes the stop id of an
answer: a model that is not trained on it does not learn to stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from llamachat.chat_format.dialog import Message
from llamachat.chat_format.tokenizer import Tokenizer


class TrainOn(StrEnum):
    """Which answers of a dialog are trained on; neither value includes an answer marked `train: false`."""

    EVERY_ANSWER = "every_answer"
    LAST_ANSWER = "last_answer"


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """A tokenized dialog; `loss_mask[t]` is True where token t is a training target."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.loss_mask), "a mask has one value a token"


class ChatFormat(Protocol):
    """Conversation <-> tokens. Methods that take messages raise `DialogError` if these violate the rules."""

    @property
    def name(self) -> str:
        """The value of `base.chat_format`."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that produces the ids."""
        ...

    @property
    def chat_template(self) -> str:
        """The format as a Jinja template with `{% generation %}` marks, for artifacts."""
        ...

    @property
    def plain_chat_template(self) -> str:
        """The template without the marks, for servers whose Jinja does not support them."""
        ...

    @property
    def go_template(self) -> str:
        """The format as a Go text/template for Ollama, without the first BOS."""
        ...

    @property
    def forbidden(self) -> tuple[str, ...]:
        """Texts that a message must not contain, since the model would read them as part of the format."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer; they are part of it."""
        ...

    @property
    def closing_ids(self) -> tuple[int, ...]:
        """The ids after the text of each answer in a dialog, the last of them a stop id."""
        ...

    def check_text(self, messages: Sequence[Message], *, field: str = "messages") -> None:
        """Raise `DialogError` for the first message that contains a forbidden text."""
        ...

    def encode_dialog(self, messages: Sequence[Message], *, train_on: TrainOn) -> TokenizedExample:
        """Encode all turns, with the last one closed or open, and mark the targets."""
        ...

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Encode a dialog that ends with a user turn, ready for the model's answer."""
        ...

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of a sampled answer up to its first stop id, stripped as in `encode_dialog`."""
        ...

    def shorten(self, messages: Sequence[Message], *, max_tokens: int) -> tuple[Message, ...] | None:
        """Drop the oldest whole pairs until the dialog fits; None if its last turn alone does not fit."""
        ...


def shorten_alike(
    chat_format: ChatFormat, dialogs: Sequence[Sequence[Message]], *, max_tokens: int
) -> list[tuple[Message, ...]] | None:
    """Drop the same oldest pairs from dialogs that differ only in their last answer, until each fits.

    All answers thus keep the same prompt. None if the last pair of any dialog alone does not fit.
    """
    kept = [chat_format.shorten(dialog, max_tokens=max_tokens) for dialog in dialogs]
    if any(dialog is None for dialog in kept):
        return None
    turns = min(len(dialog) for dialog in kept if dialog is not None)
    opening = 1 if dialogs[0][0].role == "system" else 0
    return [(*dialog[:opening], *dialog[len(dialog) - (turns - opening) :]) for dialog in dialogs]


def fit(
    chat_format: ChatFormat, messages: Sequence[Message], *, limit: int, max_new_tokens: int
) -> tuple[Message, ...] | None:
    """Drop the oldest whole pairs until there is room for the answer; None if the conversation cannot fit.

    The answer gets `max_new_tokens`, but at most half of `limit`. If the last question alone needs more than the rest,
    the answer gets what remains.
    """
    for room in (limit - min(max_new_tokens, limit // 2), limit - 1):
        fitting = chat_format.shorten(messages, max_tokens=room)
        if fitting is not None:
            return fitting
    return None
