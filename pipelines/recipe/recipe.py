"""The recipe: one YAML for a whole run, validated as a whole, its list of steps, and the identity of each step.

An entry of the list is a command (`sft`), one model of a command (`rm/safety`), or either with overrides of its
section: `{rm/safety: {epochs: 2}}`. A command with several models stands for those for which the recipe has data, or
for those that `only` names.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import ConfigDict, Field, RootModel, create_model, model_validator

from context_distillation import Config as ContextDistillationConfig
from dpo import Config as DpoConfig
from evaluation import Config as EvaluationConfig
from evaluation.report import Config as ReportConfig
from gatt import Config as GattConfig
from llamachat.config.loading import COMMAND_LINE, Layers, from_plain, load_recipe, merged, parse_mapping, read_text
from llamachat.config.section import (
    ConfigProblem,
    Key,
    Section,
    TextCheck,
    describe,
    dotted,
    from_home,
    identity,
    nearest,
    section_problems,
)
from llamachat.config.sections import (
    Base,
    Data,
    DataSource,
    Rollout,
    Run,
    Scoring,
    Split,
    Tracking,
    Tuning,
    function_name,
    here_or_bundled,
    missing,
)
from llamachat.data.sources import SOURCES
from llamachat.errors import UsageError
from llamachat.pipes import regular_file
from llamachat.runs.artifacts import Artifact, StepFolder, read_artifact
from llamachat.runs.fingerprints import digest_of_file, digest_of_folder, digest_of_program, digest_of_weights
from llamachat.runs.inputs import Which
from pipelines.recipe.stages import REWARD_MODELS, STAGES, Product, Role, Stage
from ppo import Config as PpoConfig
from rejection_sampling import Config as RejectionSamplingConfig
from reward import Config as RewardConfig
from sft import Config as SftConfig

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_TAKEN_NAMES = ("wandb", "lineage.json", "study.json", "study.md", "study.png")
_ABSENT = object()  # null is a valid value of the command line


# -- the entries of the list of steps


def _name_fault(command: str, value: str) -> str | None:
    """What is wrong with the name of a step of this command, or None."""
    if not _NAME.fullmatch(value) or value in _TAKEN_NAMES:
        allowed = f"small letters, digits, '.', '-', '_', and none of {', '.join(_TAKEN_NAMES)}"
        return f"'{value}' cannot be the name of a step's folder. Choose another: {allowed}."
    if value == command or value not in STAGES:
        return None
    return f"'{value}' is another command, so the step's folder would look like that command's. Name it '{command}-2'."


@cache
def _without_rules(schema: type[Section]) -> type[Section]:
    """The keys of a section without the checks between them, since an entry overrides only some values."""
    return _keys_of(schema)


def _keys_of(schema: type[Section], **more: Any) -> type[Section]:
    """The keys of a section without the checks between them, and additional keys."""
    fields: dict[str, Any] = {name: (field.annotation, field) for name, field in schema.model_fields.items()}
    model = create_model(schema.__name__, __base__=Section, **more, **fields)
    model.unknown_keys = schema.unknown_keys
    return model


def _entry_model(head: str, stage: Stage) -> type[Section]:
    """The values that an entry may have: keys of its stage's section, and keys of the step itself."""
    name = Field(default=stage.command, description="Folder of the step in the run.")
    own: dict[str, Any] = {"name": (Annotated[str, TextCheck(partial(_name_fault, stage.command))], name)}
    refused = {"only": f"'{head}' is a single step, so nothing can be chosen. Remove it."}
    if head == stage.command and stage.models:
        own["only"] = (
            tuple[Which, ...],
            Field(default=(), min_length=1, description=f"Only these of {', '.join(stage.models)}."),
        )
    own["tuning"] = (_without_rules(Tuning), Field(default=Tuning(), description="Overrides of the section tuning."))
    for name, schema, why in _OF_STEPS:
        if name in stage.shared:
            values = Field(default=schema(), description=f"Overrides of the section {name}.")
            own[name] = (_without_rules(schema), values)
        else:
            refused[name] = f"'{head}' {why}. Remove it."
    model = _keys_of(stage.config, **own)
    model.unknown_keys = {**refused, **model.unknown_keys}
    return model


