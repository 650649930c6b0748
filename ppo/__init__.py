"""Proximal policy optimisation of the chat policy against two reward models (Llama 2 section 3.2.3)."""

from llamachat.imports import quick_imports
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from ppo.config import Config


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train the policy named by `inputs` and publish the best one; resumes from the step's newest checkpoint."""
    with quick_imports():  # torch and transformers load here: configuration and plans stay light
        from ppo.train import run as train

    return train(config, inputs)


__all__ = ["Config", "run"]
