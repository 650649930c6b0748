"""Evaluation: every policy of a run on the same held-out prompts, by models, by rules and against the first one."""

from typing import TYPE_CHECKING

from evaluation.config import Config
from evaluation.estimate import estimate

if TYPE_CHECKING:
    from evaluation.config import Inputs
    from llamachat.runs.artifacts import Artifact


def run(config: Config, inputs: "Inputs") -> "Artifact":
    """Let every policy answer, and publish the figures; resumes wherever it was stopped."""
    from evaluation.step import run as run_step  # torch loads here: configuration and plans stay light

    return run_step(config, inputs)


__all__ = ["Config", "estimate", "run"]
