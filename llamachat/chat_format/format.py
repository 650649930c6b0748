"""What a chat format is: the one way from a conversation to token ids, loss mask and back.

A loss mask is made of token positions while encoding, never by searching strings, and the stop id of an answer is in
it: a model that never learns to stop does not stop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from llamachat.chat_format.dialog import Message
from llamachat.chat_format.tokenizer import Tokenizer


class TrainOn(StrEnum):
    """Which answers of a dialog are trained on; an answer marked `train: false` is trained on under neither."""

    EVERY_ANSWER = "every_answer"
    LAST_ANSWER = "last_answer"


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """A dialog as training sees it: `loss_mask[t]` is True where token t is a training target."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]

    def __post_init__(self) -> None:
        assert len(self.input_ids) == len(self.loss_mask), "a mask has one value a token"


class ChatFormat(Protocol):
    """Conversation <-> tokens. Methods that take messages raise `DialogError` where these break the rules."""

    @property
    def name(self) -> str:
        """The value of `base.chat_format`."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer whose ids it gives."""
        ...

    @property
    def chat_template(self) -> str:
        """The same format as a Jinja template with `{% generation %}` marks, for artifacts."""
        ...

    @property
    def plain_chat_template(self) -> str:
        """The same without the marks, for servers whose Jinja does not know them."""
        ...

    @property
    def go_template(self) -> str:
        """The same as a template of Go's text/template, as Ollama renders it, without the first BOS."""
        ...

    @property
    def forbidden(self) -> tuple[str, ...]:
        """Texts that may not stand inside a message, since the model would read them as the format's own."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer; they belong to it."""
        ...

    @property
    def closing_ids(self) -> tuple[int, ...]:
        """What stands behind the text of each answer of a dialog, the last of them a stop id."""
        ...

    def check_text(self, messages: Sequence[Message], *, field: str = "messages") -> None:
        """Raise `DialogError` for the first message that holds a forbidden text."""
        ...

    def encode_dialog(self, messages: Sequence[Message], *, train_on: TrainOn) -> TokenizedExample:
        """All turns, the last one closed or open, and which tokens are targets."""
        ...

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids after which the model answers; the dialog ends with a user turn."""
        ...

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of a sampled answer up to its first stop id, stripped as `encode_dialog` would strip it."""
        ...

    def shorten(self, messages: Sequence[Message], *, max_tokens: int) -> tuple[Message, ...] | None:
        """The dialog without its oldest whole pairs, so that it fits; None where its last turn alone does not."""
        ...


def shorten_alike(
    chat_format: ChatFormat, dialogs: Sequence[Sequence[Message]], *, max_tokens: int
) -> list[tuple[Message, ...]] | None:
    """Drop the same oldest pairs from dialogs that share all but their last answer, so that each fits.

    The answers are compared after one and the same prompt. None where the last pair of one of them alone does not fit.
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
    """The conversation without its oldest whole pairs, so that the answer has room; None where it cannot fit.

    The answer gets its `max_new_tokens`, at most half of `limit`; where the last question alone is longer than that
    leaves, what is left.
    """
    for room in (limit - min(max_new_tokens, limit // 2), limit - 1):
        fitting = chat_format.shorten(messages, max_tokens=room)
        if fitting is not None:
            return fitting
    return None
