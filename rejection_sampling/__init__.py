"""Rejection sampling: train on the best of K answers to each prompt (Llama 2 section 3.2.3)."""

from llamachat.imports import quick_imports
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from rejection_sampling.config import Config


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Run one round: sample, choose, pool, tune, compare; resumes after an interruption."""
    with quick_imports():  # torch loads here: configuration and plans stay light
        from rejection_sampling.train import run as run_round

    return run_round(config, inputs)


__all__ = ["Config", "run"]
