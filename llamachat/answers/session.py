"""A policy that answers prompts and reward models that score the answers: roles on one base, rollout engine, prompts.

All steps that sample and score use it: PPO, the steps that make dialogs, and evaluation.
"""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from llamachat import distributed
from llamachat.answers.responses import Response, sample
from llamachat.answers.scorer import Scored, Scorer, longest_prompt
from llamachat.chat_format import ChatFormat
from llamachat.data.prompts import EncodedPrompt, PromptSplits, check_room, load_borderline, load_prompts
from llamachat.models.open_roles import open_roles
from llamachat.models.roles import CriticKind, RoleBank
from llamachat.rollout import open_engine
from llamachat.rollout.engine import LocalEngine, Sampling
from llamachat.runs.inputs import StepInputs
from llamachat.scoring.combining import combiner
from llamachat.scoring.models import checked_models, named_models
from llamachat.training.publishing import sources_of

if TYPE_CHECKING:
    from llamachat.runs.artifacts import Artifact

# Seeds of samples: held-out prompts have 0 in every evaluation, the n-th batch or iteration of a step n or n + 1.
_SEEDS = 1_000_003


@dataclass(frozen=True, slots=True)
class AnswerSession:
    """A policy with the reward models, an engine that samples from it, and the prompts of the step."""

    inputs: StepInputs
    bank: RoleBank
    engine: LocalEngine
    scorer: Scorer
    prompts: PromptSplits

    @property
    def chat_format(self) -> ChatFormat:
        return self.bank.chat_format

    def sampling(self, number: int, *, temperature: float | None = None) -> Sampling:
        """The sampling of the batch with this number; 0 is for held-out prompts. Temperature None is the recipe's."""
        rollout = self.inputs.rollout
        return Sampling(
            temperature=rollout.temperature if temperature is None else temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            max_new_tokens=rollout.max_new_tokens,
            seed=self.inputs.run.seed * _SEEDS + number,
        )

    def sample(
        self, prompts: Sequence[EncodedPrompt], sampling: Sampling, *, samples_per_prompt: int = 1
    ) -> list[Response]:
        """The policy's answers to each prompt, in the order of the prompts."""
        return sample(self.engine, self.chat_format, prompts, sampling, samples_per_prompt=samples_per_prompt)

    def answer_held_out(self, prompts: Sequence[EncodedPrompt]) -> tuple[list[Response], Scored]:
        """One answer to each prompt, with the same seeds in every evaluation, and all scores, including the judge's."""
        responses = self.sample(prompts, self.sampling(0))
        return responses, self.scorer.score(responses, with_judge=True)

    def answer_borderline(self, count: int) -> dict[str, list[Response]]:
        """Answers, by file, to at most `count` prompts of each of `data.borderline`; they are not scored."""
        inputs = self.inputs
        by_file = load_borderline(
            inputs.data,
            self.chat_format,
            system=inputs.base.system,
            max_tokens=longest_prompt(inputs.base, inputs.rollout, self.bank),
            count=count,
        )
        prompts = [prompt for of_file in by_file.values() for prompt in of_file]
        responses = iter(self.sample(prompts, self.sampling(0)) if prompts else [])
        return {name: list(islice(responses, len(of_file))) for name, of_file in by_file.items()}

    def refresh(self) -> None:
        """Give the engine the policy's current weights."""
        self.engine.refresh(self.bank.policy_model())


def open_session(
    inputs: StepInputs,
    *,
    policy: "Artifact | None",
    held_out: tuple[int, int] | None,
    only_safety: bool = False,
    scores: bool = True,
    critic: CriticKind | None = None,
    checkpointing: bool = False,
) -> AnswerSession:
    """Check everything that needs no weights, then load.

    `held_out` are the numbers of validation and test prompts; with None no prompts are loaded. With `only_safety` the
    prompts are those with is_safety, and the safety model is loaded in any case. Without `scores` no reward model is
    loaded. With a `critic` the policy can be trained, and a reference is loaded.
    """
    check_room(inputs.base, inputs.rollout)
    also = ("judge", "safety") if only_safety else ("judge",)
    bank = open_roles(
        policy=policy,
        base=inputs.base,
        tuning=inputs.tuning,
        reward_models=checked_models(inputs.scoring, inputs.reward_models, also=also) if scores else {},
        critic=critic,
        seed=inputs.run.seed,
        checkpointing=checkpointing,
    )
    if critic is not None:
        distributed.broadcast_tensors(bank.state_dict().values())
    prompts = PromptSplits([], [], [], {})
    if held_out is not None:
        prompts = load_prompts(
            inputs.data,
            bank.chat_format,
            system=inputs.base.system,
            max_tokens=longest_prompt(inputs.base, inputs.rollout, bank),
            held_out=held_out,
            seed=inputs.run.seed,
            only_safety=only_safety,
        )
    engine = open_engine(bank.policy_model(), bank.chat_format, inputs.rollout)
    return AnswerSession(inputs, bank, engine, Scorer(bank, combiner(inputs.scoring)), prompts)


def read_by(inputs: StepInputs) -> dict[str, "Artifact | str"]:
    """The inputs of a step that scores, as its manifest lists them: policy or base, reward models, and a user's
    function."""
    models = named_models(inputs.scoring, inputs.reward_models)
    function = inputs.reward_function
    return sources_of(inputs, {str(role): model for role, model in models.items()}) | (
        {} if function is None else {"reward_function": function}
    )


def free_memory() -> None:
    """Release the memory of models that are no longer used, before others are loaded."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
