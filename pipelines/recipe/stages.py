"""The commands of the recipe, what each reads and makes, and the stage package behind it.

A new stage is one entry here, its command in `pipelines/recipe/commands.py`, its cost in
`pipelines/planning/estimates.py`, and its section in the recipe.
"""

from dataclasses import dataclass
from types import ModuleType

import context_distillation
import dpo
import evaluation
import gatt
import ppo
import rejection_sampling
import reward
import sft
from evaluation import report
from llamachat.config.section import Section
from llamachat.runs.artifacts import Kind


@dataclass(frozen=True, slots=True)
class Role:
    """What an artifact is to the steps that make it and to those that read it."""

    kind: Kind
    which: str | None = None  # which of the reward models

    @property
    def key(self) -> str:
        """Its name among the inputs of a step's identity."""
        return f"{self.kind}/{self.which}" if self.which else self.kind

    def __str__(self) -> str:
        return " ".join([*([self.which] if self.which else []), self.kind.replace("_", " ")])


POLICY, EVALUATION, REPORT = Role("policy"), Role("evaluation"), Role("report")
ADVERSARIAL_DATA = ("adversarial", "prompts", "safety")  # sources of prompts that ask for something unsafe
PAIR_DATA = ("helpfulness", "safety", "open", "labels", "sft")  # sources of pairs, and of the labels for them
PROMPT_DATA = ("prompts", "adversarial", "sft", "helpfulness", "safety")  # sources of prompts
REWARD_MODELS = tuple(Role("reward_model", which) for which in ("helpfulness", "safety", "judge"))


@dataclass(frozen=True, slots=True)
class Product:
    """One thing that a command makes, as one step."""

    makes: Role
    data: tuple[str, ...]  # keys of `data` whose records decide what it makes
    needs: tuple[str, ...] = ()  # if not empty, at least one of these must have records
    share: str = ""  # key of `data.split` that must be above 0
    unread: tuple[str, ...] = ()  # keys of its section that do not affect it


@dataclass(frozen=True, slots=True)
class Stage:
    """One command in a recipe's list of steps."""

    command: str
    section: str  # its key in the recipe
    package: ModuleType  # exports Config, run, estimate
    products: tuple[Product, ...]  # one step each; `makes.which` distinguishes them
    reads: tuple[Role, ...] = (POLICY,)  # read from the nearest earlier steps that make them
    scores_if: str = ""  # the key of its section without which it reads no reward models; empty: it always reads them
    shared: tuple[str, ...] = ()  # further sections of the recipe that decide its result
    starts_from_base: bool = False  # whether it may start from a pretrained base instead of a policy
    tunes: bool = False  # whether it makes dialogs on which supervised tuning then trains its policy
    pools: bool = False  # whether it reads the dialogs of all earlier steps of its command
    surveys: tuple[Kind, ...] = ()  # it reads all finished earlier steps of these kinds, and is rerun when they change

    @property
    def config(self) -> type[Section]:
        """The class of its section."""
        return self.package.Config

    @property
    def version(self) -> int:
        """Part of the fingerprint: raised when the same configuration would give another result."""
        return self.package.config.VERSION

    @property
    def models(self) -> tuple[str, ...]:
        """The names of its models; empty for a command with a single step."""
        return tuple(product.makes.which for product in self.products if product.makes.which)


STAGES = {
    stage.command: stage
    for stage in (
        Stage(
            command="sft",
            section="sft",
            package=sft,
            products=(Product(makes=POLICY, data=("sft",), needs=("sft",)),),
            starts_from_base=True,
        ),
        Stage(
            command="rm",
            section="reward",
            package=reward,
            products=(
                Product(
                    makes=Role("reward_model", "helpfulness"),
                    data=PAIR_DATA,
                    needs=("helpfulness",),
                    unread=("safety_auxiliary_weight", "balance_labels", "helpfulness_share"),
                ),
                Product(
                    makes=Role("reward_model", "safety"),
                    data=(*PAIR_DATA, "prompts", "adversarial"),
                    needs=("safety",),
                    unread=("other_share",),
                ),
                Product(
                    makes=Role("reward_model", "judge"),
                    data=(*PAIR_DATA, "prompts", "adversarial"),
                    needs=("helpfulness", "safety"),
                    share="judge",
                    unread=("safety_auxiliary_weight", "balance_labels", "helpfulness_share", "other_share"),
                ),
            ),
        ),
        Stage(
            command="rs",
            section="rejection_sampling",
            package=rejection_sampling,
            products=(Product(makes=POLICY, data=PROMPT_DATA, needs=PROMPT_DATA),),
            reads=(POLICY, *REWARD_MODELS),
            shared=("rollout", "scoring", "sft"),
            tunes=True,
            pools=True,
        ),
        Stage(
            command="gatt",
            section="gatt",
            package=gatt,
            products=(Product(makes=POLICY, data=("sft",), needs=("sft",)),),
            reads=(POLICY, *REWARD_MODELS),
            scores_if="ranks_by_reward",
            shared=("rollout", "scoring", "sft"),
            tunes=True,
        ),
        Stage(
            command="distill",
            section="context_distillation",
            package=context_distillation,
            products=(Product(makes=POLICY, data=(*PROMPT_DATA, "borderline"), needs=ADVERSARIAL_DATA),),
            reads=(POLICY, *REWARD_MODELS),
            shared=("rollout", "scoring", "sft"),
            tunes=True,
        ),
        Stage(
            command="dpo",
            section="dpo",
            package=dpo,
            products=(Product(makes=POLICY, data=("helpfulness", "safety"), needs=("helpfulness", "safety")),),
        ),
        Stage(
            command="ppo",
            section="ppo",
            package=ppo,
            products=(Product(makes=POLICY, data=PROMPT_DATA, needs=PROMPT_DATA),),
            reads=(POLICY, *REWARD_MODELS),
            shared=("rollout", "scoring"),
        ),
        Stage(
            command="eval",
            section="evaluation",
            package=evaluation,
            products=(Product(makes=EVALUATION, data=(*PROMPT_DATA, "borderline"), needs=PROMPT_DATA),),
            reads=(POLICY, *REWARD_MODELS),
            shared=("rollout", "scoring"),
            surveys=("policy",),
        ),
        Stage(
            command="report",
            section="report",
            package=report,
            products=(Product(makes=REPORT, data=()),),
            reads=(),
            surveys=("policy", "reward_model", "evaluation"),
        ),
    )
}
