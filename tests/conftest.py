"""Fixtures that more than one test file uses; what they build lies in tests/fakes.py."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat, load_chat_format
from llamachat.chat_format.tokenizer import SentencePieceBackend, Tokenizer
from tests.fakes import train_sentencepiece

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as `make test` does; or commands would divide their work over processes


@pytest.fixture(scope="session")
def tiny_sentencepiece() -> bytes:
    """A trained SentencePiece model of a few hundred pieces."""
    return train_sentencepiece()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_sentencepiece: bytes) -> Tokenizer:
    return Tokenizer(SentencePieceBackend(tiny_sentencepiece))


@pytest.fixture(scope="session")
def tiny_format(tiny_tokenizer: Tokenizer) -> ChatFormat:
    return load_chat_format("llama2", tiny_tokenizer)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    """A random model as a folder."""
    from tests.sft.tiny_sft import write_base

    return write_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece)


@pytest.fixture(scope="session")
def base16(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    """The same in bf16."""
    import torch

    from tests.sft.tiny_sft import write_base

    return write_base(tmp_path_factory.mktemp("base16"), tiny_sentencepiece, dtype=torch.bfloat16)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes, tiny_format: ChatFormat) -> Any:
    """Policies and reward models on a random base."""
    from tests.llamachat.models.tiny_roles import World

    return World(tmp_path_factory.mktemp("roles"), tiny_format, tiny_sentencepiece)


@pytest.fixture(scope="module")
def no_curves() -> Iterator[None]:
    """Without curves: drawing them takes longer than all the training of a toy step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llamachat.tracking.curves.panels_of", lambda _: {})
        yield