# Shared sections that an entry may override if its step reads them, and the reason why other steps may not.
_OF_STEPS: tuple[tuple[str, type[Section], str], ...] = (
    ("rollout", Rollout, "does not learn from sampled answers"),
    ("scoring", Scoring, "scores no answers"),
)
_SHARED = ("tuning", *(name for name, _, _ in _OF_STEPS))


class _OneStep(Section):
    """A mapping of one step to its values; its keys are the known steps."""

    key_word: ClassVar[str] = "step"

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if len(self.model_fields_set) != 1:
            steps = ", ".join(sorted(self.model_fields_set)) or "none"
            raise ValueError(f"an entry is one step, but this one has {steps}. Write each as its own entry")
        return self


_HEADS = STAGES | {f"{stage.command}/{model}": stage for stage in STAGES.values() for model in stage.models}
_FORMS: dict[str, Any] = {head: (_entry_model(head, stage), Field(default=None)) for head, stage in _HEADS.items()}


class StepEntry(RootModel[Any]):
    """One entry of the list as written: a step, or a mapping of one step to its values."""

    model_config = ConfigDict(frozen=True)

    form: ClassVar[type[Section]] = create_model("Step", __base__=_OneStep, **_FORMS)

    @model_validator(mode="after")
    def _has_the_form(self) -> Self:
        plain = {self.root: {}} if isinstance(self.root, str) else self.root
        if not isinstance(plain, dict):
            raise ValueError(
                f"found {describe(plain)}, but a step, or a mapping of one step to its values, is required"
            )
        values = {head: {} if of is None else of for head, of in plain.items()}
        self.form.model_validate_json(json.dumps(values), strict=True)
        return self

    @property
    def head(self) -> str:
        """The step as written: sft, rm, rm/safety."""
        return self.root if isinstance(self.root, str) else next(iter(self.root))

    @property
    def values(self) -> dict[str, Any]:
        """The entry's values for its step."""
        return ({} if isinstance(self.root, str) else self.root[self.head]) or {}

    @property
    def stage(self) -> Stage:
        return _HEADS[self.head]

    @property
    def name(self) -> Any:
        """The folder of its step or steps."""
        return self.values.get("name", self.stage.command)

    @property
    def named(self) -> tuple[str, ...]:
        """The models that it names; empty if the data decide."""
        _, _, which = self.head.partition("/")
        return (which,) if which else tuple(self.values.get("only") or ())

    @property
    def sections(self) -> tuple[tuple[type[Section], str], ...]:
        """The sections that it may override, with their schemas: its stage's own, and the shared ones."""
        return (self.stage.config, self.stage.section), *zip((Tuning, Rollout, Scoring), _SHARED, strict=True)

    def over(self, section: str) -> Mapping[str, Any]:
        """Its values for one section of the recipe: a shared one or the stage's own."""
        if section in _SHARED:
            return _mapping(self.values.get(section))
        return {key: value for key, value in self.values.items() if key not in ("name", "only", *_SHARED)}

    def products(self, data: Mapping[str, Any]) -> list[Product]:
        """What it makes from these data, given as plain values."""
        if self.named:
            return [product for product in self.stage.products if product.makes.which in self.named]
        if not self.stage.models:
            return list(self.stage.products)
        return [product for product in self.stage.products if not any(_lacks(product, data))]

    def step_name(self, product: Product) -> str:
        """The step's name, which is also its folder in the run."""
        return f"{self.name}/{product.makes.which}" if product.makes.which else self.name


# -- the recipe


# Keys of a study's file, which extends a recipe.
STUDY_KEYS = ("command", "values", "variants", "seeds", "axis", "tables")


