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
from llamachat.config.loading import Layers, from_plain, load_recipe, merged
from llamachat.config.section import ConfigProblem, Key, Section, dotted, nearest
from llamachat.config.sections import Base, Data, Rollout, Run, Scoring, Tracking, Tuning, missing
from llamachat.data.sources import SOURCES
from llamachat.errors import UsageError
from llamachat.runs.artifacts import StepFolder
from pipelines.recipe.entries import command_line_first, read_entry, step_problems
from pipelines.recipe.stages import REWARD_MODELS, Product, Role, Stage
from ppo import Config as PpoConfig
from rejection_sampling import Config as RejectionSamplingConfig
from reward import Config as RewardConfig
from sft import Config as SftConfig

# Keys of a study's file, which is no recipe but names one.
STUDY_KEYS = ("command", "values", "variants", "seeds", "axis", "tables")


class RecipeSections(Section):
    """The sections of a recipe. A stage is given its own and the shared ones, nothing more."""

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


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe with its steps resolved: what each is, what comes before it and where it lies."""

    sections: RecipeSections
    steps: tuple[Step, ...]

    @property
    def run(self) -> Run:
        return self.sections.run

    @property
    def base(self) -> Base:
        return self.sections.base

    @property
    def tuning(self) -> Tuning:
        return self.sections.tuning

    @property
    def data(self) -> Data:
        return self.sections.data

    @property
    def scoring(self) -> Scoring:
        return self.sections.scoring

    def step(self, name: str) -> Step:
        """The step of that name."""
        return next(step for step in self.steps if step.name == name)

    def before(self, step: Step) -> tuple[Step, ...]:
        """The steps before this one, in order."""
        return self.steps[: [each.name for each in self.steps].index(step.name)]

    def makers(self, step: Step) -> dict[Role, list[Step]]:
        """The earlier steps that make what this one reads, by what they make, nearest first."""
        before = self.before(step)[::-1]
        return {role: [earlier for earlier in before if earlier.product.makes == role] for role in step.reads}

    def folder(self, step: Step) -> StepFolder:
        """Where the step's files are."""
        return StepFolder(Path(self.run.dir) / step.name)

    def changed(self, **sections: Section) -> "Recipe":
        """The recipe with other sections in place of its own."""
        return resolve(self.sections.model_copy(update=sections))


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file and overrides; every problem in one ConfigError."""
    return resolve(load_recipe(RecipeSections, path, overrides, prepare=command_line_first, more_checks=_more_problems))


def resolve(sections: RecipeSections) -> Recipe:
    """The recipe of these sections, each step with its own values over theirs."""
    steps = []
    data = sections.data.model_dump(mode="json")
    for entry in map(read_entry, sections.steps):
        config = merged(getattr(sections, entry.stage.section).model_dump(mode="json"), entry.own)
        tuning = merged(sections.tuning.model_dump(mode="json"), entry.tuning)
        rollout = merged(sections.rollout.model_dump(mode="json"), entry.rollout)
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
    return Recipe(sections, tuple(steps))


def choose_steps(steps: Sequence[Step], command: str, only: Sequence[str] = ()) -> list[Step]:
    """The steps of a command, or all of them for "all"; with `only` those of these models."""
    chosen = [step for step in steps if command in ("all", step.stage.command)]
    if not chosen:
        raise UsageError(
            f"steps: the recipe has no step '{command}', only {', '.join(step.name for step in steps)}."
            f" A command runs the steps of its name. Add '{command}' to 'steps', or run one that is there."
        )
    models = [step.product.makes.which for step in chosen]
    absent = [name for name in only if name not in models]
    if absent:
        raise UsageError(
            f"--only {absent[0]}: the recipe has no such step of '{command}', only"
            f" {', '.join(step.name for step in chosen)}. A model is trained where its data are in the recipe. Name one"
            " of those, or give data for it."
        )
    return [step for step in chosen if not only or step.product.makes.which in only]


def _more_problems(layers: Layers) -> Iterator[ConfigProblem]:
    for key, text in (*_run_problems(layers.values), *_format_problems(layers.values)):
        yield ConfigProblem(layers.source(key), dotted(key), text)
    yield from step_problems(layers, RecipeSections)


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
    data = values.get("data")
    known = ["auto", "native", *sorted(SOURCES)]
    for key, sources in data.items() if isinstance(data, Mapping) else ():
        for index, source in enumerate(sources) if isinstance(sources, list) else ():
            name = source.get("format") if isinstance(source, Mapping) else None
            if isinstance(name, str) and name.replace("-", "_") not in known:
                near = nearest(name.replace("-", "_"), known)
                advice = f"Did you mean '{near}'?" if near else f"Known: {', '.join(known)}."
                yield ("data", key, index, "format"), f"there is no format '{name}'. {advice}"
