"""Reward models: initialised from the chat policy and trained on human preferences (Llama 2 section 3.2.2)."""

from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from reward.config import Config


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train and publish the reward model named by `inputs`; resumes from the step's newest checkpoint."""
    from reward.train import run as train  # torch and trl load here: configuration and plans stay light

    return train(config, inputs)


__all__ = ["Config", "run"]
