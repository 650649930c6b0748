"""What Ghost Attention would cost; reads no data and no weights."""

from gatt.config import Config
from llamachat.models.estimates import Estimate
from llamachat.models.sampling_estimate import Workload, sampling_estimate

TURN_TOKENS = 100.0  # of a user turn with its answer; ours, assumed


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of the step, seconds of sampling, measuring and tuning, and optimizer steps of the tuning."""
    answers = round(config.dialogs * (2 + config.turns) / 2 * config.samples_per_turn)
    answers += 3 * config.evaluation_dialogs * max(config.evaluation_turns)
    return sampling_estimate(work, answers=answers, tokens=TURN_TOKENS)
