"""Evaluation: every policy of a run on the same held-out prompts, by models, by rules and against the first one."""

from evaluation.config import Config
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Let every policy answer, and publish the figures; resumes wherever it was stopped."""
    from evaluation.step import run as run_step  # torch loads here: configuration and plans stay light

    return run_step(config, inputs)


__all__ = ["Config", "run"]
