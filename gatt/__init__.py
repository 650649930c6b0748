"""Ghost Attention: instructions kept over many turns, tuned on the policy's own dialogs (Llama 2 section 3.3)."""

from gatt.config import Config
from llamachat.imports import quick_imports
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Sample dialogs, tune on them, measure consistency by turn; resumes after an interruption."""
    with quick_imports():  # torch loads here: configuration and plans stay light
        from gatt.train import run as run_step

    return run_step(config, inputs)


__all__ = ["Config", "run"]
