"""Open, evaluate and publish for PPO: all roles on one base, held-out prompts, the policy."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from llamachat import distributed
from llamachat.answers.evaluation import Evaluation, evaluation_of, sample_rows
from llamachat.answers.packed import packed_rows, sequence_of
from llamachat.answers.session import AnswerSession, open_session, read_by
from llamachat.data.prompts import EncodedPrompt
from llamachat.errors import ConfigError
from llamachat.runs.artifacts import Artifact, StepFolder
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.standardising import Constants
from llamachat.tracking.tracker import Tracker
from llamachat.training.publishing import publish_model
from ppo.collapse import change_figures
from ppo.config import Config, critic_kind
from ppo.experience import model_outputs

_SHOWN = 16  # sample answers logged per evaluation


def open_ppo(config: Config, inputs: StepInputs) -> AnswerSession:
    """Open policy, reference, critic, reward models and prompts; raise on settings that PPO does not support."""
    check_settings(inputs)
    return open_session(
        inputs,
        policy=inputs.policy,
        held_out=(config.validation_prompts, config.test_prompts),
        critic=critic_kind(config),
        checkpointing=config.gradient_checkpointing,
    )


def check_settings(inputs: StepInputs) -> None:
    """Raise on sampling settings that break PPO's equations, and on sharded weights."""
    rollout = inputs.rollout
    if rollout.top_p != 1:
        raise ConfigError(
            f"rollout.top_p: {rollout.top_p:g}, but PPO needs 1. Its ratios and its KL refer to the distribution that the "
            "tokens were drawn from; top-p excludes tokens that the next policy may sample. Set it to 1."
        )
    if rollout.top_k is not None:
        raise ConfigError(
            f"rollout.top_k: {rollout.top_k}, but PPO needs null. Like top-p, top-k excludes tokens that the next "
            "policy may sample, and ratios and KL would refer to another distribution. Set it to null."
        )
    if rollout.temperature == 0:
        raise ConfigError(
            "rollout.temperature: 0, but PPO trains on sampled answers: the most likely answer alone shows no"
            " better alternative. Set it to 1."
        )
    if distributed.are_sharded() and inputs.tuning.method == "full":
        raise ConfigError(
            "tuning.method: full, but accelerate is configured to shard fully trained weights over the processes (FSDP). In PPO "
            "each process samples, scores and learns with its own complete weights. Set tuning.method to lora or qlora, "
            "with which a card holds one base and small adapters, or launch with configs/accelerate/ddp.yaml where policy, "
            "reference and critic fit on one card."
        )


def evaluate(
    session: AnswerSession, prompts: Sequence[EncodedPrompt], constants: Constants | None, row_tokens: int
) -> tuple[Evaluation, Constants]:
    """Evaluate the policy on held-out prompts, with its KL; missing constants are computed from these answers."""
    responses, scored = session.answer_held_out(prompts)
    sequences = [sequence_of(response) for response in responses]
    rows = packed_rows(
        sequences,
        range(len(sequences)),
        row_tokens=row_tokens,
        device=session.bank.device,
        shares=distributed.count(),
    )
    temperature = session.inputs.rollout.temperature
    outputs = model_outputs(session.bank, sequences, rows, temperature=temperature, with_values=False)
    kl = outputs.response_kl().tolist()
    return evaluation_of(responses, scored, constants, scoring=session.inputs.scoring, kl=kl)


def mean_kl(evaluation: Evaluation) -> float:
    """Mean KL to the starting policy, in nats per response."""
    assert evaluation.kl is not None, "`evaluate` measures it"
    return sum(evaluation.kl) / len(evaluation.kl)


def heldout_figures(evaluation: Evaluation, start: Evaluation, *, superiority: float) -> dict[str, float]:
    """Figures on validation prompts by metric name; `start` is the starting policy's evaluation."""
    figures = evaluation.figures() | change_figures(evaluation, start) | {"superiority": superiority}
    return {f"ppo/heldout/{name}": value for name, value in figures.items()}


def show(tracker: Tracker, iteration: int, session: AnswerSession, evaluation: Evaluation) -> None:
    """Log samples with their scores, and histograms of scores and lengths."""
    prompts = [prompt.messages[-1].content for prompt in session.prompts.validation]
    tracker.samples(iteration, sample_rows(evaluation, prompts, count=_SHOWN))
    for name, values in {**evaluation.scores(), "response_tokens": evaluation.tokens}.items():
        tracker.histogram(iteration, f"histogram/{name}", values)


def publish_policy(session: AnswerSession, folder: StepFolder, notes: dict[str, Any]) -> Artifact:
    """Publish the policy with its tokenizer and manifest in this folder."""
    bank, inputs = session.bank, replace(session.inputs, folder=folder)
    return publish_model(
        inputs,
        "policy",
        bank.save_policy,
        chat_format=bank.chat_format,
        details=bank.policy_details(max_tokens=inputs.base.max_tokens, system=inputs.base.system),
        notes=notes,
        read=read_by(inputs),
        dropped=session.prompts.dropped,
    )
