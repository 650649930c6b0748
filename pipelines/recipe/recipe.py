"""The recipe: one YAML for a whole run, checked at once, and its list of steps with every value filled in."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from context_distillation import Config as ContextDistillationConfig
from evaluation import Config as EvaluationConfig
from evaluation.report import Config as ReportConfig
from gatt import Config as GattConfig
from llamachat.config.layers import Layers, merged
from llamachat.config.loading import from_plain, load_recipe
from llamachat.config.paths import missing
from llamachat.config.problems import Key, Problem, dotted, nearest
from llamachat.config.section import Section
from llamachat.config.sections import Base, Data, Rollout, Run, Scoring, Tracking, Tuning
from pipelines.recipe.entries import command_line_first, read_entry, step_problems
from pipelines.recipe.stages import REWARD_MODELS, Product, Role, Stage
from ppo import Config as PpoConfig
from rejection_sampling import Config as RejectionSamplingConfig
from reward import Config as RewardConfig
from sft import Config as SftConfig

# Keys of a study's file, which is no recipe but names one.
STUDY_KEYS = ("command", "values", "variants", "seeds", "axis", "tables")


class Recipe(Section):
    """Everything that a run is told. A stage is handed its own section and the shared ones, nothing more."""

    unknown_keys: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(STUDY_KEYS, "a study's key, and this command runs a recipe. Give the recipe that it extends."),
    }

    run: Run = Field(description="Where the run lives, and its seed.")
    base: Base = Field(description="The model that everything is tuned from.")
    tuning: Tuning = Field(default=Tuning(), description="Which weights are trained.")
    data: Data = Field(description="What is learnt from.")
    # A YAML edge: names, or {command: {name: ..., key: value}}; looked through by `step_problems`.
    steps: tuple[Any, ...] = Field(
        default=("sft",),
        description="What is run, in order: sft, rm, rm/safety, rs, or {sft: {name: sft-2, epochs: 1, tuning: {...}}}; steps that sample also take rollout: {...}.",
    )
    sft: SftConfig = Field(default=SftConfig.model_validate({}), description="Supervised fine-tuning.")
    reward: RewardConfig = Field(default=RewardConfig.model_validate({}), description="Reward models.")
    scoring: Scoring = Field(default=Scoring(), description="How reward models' scores become one.")
    rejection_sampling: RejectionSamplingConfig = Field(
        default=RejectionSamplingConfig.model_validate({}), description="Rejection sampling: the best of K answers."
    )
    gatt: GattConfig = Field(
        default=GattConfig.model_validate({}), description="Ghost Attention: instructions that hold over many turns."
    )
    context_distillation: ContextDistillationConfig = Field(
        default=ContextDistillationConfig.model_validate({}),
        description="Context distillation: safer answers, sampled under a preprompt, are learnt without it.",
    )
    ppo: PpoConfig = Field(default=PpoConfig.model_validate({}), description="Proximal policy optimisation.")
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig.model_validate({}), description="Every policy of the run on the same held-out prompts."
    )
    report: ReportConfig = Field(default=ReportConfig(), description="One page that tells of the whole run.")
    rollout: Rollout = Field(default=Rollout(), description="How answers are sampled.")
    tracking: Tracking = Field(default=Tracking(), description="What is written down as a step runs.")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the recipe with its own values: the recipe's sections, and what the step's entry overrides."""

    name: str  # its folder in the run
    stage: Stage
    product: Product
    config: Section
    tuning: Tuning
    rollout: Rollout

    @property
    def reads(self) -> tuple[Role, ...]:
        """What it takes from earlier steps."""
        if self.stage.scores_if and not getattr(self.config, self.stage.scores_if):
            return tuple(role for role in self.stage.reads if role not in REWARD_MODELS)
        return self.stage.reads


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file and overrides; every problem in one ConfigError."""
    return load_recipe(Recipe, path, overrides, prepare=command_line_first, more_checks=_more_problems)


def resolve_steps(recipe: Recipe) -> tuple[Step, ...]:
    """The recipe's steps in order."""
    steps = []
    data = recipe.data.model_dump(mode="json")
    for entry in map(read_entry, recipe.steps):
        config = merged(getattr(recipe, entry.stage.section).model_dump(mode="json"), entry.own)
        tuning = merged(recipe.tuning.model_dump(mode="json"), entry.tuning)
        rollout = merged(recipe.rollout.model_dump(mode="json"), entry.rollout)
        steps += [
            Step(
                name=entry.step_name(product),
                stage=entry.stage,
                product=product,
                config=from_plain(entry.stage.config, config),
                tuning=from_plain(Tuning, tuning),
                rollout=from_plain(Rollout, rollout),
            )
            for product in entry.products(data)
        ]
    return tuple(steps)


def _more_problems(layers: Layers) -> Iterator[Problem]:
    for key, text in (*_run_problems(layers.values), *_format_problems(layers.values)):
        yield Problem(layers.source(key), dotted(key), text)
    yield from step_problems(layers, Recipe)


def _run_problems(values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    run = values.get("run")
    run_dir, parent = (run.get("dir"), run.get("parent")) if isinstance(run, Mapping) else (None, None)
    if isinstance(parent, str):
        if not Path(parent).is_dir():
            yield ("run", "parent"), missing(parent, what="the parent run")
        elif isinstance(run_dir, str) and Path(run_dir).resolve() == Path(parent).resolve():
            yield ("run", "parent"), f"this is run.dir itself, '{run_dir}'. Give the new run a folder of its own."
    if isinstance(run_dir, str) and run_dir and Path(run_dir).exists() and not Path(run_dir).is_dir():
        yield ("run", "dir"), f"'{run_dir}' is a file, and a run is a folder. Name another place."


def _format_problems(values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    from llamachat.data.sources import SOURCES

    data = values.get("data")
    known = ["auto", "native", *sorted(SOURCES)]
    for key, sources in data.items() if isinstance(data, Mapping) else ():
        for index, source in enumerate(sources) if isinstance(sources, list) else ():
            name = source.get("format") if isinstance(source, Mapping) else None
            if isinstance(name, str) and name.replace("-", "_") not in known:
                near = nearest(name.replace("-", "_"), known)
                advice = f"Did you mean '{near}'?" if near else f"Known: {', '.join(known)}."
                yield ("data", key, index, "format"), f"there is no format '{name}'. {advice}"
