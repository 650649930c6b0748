"""Reward models: initialised from the chat policy and trained on human preferences (Llama 2 section 3.2.2)."""

from llamachat.imports import quick_imports
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from reward.config import Config


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train and publish the reward model named by `inputs`; resumes from the step's newest checkpoint."""
    with quick_imports():  # torch and trl load here: configuration and plans stay light
        from reward.train import run as train

    return train(config, inputs)


__all__ = ["Config", "run"]
