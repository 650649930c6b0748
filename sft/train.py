"""Supervised fine-tuning (Llama 2, arXiv:2307.09288, section 3.1): dialogs -> policy.

Reads the dialogs of `data.sft` and a base (or an earlier policy); writes the step folder's metrics.jsonl,
samples.jsonl, checkpoints/, summary.json, curves.png and artifact/. Only answers and their EOS count in the
autoregressive loss; dialogs packed into one row do not attend to each other (ours, not stated in the paper).
"""

import logging
import math

from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.data.problems import left_out
from llamachat.errors import DataError
from llamachat.models.sequence_attention import use_sequence_attention
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.tables import plural
from llamachat.training.policy import load_start, publish_policy
from llamachat.training.session import resume
from sft.config import Config
from sft.examples import Examples, load_examples
from sft.tuning import Tuning, plan_training

log = logging.getLogger(__name__)

# Metrics whose last value is written to summary.json.
SUMMARY = (
    "sft/eval_loss_base",
    "sft/eval_loss",
    "sft/loss",
    "sft/epoch",
    "sft/trained_tokens",
    "sft/finished_fraction",
    "sft/answer_tokens",
    "memory/peak_gib",
)


def run(config: Config, inputs: StepInputs) -> Artifact:
    """Train, evaluate and publish. After a kill, the same call resumes from the newest complete checkpoint."""
    resumed = resume(inputs, "sft", config)
    start = load_start(inputs)
    if start.device.type == "cpu":
        use_sequence_attention(start.model, trains_together=True)
    examples = load_dialogs(config, inputs, start.chat_format)
    plan = plan_training(config, inputs, examples, device=start.device)
    log.info(
        "%d training dialogs, %d held out; %d optimizer steps of %d dialogs",
        len(examples.train),
        len(examples.validation),
        plan.num_steps,
        config.examples_per_step,
    )
    tuning = Tuning(config, inputs, start.model, start.chat_format, examples, plan)
    with resumed.session(tuning, prefix="sft", unit="dialog") as session:
        best = session.train()
        figures = session.finish(SUMMARY, best)
        before, after = (figures.get(f"sft/{name}", math.nan) for name in ("eval_loss_base", "eval_loss"))
        log.info("held-out answers: %.4f nats per token before training, %.4f after", before, after)
        # Written before the artifact, which marks the step as finished: a resumed command would skip it.
        session.tracker.summary(figures)
        return publish_policy(start, inputs, dropped=examples.dropped, notes=session.notes(best))


def load_dialogs(config: Config, inputs: StepInputs, chat_format: ChatFormat) -> Examples:
    """The dialogs as token ids, split into training and held-out dialogs."""
    examples = load_examples(
        inputs.data,
        chat_format,
        step_dialogs=inputs.dialogs.path if inputs.dialogs else None,
        sft_share=inputs.sft_share,
        system=inputs.base.system,
        train_on=TrainOn(config.train_on),
        max_tokens=inputs.base.max_tokens,
        num_prompts=config.sample_prompts,
        seed=inputs.run.seed,
    )
    if not examples.train or not examples.validation:
        raise DataError(
            f"{inputs.dialogs.path if inputs.dialogs else 'data.sft'}: {plural(len(examples.train), 'training dialog')} and "
            f"{plural(len(examples.validation), 'validation dialog')} are left{left_out(examples.dropped)}. Both are needed. Add dialogs, "
            "raise base.max_tokens if they are longer, or change data.split."
        )
    return examples
