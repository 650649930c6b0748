"""Context distillation: train on safer answers sampled with a preprompt, without the preprompt (Llama 2, 4.2.4)."""

from context_distillation.config import Config
from llamachat.imports import quick_imports
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Sample with and without preprompts, keep safer answers, tune, compare; resumes after an interruption."""
    with quick_imports():  # torch loads here: configuration and plans stay light
        from context_distillation.train import run as run_step

    return run_step(config, inputs)


__all__ = ["Config", "run"]
