"""What the report costs: a process that draws pictures, and no model."""

from dataclasses import dataclass

from evaluation.report.config import Config
from llamachat.memory.estimates import Estimate

# Ours, measured on one CPU core, matplotlib's loading counted: a run of nine steps with 75 pictures took 16 s.
SECONDS = 5.0
SECONDS_OF_CURVES = 1.2  # of one step


@dataclass(frozen=True, slots=True)
class Workload:
    """What the planner knows of a report."""

    steps: int  # that it tells of


def estimate(config: Config, work: Workload) -> Estimate:
    """Seconds of drawing; no memory of a device, no optimizer steps."""
    seconds = SECONDS + (SECONDS_OF_CURVES * work.steps if config.shows_curves else 0.0)
    return Estimate(seconds=seconds, assumed="of drawing on one CPU core")
