"""What Ghost Attention would cost; reads no data and no weights."""

from dataclasses import replace

from gatt.config import Config
from llamachat.memory.estimates import Estimate
from llamachat.memory.sampling_estimate import Workload, sampling_estimate

TURN_TOKENS = 100.0  # of the turns before an answer; ours, assumed


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of the step, seconds of sampling, measuring and tuning, and optimizer steps of the tuning."""
    answers = round(config.dialogs * (2 + config.turns) / 2 * config.samples_per_turn)
    answers += 3 * config.evaluation_dialogs * max(config.evaluation_turns)
    turns = replace(work, lengths=replace(work.lengths, prompt=min(work.lengths.prompt, TURN_TOKENS)))
    return sampling_estimate(turns, answers=answers)
