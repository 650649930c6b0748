"""Supervised fine-tuning (Llama 2, arXiv:2307.09288, section 3.1): dialogs -> policy.

Reads the dialogs of `data.sft` and a base (or an earlier policy); writes the step folder's metrics.jsonl,
samples.jsonl, checkpoints/, summary.json, curves.png and artifact/. The autoregressive loss is zero on everything but
answers and their EOS; dialogs packed into one row do not attend to each other (ours, not stated in the paper).
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from llamachat import distributed
from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.data.problems import left_out
from llamachat.errors import DataError
from llamachat.models.loading import (
    attach_adapter,
    load_base,
    load_policy,
    policy_details,
    save_policy,
    trunk_digest,
)
from llamachat.models.start_checks import is_adapter, proved_start, shard_if_configured
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.training.publishing import publish_model, sources_of
from llamachat.training.session import resume
from sft.config import Config
from sft.examples import Examples, load_examples
from sft.tuning import Tuning, plan_training

if TYPE_CHECKING:
    from llamachat.models.loading import LanguageModel

log = logging.getLogger(__name__)

# What summary.json says of a training, each figure's last value.
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
    """Train, evaluate and publish. Killed at any moment, the same call resumes from the newest whole checkpoint."""
    resumed = resume(inputs, "sft", config)
    start = load_start(inputs)
    examples = load_dialogs(config, inputs, start.chat_format)
    plan = plan_training(config, inputs, examples, device=start.device)
    log.info(
        "%d dialogs to train on, %d held out; %d optimizer steps of %d dialogs in %d rows",
        len(examples.train),
        len(examples.validation),
        plan.num_steps,
        config.examples_per_step,
        plan.rows_per_step,
    )
    tuning = Tuning(config, inputs, start.model, start.chat_format, examples, plan)
    with resumed.session(tuning, prefix="sft", unit="dialog") as session:
        best = session.train()
        figures = session.finish(SUMMARY, best)
        before, after = (figures.get(f"sft/{name}", math.nan) for name in ("eval_loss_base", "eval_loss"))
        log.info("held-out answers: %.4f nats a token before, %.4f after", before, after)
        # Before the artifact, which ends the step: a command killed between the two would never come back to write it.
        session.tracker.summary(figures)
        return publish_policy(start, inputs, dropped=examples.dropped, notes=session.notes(best))


def load_dialogs(config: Config, inputs: StepInputs, chat_format: ChatFormat) -> Examples:
    """The dialogs as token ids, split into those to train on and those held out."""
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
            f"{inputs.dialogs.path if inputs.dialogs else 'data.sft'}: {len(examples.train)} dialogs to train on and "
            f"{len(examples.validation)} to validate with are left{left_out(examples.dropped)}. Both are needed. Add dialogs, "
            "raise base.max_tokens where they are longer, or change data.split."
        )
    return examples


@dataclass(frozen=True, slots=True)
class Start:
    """A model whose trainable weights are those that `tuning.method` names."""

    model: "LanguageModel"
    chat_format: ChatFormat
    trunk: str  # folder or hub name of the weights under an adapter, or of the base
    frozen_digest: str | None  # of the trunk under an adapter: it must be the same when training ends

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_start(inputs: StepInputs) -> Start:
    """Load the earlier policy where the step has one, else the base; attach an adapter where the recipe asks."""
    location, chat_format = proved_start(inputs.base, inputs.tuning, inputs.policy)
    model, trunk = _load_model(inputs, location)
    shard_if_configured(model, inputs.tuning)
    has_adapter = inputs.tuning.method != "full"
    return Start(model, chat_format, trunk, trunk_digest(model) if has_adapter else None)


def _load_model(inputs: StepInputs, trunk: str) -> "tuple[LanguageModel, str]":
    tuning, policy = inputs.tuning, inputs.policy
    if policy and is_adapter(policy):
        dtype, attention = inputs.base.dtype, inputs.base.attention
        loaded = load_policy(policy.path, dtype=dtype, device="auto", attention=attention, is_trainable=True)
        return loaded.model, str(policy.manifest.details["base"])
    model = load_base(inputs.base, source=trunk, device="auto", is_nf4=tuning.method == "qlora")
    if tuning.method == "full":
        return model, trunk
    return attach_adapter(model, tuning, seed=inputs.run.seed), trunk


def publish_policy(
    start: Start, inputs: StepInputs, *, dropped: Mapping[str, int], notes: Mapping[str, Any]
) -> Artifact:
    """Publish weights, tokenizer and manifest; refuses a moved trunk and a tokenizer that reads back differently."""
    if start.frozen_digest is not None:
        assert trunk_digest(start.model) == start.frozen_digest, "the trunk under an adapter is never written"
    dialogs = inputs.dialogs
    if dialogs and "ended_by" in dialogs.manifest.details:
        notes = {"ended_by": dialogs.manifest.details["ended_by"], **notes}  # of the sampling
    return publish_model(
        inputs,
        "policy",
        partial(save_policy, start.model, weights=distributed.full_weights(start.model)),
        chat_format=start.chat_format,
        details=policy_details(
            start.model,
            base=start.trunk,
            chat_format=inputs.base.chat_format,
            max_tokens=inputs.base.max_tokens,
            system=inputs.base.system,
        ),
        notes=notes,
        read=sources_of(inputs) | ({"dialogs": dialogs} if dialogs else {}),
        dropped=dropped,
        ends_step=dialogs is None,
    )
