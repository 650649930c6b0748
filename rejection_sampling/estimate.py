"""What a round of rejection sampling would cost; reads no data and no weights."""

from llamachat.memory.estimates import Estimate
from llamachat.memory.sampling_estimate import Workload, asked_prompts, sampling_estimate
from rejection_sampling.config import Config


def num_winners(config: Config, prompts: int | None) -> int | None:
    """Dialogs that are learnt if each prompt has a winner; earlier rounds' come on top."""
    return asked_prompts(config.prompts, prompts)


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of the round, seconds of its sampling, scoring and tuning, and optimizer steps of the tuning."""
    winners = num_winners(config, work.prompts)
    if winners is None:
        return sampling_estimate(work, answers=None)
    answers = (winners + config.validation_prompts) * config.samples_per_prompt + 2 * config.test_prompts
    answers += len(config.sweep_temperatures) * config.sweep_prompts * config.sweep_samples
    return sampling_estimate(work, answers=answers, samples_per_prompt=config.samples_per_prompt)
