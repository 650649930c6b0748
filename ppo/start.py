"""What PPO starts from: policy, reference, critic and reward models in one bank, prompts, scorer; and how it publishes."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llamachat.chat_format.proof import prove_written, require_proof
from llamachat.errors import ConfigError
from llamachat.models.role_bank import RewardRole, RoleBank
from llamachat.models.role_opening import open_roles
from llamachat.runs.artifacts import Artifact, Manifest, publish
from llamachat.runs.folder import StepFolder
from llamachat.scoring.combining import combiner
from llamachat.scoring.requirements import MODELS, ModelName, RewardModelFacts, check_scoring, facts_of, models_read
from llamachat.tokenizer import write_tokenizer
from ppo.config import Config, Inputs
from ppo.prompts import Questions, load_questions
from ppo.scoring_step import Scorer

if TYPE_CHECKING:
    from llamachat.runs.artifacts import Manifest as AnyManifest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """All roles and prompts, before the first iteration."""

    bank: RoleBank
    questions: Questions
    scorer: Scorer
    frozen_digest: str  # of all weights that are not trained: it must be the same when training ends


def open_start(config: Config, inputs: Inputs) -> Start:
    """Check what can be checked without weights, then load the roles and the prompts."""
    check_settings(inputs)
    models = reward_models(inputs)
    facts = model_facts(models)
    for warning in check_scoring(inputs.scoring, facts):
        log.warning("%s", warning)
    combine = combiner(inputs.scoring)
    read = {*models_read(inputs.scoring, facts), "judge"}
    bank = open_roles(
        policy=inputs.policy,
        base=inputs.base,
        tuning=inputs.tuning,
        # A model whose scores the recipe's rule does not read is not loaded.
        reward_models={role: model for role, model in models.items() if role in read},
        critic=config.critic,
        seed=inputs.run.seed,
        device="auto",
        checkpointing=config.gradient_checkpointing,
    )
    questions = load_questions(
        inputs.data,
        bank.chat_format,
        system=inputs.base.system,
        max_tokens=longest_prompt(inputs, bank),
        held_out=(config.validation_prompts, config.test_prompts),
        seed=inputs.run.seed,
    )
    return Start(bank, questions, Scorer(bank, combine), bank.frozen_digest())


def check_settings(inputs: Inputs) -> None:
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
    if rollout.max_new_tokens >= base.max_tokens:
        raise ConfigError(
            f"rollout.max_new_tokens: {rollout.max_new_tokens}, but base.max_tokens is {base.max_tokens}, and prompt and "
            "answer must fit into it together. Lower rollout.max_new_tokens, or raise base.max_tokens."
        )


def reward_models(inputs: Inputs) -> dict[RewardRole, Artifact | str]:
    """The recipe's own reward models, or those that `scoring` names in their place."""
    found: dict[RewardRole, Artifact | str] = {
        cast(RewardRole, role): artifact for role, artifact in inputs.reward_models.items()
    }
    scoring = inputs.scoring
    if scoring.helpfulness is not None:
        found["helpfulness"] = scoring.helpfulness
    if scoring.safety is not None:
        found["safety"] = scoring.safety
    return found


def model_facts(models: Mapping[RewardRole, Artifact | str]) -> dict[ModelName, RewardModelFacts]:
    """What their manifests say of the models that may decide."""
    found: dict[ModelName, RewardModelFacts] = {}
    for role in MODELS:
        model = models.get(role)
        if isinstance(model, Artifact):
            found[role] = facts_of(str(model.path), model.manifest)
        elif model is not None:
            found[role] = facts_of(model, _manifest_at(model))
    return found


def _manifest_at(name: str) -> "AnyManifest | None":
    """The manifest of a local artifact of ours; None of any other model."""
    from llamachat.runs.artifacts import MANIFEST, read_artifact

    folder = Path(name).expanduser()
    if not folder.is_dir() or ((folder / "config.json").is_file() and not (folder / MANIFEST).is_file()):
        return None
    return read_artifact(folder, "reward_model", reader="ppo").manifest


def longest_prompt(inputs: Inputs, bank: RoleBank) -> int:
    """Tokens of a prompt that leave room for an answer, for the policy and for each reward model, its EOS included."""
    readable = [bank.reward_model(role).max_tokens for role in ("helpfulness", "safety", "judge") if role in bank.roles]
    longest = min([inputs.base.max_tokens, *readable]) - inputs.rollout.max_new_tokens - 1
    if longest < 1:
        raise ConfigError(
            f"rollout.max_new_tokens: {inputs.rollout.max_new_tokens}, but a reward model reads at most {min(readable)} "
            "tokens of prompt and answer together, so no prompt fits. Lower it, or train the reward models longer."
        )
    return longest


def publish_policy(start: Start, inputs: Inputs, folder: StepFolder, *, notes: Mapping[str, Any]) -> Artifact:
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
        inputs=taken | {f"reward_model/{role}": _name(model) for role, model in reward_models(inputs).items()},
        seed=inputs.run.seed,
        dropped_records=dict(start.questions.dropped),
        details=details | dict(notes),
    )
    return publish(folder, manifest, write)


def _name(model: Artifact | str) -> str:
    return str(model.path) if isinstance(model, Artifact) else model
