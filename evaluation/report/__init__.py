"""The report on a run: one page with the paper's tables and figures, ours beside the paper's numbers where they compare."""

from evaluation.report.config import Config
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Write `report.html`, `report.md` and their pictures from what the finished steps left."""
    from evaluation.report.step import run as run_step  # the drawing loads here: configuration and plans stay light

    return run_step(config, inputs)


__all__ = ["Config", "run"]
