"""What PPO starts from: policy, reference, critic and reward models in one bank, prompts, scorer; and how it publishes."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat import distributed
from llamachat.answers.scorer import Scorer, longest_prompt
from llamachat.chat_format.proof import prove_written, require_proof
from llamachat.chat_format.tokenizer import write_tokenizer
from llamachat.data.prompts import PromptSplits, check_room, load_prompts
from llamachat.errors import ConfigError
from llamachat.models.open_roles import open_roles
from llamachat.models.roles import RoleBank
from llamachat.runs.artifacts import Artifact, Manifest, publish
from llamachat.runs.folder import StepFolder
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.combining import combiner
from llamachat.scoring.models import checked_models, named_models
from ppo.config import Config

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """All roles and prompts, before the first iteration."""

    bank: RoleBank
    prompts: PromptSplits
    scorer: Scorer
    frozen_digest: str  # of all weights that are not trained: it must be the same when training ends


def open_start(config: Config, inputs: StepInputs) -> Start:
    """Check what can be checked without weights, then load the roles and the prompts."""
    check_settings(inputs)
    check_processes(inputs)
    models = checked_models(inputs.scoring, inputs.reward_models)
    bank = open_roles(
        policy=inputs.policy,
        base=inputs.base,
        tuning=inputs.tuning,
        reward_models=models,
        critic=config.critic,
        seed=inputs.run.seed,
        device="auto",
        checkpointing=config.gradient_checkpointing,
    )
    distributed.broadcast_tensors(bank.state_dict().values())
    prompts = load_prompts(
        inputs.data,
        bank.chat_format,
        system=inputs.base.system,
        max_tokens=longest_prompt(inputs.base, inputs.rollout, bank),
        held_out=(config.validation_prompts, config.test_prompts),
        seed=inputs.run.seed,
    )
    return Start(bank, prompts, Scorer(bank, combiner(inputs.scoring)), bank.frozen_digest())


def check_processes(inputs: StepInputs) -> None:
    """Refuse processes that are to hold a part of the weights each."""
    if distributed.are_sharded() and inputs.tuning.method == "full":
        raise ConfigError(
            "tuning.method: full, and accelerate is to cut weights that are trained whole over the processes (FSDP). In PPO "
            "each process samples, scores and learns with whole weights of its own. Set tuning.method to lora or qlora, "
            "with which a card holds one base and small adapters, or launch with configs/accelerate/ddp.yaml where policy, "
            "reference and critic fit on one card."
        )


def check_settings(inputs: StepInputs) -> None:
    """Refuse sampling that PPO's equations do not hold for."""
    rollout, base = inputs.rollout, inputs.base
    if rollout.top_p != 1:
        raise ConfigError(
            f"rollout.top_p: {rollout.top_p:g}, but PPO needs 1. Its ratios and its KL are of the distribution that the "
            "tokens were drawn from; with top-p that one rules tokens out which the next policy may give. Set it to 1."
        )
    if rollout.top_k is not None:
        raise ConfigError(
            f"rollout.top_k: {rollout.top_k}, but PPO needs null. As with top-p, tokens would be ruled out which the next "
            "policy may give, and ratios and KL would be of other distributions than the one drawn from. Set it to null."
        )
    if rollout.temperature == 0:
        raise ConfigError(
            "rollout.temperature: 0, but PPO learns from answers that are drawn: the likeliest answer alone shows no other"
            " that could be better. Set it to 1."
        )
    check_room(base, rollout)


def publish_policy(start: Start, inputs: StepInputs, folder: StepFolder, *, notes: Mapping[str, Any]) -> Artifact:
    """Publish the bank's policy with its tokenizer and manifest; refuses frozen weights that have moved."""
    bank = start.bank
    assert bank.frozen_digest() == start.frozen_digest, "reference and reward models are never written"

    def write(place: Path) -> None:
        bank.save_policy(place)
        write_tokenizer(bank.chat_format.tokenizer, place, bank.chat_format.chat_template)
        report = prove_written(place, bank.chat_format)
        warning = require_proof(report, allow_unproved=inputs.base.allow_unproved_tokenizer)
        if warning:
            log.warning("%s", warning)

    details = bank.policy_details(max_tokens=inputs.base.max_tokens, system=inputs.base.system)
    if inputs.tuning.method != "full":
        details["rank"] = inputs.tuning.rank
    taken = {"policy": str(inputs.policy.path)} if inputs.policy else {"base": inputs.base.model}
    manifest = Manifest(
        kind="policy",
        step=inputs.step,
        fingerprint=inputs.fingerprint,
        identity=inputs.identity,
        inputs=taken
        | {
            f"reward_model/{role}": _name(model)
            for role, model in named_models(inputs.scoring, inputs.reward_models).items()
        },
        seed=inputs.run.seed,
        dropped_records=dict(start.prompts.dropped),
        details=details | dict(notes),
    )
    return publish(folder, manifest, write)


def _name(model: Artifact | str) -> str:
    return str(model.path) if isinstance(model, Artifact) else model
