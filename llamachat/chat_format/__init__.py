"""Conversion between conversations and token ids. Stages use the protocol `ChatFormat`; the recipe names the format.

The tags and template of a format appear only in its own module.
"""

from llamachat.chat_format.format import ChatFormat, TokenizedExample, TrainOn
from llamachat.chat_format.llama2 import Llama2Format
from llamachat.chat_format.tokenizer import Tokenizer
from llamachat.errors import ConfigError

__all__ = ["CHAT_FORMATS", "ChatFormat", "TokenizedExample", "TrainOn", "load_chat_format"]

CHAT_FORMATS = {"llama2": Llama2Format}


def load_chat_format(name: str, tokenizer: Tokenizer) -> ChatFormat:
    """Create the chat format that `base.chat_format` names."""
    if name not in CHAT_FORMATS:
        known = ", ".join(CHAT_FORMATS)
        raise ConfigError(
            f"base.chat_format: unknown chat format '{name}'. The formats are: {known}. Write one of them."
        )
    return CHAT_FORMATS[name](tokenizer)
