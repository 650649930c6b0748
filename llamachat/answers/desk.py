"""Where answers are sampled and scored outside of PPO: a policy and the reward models on as few weights as there can be,
an engine that samples from the policy, and the prompts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamachat.answers.evaluation import Evaluation, evaluation_of
from llamachat.answers.responses import open_engine, sample
from llamachat.answers.scorer import Scorer, longest_prompt
from llamachat.config.sections import Base, Data, Rollout, Run, Scoring, Tuning
from llamachat.data.prompts import PromptSplits, check_room, load_prompts
from llamachat.models.open_roles import open_roles
from llamachat.models.roles import RoleBank
from llamachat.rollout.engine import LocalEngine, Sampling
from llamachat.scoring.combining import combiner
from llamachat.scoring.models import checked_models
from llamachat.scoring.standardising import Constants

if TYPE_CHECKING:
    from llamachat.runs.artifacts import Artifact

# Seeds of what is sampled: held-out prompts have 0 in every evaluation, the n-th batch of a step n + 1.
_SEEDS = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The sections of the recipe that sampling and scoring are told."""

    run: Run
    base: Base
    tuning: Tuning
    data: Data
    rollout: Rollout
    scoring: Scoring


@dataclass(frozen=True, slots=True)
class Desk:
    """A policy at work; nothing is trained here."""

    setting: Setting
    bank: RoleBank
    engine: LocalEngine
    scorer: Scorer
    prompts: PromptSplits

    def sampling(self, number: int, *, temperature: float | None = None) -> Sampling:
        """How the n-th batch is sampled; 0 is for held-out prompts. Temperature None is the recipe's."""
        rollout = self.setting.rollout
        return Sampling(
            temperature=rollout.temperature if temperature is None else temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=rollout.max_new_tokens,
            seed=self.setting.run.seed * _SEEDS + number,
        )

    def evaluate(self, constants: Constants | None) -> tuple[Evaluation, Constants]:
        """The policy's answers to the test prompts; without constants they are taken from these very answers."""
        responses = sample(self.engine, self.bank.chat_format, self.prompts.test, self.sampling(0))
        scored = self.scorer.score(responses, with_judge=True)
        return evaluation_of(responses, scored, constants)


def open_desk(
    setting: Setting,
    *,
    policy: "Artifact | None",
    reward_models: "Mapping[str, Artifact]",
    held_out: tuple[int, int] | None,
    only_safety: bool = False,
    scores: bool = True,
) -> Desk:
    """Check what can be checked without weights, then load.

    `held_out` are the sizes of validation and test side; None asks no prompts. With `only_safety` the prompts are those
    alone that are marked is_safety, and the safety model is there in any case. Without `scores` no reward model is loaded.
    """
    check_room(setting.base, setting.rollout)
    bank = open_roles(
        policy=policy,
        base=setting.base,
        tuning=setting.tuning,
        reward_models=checked_models(
            setting.scoring, reward_models, also=("judge", "safety") if only_safety else ("judge",)
        )
        if scores
        else {},
        critic=None,
        seed=setting.run.seed,
    )
    prompts = PromptSplits([], [], [], {})
    if held_out is not None:
        prompts = load_prompts(
            setting.data,
            bank.chat_format,
            system=setting.base.system,
            max_tokens=longest_prompt(setting.base, setting.rollout, bank),
            held_out=held_out,
            seed=setting.run.seed,
            only_safety=only_safety,
        )
    scorer = Scorer(bank, combiner(setting.scoring))
    return Desk(setting, bank, open_engine(bank, setting.rollout), scorer, prompts)
