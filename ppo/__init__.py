"""Proximal policy optimisation of the chat policy against two reward models (Llama 2 section 3.2.3)."""

from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from ppo.config import Config


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train the policy named by `inputs` and publish the best one; resumes from the step's newest checkpoint."""
    from ppo.train import run as train  # torch and transformers load here: configuration and plans stay light

    return train(config, inputs)


__all__ = ["Config", "run"]
