"""A random base whose answers end, and policies and reward models on it."""

from pathlib import Path

import pytest

from llamachat.chat_format import ChatFormat
from tests.llamachat.models.tiny_roles import World
from tests.ppo.tiny_ppo import write_stopping_base


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes, tiny_format: ChatFormat) -> World:
    return World(tmp_path_factory.mktemp("roles"), tiny_format, tiny_sentencepiece, write_stopping_base)


@pytest.fixture(scope="session")
def base(world: World) -> Path:
    return Path(world.base.model)