class RecipeSections(Section):
    """The sections of a recipe. A stage gets its own section and the shared ones only."""

    unknown_keys: ClassVar[Mapping[str, str]] = dict.fromkeys(
        STUDY_KEYS, "a study's key, but this command runs a recipe. Pass the recipe that the study extends."
    )

    run: Run = Field(description="Folder, seed and time budget of the run.")
    base: Base = Field(description="The pretrained model that all tuning starts from.")
    tuning: Tuning = Field(default=Tuning(), description="Which weights are trained.")
    data: Data = Field(description="The training data.")
    steps: tuple[StepEntry, ...] = Field(
        default=(StepEntry("sft"),),
        min_length=1,
        description="The steps to run, in order: sft, rm, rm/safety, rs, or {sft: {name: sft-2, epochs: 1, tuning: {...}}}; steps that sample also accept rollout: {...} and scoring: {...}.",
    )
    sft: SftConfig = Field(default=SftConfig.model_validate({}), description="Supervised fine-tuning.")
    reward: RewardConfig = Field(default=RewardConfig.model_validate({}), description="Reward models.")
    scoring: Scoring = Field(default=Scoring(), description="How the reward models' scores are combined.")
    rejection_sampling: RejectionSamplingConfig = Field(
        default=RejectionSamplingConfig.model_validate({}),
        description="Rejection sampling: training on the best of K answers.",
    )
    gatt: GattConfig = Field(
        default=GattConfig.model_validate({}), description="Ghost Attention: following an instruction over many turns."
    )
    context_distillation: ContextDistillationConfig = Field(
        default=ContextDistillationConfig.model_validate({}),
        description="Context distillation: training on safer answers that were sampled under a preprompt, without the preprompt.",
    )
    dpo: DpoConfig = Field(
        default=DpoConfig.model_validate({}),
        description="Direct preference optimisation: the policy learns from pairs directly, without a reward model.",
    )
    ppo: PpoConfig = Field(default=PpoConfig.model_validate({}), description="Proximal policy optimisation.")
    evaluation: EvaluationConfig = Field(
        default=EvaluationConfig.model_validate({}),
        description="Evaluation of every policy of the run on the same held-out prompts.",
    )
    report: ReportConfig = Field(default=ReportConfig(), description="The report on the whole run.")
    rollout: Rollout = Field(default=Rollout(), description="How answers are sampled.")
    tracking: Tracking = Field(default=Tracking(), description="What is recorded while a step runs.")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the recipe: the recipe's sections, overridden by the step's entry."""

    name: str  # its folder in the run
    stage: Stage
    product: Product
    config: Section
    tuning: Tuning
    rollout: Rollout
    scoring: Scoring

    @property
    def reads(self) -> tuple[Role, ...]:
        """What it reads from earlier steps."""
        if self.stage.scores_if and not getattr(self.config, self.stage.scores_if):
            return tuple(role for role in self.stage.reads if role not in REWARD_MODELS)
        return self.stage.reads


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe with its steps resolved: the configuration, inputs and folder of each."""

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

    def step(self, name: str) -> Step:
        """The step with that name."""
        return next(step for step in self.steps if step.name == name)

    def before(self, step: Step) -> tuple[Step, ...]:
        """The steps before this one, in order."""
        return self.steps[: [each.name for each in self.steps].index(step.name)]

    def makers(self, step: Step) -> dict[Role, list[Step]]:
        """The earlier steps that make this step's inputs, by role, nearest first."""
        before = self.before(step)[::-1]
        return {role: [earlier for earlier in before if earlier.product.makes == role] for role in step.reads}

    def folder(self, step: Step) -> StepFolder:
        """Where the step's files are."""
        return StepFolder(Path(self.run.dir) / step.name)

    def changed(self, **sections: Section) -> "Recipe":
        """The recipe with other sections in place of its own."""
        return resolve(self.sections.model_copy(update=sections))


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file and overrides; all problems in one ConfigError."""
    return resolve(load_recipe(RecipeSections, path, overrides, prepare=command_line_first, more_checks=_more_problems))


def resolve(sections: RecipeSections) -> Recipe:
    """The recipe with these sections, each step with its overrides applied."""
    steps = []
    data = sections.data.model_dump(mode="json")
    for entry in sections.steps:
        config, tuning, rollout, scoring = (
            from_plain(schema, merged(getattr(sections, name).model_dump(mode="json"), entry.over(name)))
            for schema, name in entry.sections
        )
        steps += [
            Step(
                name=entry.step_name(product),
                stage=entry.stage,
                product=product,
                config=config,
                tuning=cast(Tuning, tuning),
                rollout=cast(Rollout, rollout),
                scoring=cast(Scoring, scoring),
            )
            for product in entry.products(data)
        ]
    return Recipe(sections, tuple(steps))


def is_study(path: Path) -> bool:
    """Whether a file is a study; a file that cannot be read counts as a recipe, which reports the error."""
    try:
        values, _ = parse_mapping(read_text(path), str(path))
    except (OSError, UnicodeDecodeError):
        return False
    return "variants" in values


def choose_steps(steps: Sequence[Step], command: str, only: Sequence[str] = ()) -> list[Step]:
    """The steps of a command, or of "all"; `only` restricts them to these models."""
    chosen = [step for step in steps if command in ("all", step.stage.command)]
    if not chosen:
        raise UsageError(
            f"steps: the recipe has no step '{command}', only {', '.join(step.name for step in steps)}."
            f" A command runs the steps with its name. Add '{command}' to 'steps', or run an existing one."
        )
    models = [step.product.makes.which for step in chosen]
    absent = [name for name in only if name not in models]
    if absent:
        raise UsageError(
            f"--only {absent[0]}: the recipe has no such step of '{command}', only"
            f" {', '.join(step.name for step in chosen)}. A model is trained if the recipe has data for it. Name one"
            " of those, or add data for it."
        )
    return [step for step in chosen if not only or step.product.makes.which in only]


# -- problems that types cannot express


def _more_problems(layers: Layers) -> Iterator[ConfigProblem]:
    for key, text in (*_run_problems(layers.values), *_format_problems(layers.values), *_step_problems(layers)):
        yield ConfigProblem(layers.source(key), dotted(key), text)
    yield from _conflicts(layers)


def _run_problems(values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    run = values.get("run")
    paths = (run.get(key) for key in ("dir", "parent")) if isinstance(run, Mapping) else (None, None)
    run_dir, parent = (from_home(path) if isinstance(path, str) else None for path in paths)
    if parent is not None:
        if not Path(parent).is_dir():
            yield ("run", "parent"), missing(parent, what="the parent run")
        elif run_dir is not None and Path(run_dir).resolve() == Path(parent).resolve():
            yield ("run", "parent"), f"this is run.dir itself, '{run_dir}'. Choose another folder for the new run."
    if run_dir and Path(run_dir).exists() and not Path(run_dir).is_dir():
        yield ("run", "dir"), f"'{run_dir}' is a file, but a run is a folder. Choose another path."


def _format_problems(values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    data = values.get("data")
    known = ["auto", "native", *sorted(SOURCES)]
    for key, sources in data.items() if isinstance(data, Mapping) else ():
        for index, source in enumerate(sources) if isinstance(sources, list) else ():
            name = source.get("format") if isinstance(source, Mapping) else None
            if isinstance(name, str) and name.replace("-", "_") not in known:
                near = nearest(name.replace("-", "_"), known)
                advice = f"Did you mean '{near}'?" if near else f"Known: {', '.join(known)}."
                yield ("data", key, index, "format"), f"unknown format '{name}'. {advice}"


def _entries(layers: Layers) -> Iterator[tuple[Key, StepEntry]]:
    """The entries of the raw list that name a known step, and their places; the types report errors in the others."""
    steps = layers.values.get("steps", ["sft"])
    for index, item in enumerate(steps if isinstance(steps, list) else ()):
        if isinstance(item, str) or (isinstance(item, dict) and len(item) == 1):
            entry = StepEntry.model_construct(root=item)
            if entry.head in _HEADS and isinstance(entry.values, dict):
                yield ("steps", index, entry.head), entry


def _step_problems(layers: Layers) -> Iterator[tuple[Key, str]]:
    """Names that two steps share, and steps without anything to learn from."""
    data = layers.values.get("data")
    seen: dict[str, int] = {}
    for at, entry in _entries(layers):
        only = entry.values.get("only", entry.stage.models)
        if not isinstance(only, list | tuple) or not all(model in entry.stage.models for model in only):
            continue  # reported by the types
        products = entry.products(_mapping(data))
        names = [entry.step_name(product) for product in products]
        duplicate = next((name for name in names if name in seen), None)
        if duplicate is not None:
            command, folders = entry.stage.command, {name.partition("/")[0] for name in seen}
            free = next(f"{command}-{n}" for n in range(2, len(seen) + 3) if f"{command}-{n}" not in folders)
            advice = f"Name this one: {{{entry.head}: {{name: {free}}}}}."
            yield (*at, "name"), f"the step {seen[duplicate]} already has the name '{duplicate}'. {advice}"
        seen |= {name: int(at[1]) for name in names if name not in seen}
        if isinstance(data, Mapping):
            yield from _data_problems(entry, products, data, at[:2])


def _data_problems(
    entry: StepEntry, products: list[Product], data: Mapping[str, Any], at: Key
) -> Iterator[tuple[Key, str]]:
    """Data that the chosen models need and the recipe lacks."""
    or_remove = f"or take {entry.head} out of 'steps'"
    for product in products:
        name = entry.step_name(product)
        for key in _lacks(product, data):
            if key[1] == "split":
                yield key, f"0, but the step '{name}' learns only from that share. Set it to about 0.2, {or_remove}."
            else:
                yield key, f"empty, but the step '{name}' learns from it. Add records there, {or_remove}."
    if not products:
        keys = dict.fromkeys(f"data.{key}" for product in entry.stage.products for key in product.needs)
        yield at, f"'{entry.head}' has nothing to learn from. Add records under {' or '.join(keys)}, {or_remove}."


def _lacks(product: Product, data: Mapping[str, Any]) -> Iterator[Key]:
    """Keys without which nothing of this kind can be made; the types report a missing required key."""
    if product.needs and not any(
        data.get(key) or (key not in data and Data.model_fields[key].is_required()) for key in product.needs
    ):
        yield "data", product.needs[0]
    if product.share and not _mapping(data.get("split")).get(product.share, getattr(Split(), product.share)):
        yield "data", "split", product.share


def _conflicts(layers: Layers) -> Iterator[ConfigProblem]:
    """Problems of overridden values: a step's over its sections, and `sft` keys over that section."""
    plain = layers.values

    def conflicts(schema: type[Section], below: object, over: object, at: Key) -> list[ConfigProblem]:
        known, problems = (
            section_problems(schema, values, source=layers.source, at=at, root=RecipeSections)
            for values in (_mapping(below), merged(_mapping(below), _mapping(over)))
        )
        return [problem for problem in problems if problem not in known]

    sft = plain.get("sft")
    for stage in STAGES.values():
        if stage.tunes:
            yield from conflicts(SftConfig, sft, _at(plain, (stage.section, "sft")), (stage.section, "sft"))
    for at, entry in _entries(layers):
        stage = entry.stage
        for schema, section in entry.sections:
            place = at if section == stage.section else (*at, section)
            problems = conflicts(schema, plain.get(section), entry.over(section), place)
            yield from (problem for problem in problems if problem.key == dotted(place))  # the types report single keys
        if stage.tunes:
            below = merged(_mapping(sft), _mapping(_at(plain, (stage.section, "sft"))))
            yield from conflicts(SftConfig, below, entry.values.get("sft"), (*at, "sft"))


