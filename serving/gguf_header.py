"""What a GGUF file says of itself, and whether its tokenizer is the policy's.

Reads the header of the file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3), not the
weights. One thing surprises: llama.cpp puts one BOS in front of what it is sent and takes the one of the chat template
away for that, so `add_bos_token` has to be true although the template writes a BOS of its own.
"""

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from llamachat.chat_format import ChatFormat

MAGIC = b"GGUF"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_header(path: Path) -> dict[str, Any]:
    """The key-value pairs of the file."""
    with path.open("rb") as stream:
        magic, version, _, pairs = stream.read(4), *_unpack(stream, "IQQ")
        if magic != MAGIC or version not in (2, 3):
            raise ValueError(f"no GGUF file of version 2 or 3: it begins with {magic!r}, {version}")
        return {_string(stream): _value(stream, *_unpack(stream, "I")) for _ in range(pairs)}


def tokenizer_faults(header: Mapping[str, Any], chat_format: ChatFormat) -> list[str]:
    """In which points the file's tokenizer is not the one that the policy was trained with; none where it is."""
    from sentencepiece import SentencePieceProcessor

    tokenizer = chat_format.tokenizer
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    expected: dict[str, tuple[Any, Any]] = {  # key -> what it must be, what it is where the file does not say
        "tokenizer.ggml.model": ("llama", None),
        "tokenizer.ggml.bos_token_id": (tokenizer.bos_id, None),
        "tokenizer.ggml.eos_token_id": (tokenizer.eos_id, None),
        "tokenizer.ggml.add_bos_token": (True, True),
        "tokenizer.ggml.add_eos_token": (False, False),
        "tokenizer.ggml.add_space_prefix": (True, True),
        "tokenizer.chat_template": (chat_format.plain_chat_template, None),
    }
    found = {key: header.get(key, default) for key, (_, default) in expected.items()}
    faults = [f"{key} is {found[key]!r:.40}" for key, (due, _) in expected.items() if found[key] != due]
    if list(header.get("tokenizer.ggml.tokens", ()))[: len(pieces)] != pieces:
        faults.append("tokenizer.ggml.tokens are other pieces")
    if tokenizer.sentencepiece_model is not None:
        processor = SentencePieceProcessor(model_proto=tokenizer.sentencepiece_model)
        # Which pieces are joined first hangs on the scores alone.
        scores = [processor.get_score(token) for token in range(len(pieces))]
        if list(header.get("tokenizer.ggml.scores", ()))[: len(pieces)] != scores:
            faults.append("tokenizer.ggml.scores are other scores")
    return faults


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(stream)
    if kind != _ARRAY:
        return _unpack(stream, _NUMBERS[kind])[0]
    of, length = _unpack(stream, "IQ")
    if of in _NUMBERS:
        return _unpack(stream, f"{length}{_NUMBERS[of]}")
    return [_value(stream, of) for _ in range(length)]


def _string(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "Q")
    return stream.read(length).decode("utf-8", errors="replace")


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    form = f"<{form}"
    return struct.unpack(form, stream.read(struct.calcsize(form)))
