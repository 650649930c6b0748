"""Direct preference optimisation: train a policy on preference pairs without a reward model (Rafailov et al. 2023)."""

from dpo.config import Config
from llamachat.imports import quick_imports
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train on the pairs of `inputs` and publish the policy; resumes from the step's newest checkpoint."""
    with quick_imports():  # torch and trl load here: configuration and plans stay light
        from dpo.train import run as train

    return train(config, inputs)


__all__ = ["Config", "run"]
