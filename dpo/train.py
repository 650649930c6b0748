"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): pairs of answers and a chat policy ->
policy.

Reads the pairs of `data.helpfulness` and `data.safety` and a policy (or the base); writes the step folder's
metrics.jsonl, samples.jsonl, checkpoints/, summary.json, curves.png and artifact/. Not in the Llama 2 paper: a
baseline for rejection sampling and PPO on the same pairs. It reads neither ratings nor reward models.
"""

import logging

from dpo.config import Config
from dpo.pairs import load_examples
from dpo.tuning import Tuning, open_reference, plan_training, row_tokens
from llamachat.models.sequence_attention import use_sequence_attention
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.training.policy import load_start, publish_policy
from llamachat.training.session import resume

log = logging.getLogger(__name__)

# Metrics whose last value is written to summary.json.
SUMMARY = (
    *(f"dpo/{name}" for name in ("loss", "accuracy", "reward_chosen", "reward_rejected", "epoch")),
    *(f"dpo/eval_{name}" for name in ("loss", "accuracy", "reward_chosen", "reward_rejected")),
    "dpo/finished_fraction",
    "dpo/answer_tokens",
    "memory/peak_gib",
)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train, evaluate and publish. After a kill, the same call resumes from the newest complete checkpoint."""
    resumed = resume(inputs, "dpo", config)
    start = load_start(inputs)
    if start.device.type == "cpu":
        use_sequence_attention(start.model)
    examples = load_examples(
        inputs.data, start.chat_format, base=inputs.base, num_prompts=config.sample_prompts, seed=inputs.run.seed
    )
    plan = plan_training(config, inputs, examples, model=start.model)
    log.info(
        "%d training pairs, %d held out; %d optimizer steps of %d pairs",
        len(examples.train),
        len(examples.validation),
        plan.num_steps,
        config.pairs_per_step,
    )
    # Before a checkpoint is loaded, while the model is still the starting policy.
    reference = open_reference(
        inputs.folder.checkpoints / "reference.safetensors",
        start.model,
        examples,
        row_tokens=row_tokens(config, inputs, start.model),
    )
    tuning = Tuning(config, inputs, start.model, start.chat_format, examples, *reference, plan)
    with resumed.session(tuning, prefix="dpo", unit="pair") as session:
        best = session.train()
        figures = session.finish(SUMMARY, best)
        log.info(
            "held-out pairs: %.3f in the right order; implicit rewards %.3f and %.3f",
            *(figures[f"dpo/eval_{name}"] for name in ("accuracy", "reward_chosen", "reward_rejected")),
        )
        # Written before the artifact, which marks the step as finished: a resumed command would skip it.
        session.tracker.summary(figures)
        return publish_policy(start, inputs, dropped=examples.dropped, notes=session.notes(best))
