"""Toy roles of context distillation: a base, and a safety model trained from it."""

from pathlib import Path

import pytest

from llamachat.chat_format import ChatFormat
from tests.context_distillation.tiny_distilling import write_roomy_base
from tests.llamachat.models.tiny_roles import FULL, World


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes, tiny_format: ChatFormat) -> World:
    return World(tmp_path_factory.mktemp("roles"), tiny_format, tiny_sentencepiece, write_roomy_base)


@pytest.fixture(scope="module")
def base(world: World) -> Path:
    return Path(world.base.model)


@pytest.fixture(scope="module")
def safety(world: World) -> Path:
    return world.reward_model("safety", FULL, FULL).path