def _mapping(values: object) -> Mapping[str, Any]:
    return values if isinstance(values, Mapping) else {}


def _at(values: Any, key: Key) -> Any:
    for part in key:
        values = values.get(part, _ABSENT) if isinstance(values, dict) else _ABSENT
    return values


def command_line_first(layers: Layers) -> None:
    """Remove from a file's steps each value whose section is set on the command line.

    `tuning.method=qlora` applies to every step; `steps.1.sft.epochs=1` still sets one step's value.
    """

    def yields(holder: dict[str, Any], key: str, section: Key, place: Key) -> None:
        value, section_value = holder[key], _at(layers.values, section)
        if isinstance(value, dict) and isinstance(section_value, dict):
            for name in list(value):
                yields(value, name, (*section, name), (*place, name))
        elif (
            section_value is not _ABSENT
            and layers.source(section) == COMMAND_LINE
            and layers.source(place) != COMMAND_LINE
        ):
            del holder[key]

    for at, entry in _entries(layers):
        for key in [key for key in entry.values if key not in ("name", "only")]:
            section: Key = (key,) if key in _SHARED else (entry.stage.section, key)
            yields(entry.values, key, section, (*at, key))


# -- identity


def step_identity(recipe: Recipe, step: Step, inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """Everything that decides the step's result, as plain JSON values; `inputs` are the artifacts that it reads."""
    section = {key: value for key, value in identity(step.config).items() if key not in step.product.unread}
    if section.get("sampler") and Path(section["sampler"]).is_dir():
        section["sampler"] = read_artifact(Path(section["sampler"]), "policy", reader=step.name).digest
    if "lists" in section:
        section["lists"] = {name: digest_of_file(here_or_bundled(path)) for name, path in section["lists"].items()}
    return {
        "step": step.name,
        "command": step.stage.command,
        "stage_version": step.stage.version,
        **({"sft_version": STAGES["sft"].version} if step.stage.tunes else {}),
        "run": identity(recipe.run),
        "base": _base_identity(recipe.base),
        # Rank and targets of adapters do not matter to a step with full tuning.
        "tuning": {"method": "full"} if step.tuning.method == "full" else identity(step.tuning),
        "data": {
            **{key: list(map(_source_identity, getattr(recipe.data, key))) for key in step.product.data},
            "split": identity(recipe.data.split),
        },
        step.stage.section: section,
        **{
            key: _shared_identity(getattr(step if key in _SHARED else recipe.sections, key))
            for key in step.stage.shared
        },
        "inputs": {key: artifact.digest for key, artifact in inputs.items()},
    }


def _base_identity(base: Base) -> dict[str, Any]:
    values = identity(base)
    del values["policy"]  # counts as an input of the step that reads it
    if Path(base.model).is_dir():
        values["model"] = digest_of_weights(Path(base.model))
    return values


def _shared_identity(section: Section) -> dict[str, Any]:
    values = identity(section)
    if isinstance(section, Scoring):
        function = function_name(section.combine)
        if function is not None and function.path.is_file():
            values["combine"] = f"{digest_of_program(function.path)}:{function.function}"
        for key in ("helpfulness", "safety"):
            if values[key] is not None and Path(values[key]).is_dir():
                folder = Path(values[key])  # of a step, or of a model
                values[key] = digest_of_weights(folder / "artifact" if (folder / "artifact").is_dir() else folder)
    return values


def _source_identity(source: DataSource) -> dict[str, Any]:
    values = identity(source)
    path = regular_file(Path(source.path))
    if path.is_file():
        values["path"] = digest_of_file(path)
    elif path.is_dir():
        values["path"] = digest_of_folder(path)
    return values
