"""Evaluation: score every policy of a run on the same held-out prompts and compare it with the first one."""

from evaluation.config import Config
from llamachat.imports import quick_imports
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Evaluate every policy and publish the figures; resumes after an interruption."""
    with quick_imports():  # torch loads here: configuration and plans stay light
        from evaluation.step import run as run_step

    return run_step(config, inputs)


__all__ = ["Config", "run"]
