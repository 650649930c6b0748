"""Published models that the tests of role banks share."""

import pytest

from llamachat.chat_format import ChatFormat
from tests.llamachat.models.tiny_roles import World


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_format: ChatFormat, tiny_sentencepiece: bytes) -> World:
    return World(tmp_path_factory.mktemp("roles"), tiny_format, tiny_sentencepiece)
