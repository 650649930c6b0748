"""Reward models: from the chat policy to scores of answers, by human preferences (Llama 2 section 3.2.2)."""

from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from reward.config import Config


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train the reward model that `inputs` name and publish it; resumes from the step's newest checkpoint."""
    from reward.train import run as train  # torch and trl load here: configuration and plans stay light

    return train(config, inputs)


__all__ = ["Config", "run"]
