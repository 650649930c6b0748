"""Context distillation: training on preprompted, safer answers without the preprompt (Llama 2 section 4.2.4)."""

from context_distillation.config import Config
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Sample with and without preprompts, keep what is safer, tune, compare; resumes wherever it was stopped."""
    from context_distillation.train import run as run_step  # torch loads here: configuration and plans stay light

    return run_step(config, inputs)


__all__ = ["Config", "run"]
