"""What context distillation would cost; reads no data and no weights."""

from context_distillation.config import Config
from llamachat.memory.estimates import Estimate
from llamachat.memory.sampling_estimate import Workload, asked_prompts, sampling_estimate

KEPT = 0.5  # of the distilled answers; ours, assumed: an answer that is drawn anew is better as often as worse


def num_kept(config: Config, prompts: int | None) -> int | None:
    """Dialogs that are learnt, of so many adversarial prompts."""
    asked = asked_prompts(config.prompts, prompts)
    return None if asked is None else round(asked * (KEPT if config.keep == "better" else 1.0))


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of the step, seconds of its sampling, scoring and tuning, and optimizer steps of the tuning."""
    asked = asked_prompts(config.prompts, work.prompts)
    if asked is None:
        return sampling_estimate(work, answers=None)
    ways = 2 + bool(config.uses_categories and config.categories)
    answers = (asked + config.validation_prompts) * config.samples_per_prompt * ways
    answers += 2 * (config.test_prompts + config.borderline_prompts)
    return sampling_estimate(work, answers=answers, samples_per_prompt=config.samples_per_prompt)
