"""What the report costs: a process that draws pictures, and no model."""

from llamachat.models.estimates import Estimate
from report.config import Config

# Ours, measured: 0.2 s a picture on one CPU core, matplotlib loaded; a run of seven steps has about 60.
SECONDS = 5.0
SECONDS_OF_CURVES = 10.0


def estimate(config: Config) -> Estimate:
    """Seconds of drawing; no memory of a device, no optimizer steps."""
    seconds = SECONDS + (SECONDS_OF_CURVES if config.shows_curves else 0.0)
    return Estimate(seconds=seconds, assumed="of drawing on one CPU core")
