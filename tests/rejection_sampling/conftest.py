"""The toy roles of PPO serve here too."""

from tests.ppo.conftest import base, world

__all__ = ["base", "world"]
