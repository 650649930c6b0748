"""Supervised fine-tuning: train a base model to answer on dialogs (Llama 2 section 3.1)."""

from llamachat.imports import quick_imports
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from sft.config import Config


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train on the dialogs of `inputs` and publish the policy; resumes from the step's newest checkpoint."""
    with quick_imports():  # torch and trl load here: configuration and plans stay light
        from sft.train import run as train

    return train(config, inputs)


__all__ = ["Config", "run"]
