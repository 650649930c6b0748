"""Supervised fine-tuning: a base model learns to answer from dialogs (Llama 2 section 3.1)."""

from typing import TYPE_CHECKING

from sft.config import Config
from sft.estimate import estimate

if TYPE_CHECKING:
    from llamachat.runs.artifacts import Artifact
    from sft.config import Inputs


def run(config: Config, inputs: "Inputs") -> "Artifact":
    """Train on the dialogs of `inputs` and publish the policy; resumes from the step's newest checkpoint."""
    from sft.train import run as train  # torch and trl load here: configuration and plans stay light

    return train(config, inputs)


__all__ = ["Config", "estimate", "run"]
