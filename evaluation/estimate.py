"""What an evaluation would cost; reads no data and no weights."""

from evaluation.config import Config
from llamachat.memory.estimates import Estimate
from llamachat.memory.sampling_estimate import Workload, sampling_estimate

ASSUMED_POLICIES = 4  # how many a run has is not known before it is planned; ours


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of the step, and seconds of sampling and scoring, of so many policies."""
    policies = work.prompts or ASSUMED_POLICIES
    one = config.test_prompts + config.borderline_prompts + config.dialogs * max(config.turns)
    answers = policies * (one + config.curve_prompts * config.curve_samples)
    answers += 2 * len(config.temperatures) * config.curve_prompts * config.curve_samples
    answers += config.dialogs * max(config.turns)
    return sampling_estimate(work, answers=answers)
