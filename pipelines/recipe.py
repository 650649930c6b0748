"""The recipe: one YAML for a whole run, checked at once, and its list of steps with every value filled in."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from llamachat.config.layers import Layers, merged
from llamachat.config.loading import from_plain, load_recipe
from llamachat.config.paths import missing
from llamachat.config.problems import Key, Problem, describe, dotted, nearest, section_problems
from llamachat.config.section import Section
from llamachat.config.sections import Base, Data, Rollout, Run, Tracking, Tuning
from pipelines.stages import LATER, LATER_SECTIONS, STAGES, Stage, not_yet
from sft import Config as SftConfig

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_TAKEN_NAMES = ("wandb", "lineage.json")


class Recipe(Section):
    """Everything that a run is told. A stage is handed its own section and the shared ones, nothing more."""

    unknown_keys: ClassVar[Mapping[str, str]] = {
        section: f"{not_yet(f'the section {section!r}')} Remove it." for section in LATER_SECTIONS
    }

    run: Run = Field(description="Where the run lives, and its seed.")
    base: Base = Field(description="The model that everything is tuned from.")
    tuning: Tuning = Field(default=Tuning(), description="Which weights are trained.")
    data: Data = Field(description="What is learnt from.")
    # A YAML edge: names, or {command: {name: ..., key: value}}; looked through by `_step_problems`.
    steps: tuple[Any, ...] = Field(
        default=("sft",), description="What is run, in order: sft, or {sft: {name: sft-2, epochs: 1, tuning: {...}}}."
    )
    sft: SftConfig = Field(default=SftConfig.model_validate({}), description="Supervised fine-tuning.")
    rollout: Rollout = Field(default=Rollout(), description="How answers are sampled.")
    tracking: Tracking = Field(default=Tracking(), description="What is written down as a step runs.")


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the recipe with its own values: the recipe's sections, and what the step's entry overrides."""

    name: str  # its folder in the run
    stage: Stage
    config: Section
    tuning: Tuning


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a file and overrides; every problem in one ConfigError."""
    return load_recipe(Recipe, path, overrides, more_checks=_more_problems)


def resolve_steps(recipe: Recipe) -> tuple[Step, ...]:
    """The recipe's steps in order."""
    steps = []
    for entry in recipe.steps:
        command, overrides = _parts(entry)
        stage = STAGES[command]
        own, tuning = _split(overrides)
        config = merged(getattr(recipe, stage.section).model_dump(mode="json"), own)
        steps.append(
            Step(
                name=overrides.get("name", command),
                stage=stage,
                config=from_plain(stage.config, config),
                tuning=from_plain(Tuning, merged(recipe.tuning.model_dump(mode="json"), tuning)),
            )
        )
    return tuple(steps)


def _parts(entry: Any) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    ((command, overrides),) = entry.items()
    return command, overrides or {}


def _split(overrides: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """What a step overrides of its stage's section, and of `tuning`."""
    own = {key: value for key, value in overrides.items() if key not in ("name", "tuning")}
    return own, overrides.get("tuning", {})


def _more_problems(layers: Layers) -> Iterator[Problem]:
    for key, text in (*_run_problems(layers.values), *_format_problems(layers.values)):
        yield Problem(layers.source(key), dotted(key), text)
    yield from _step_problems(layers)


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
    data = values.get("data")
    if isinstance(data, Mapping) and data.get("sft") == [] and "sft" in _commands(values.get("steps", ["sft"])):
        yield ("data", "sft"), "empty, but the step 'sft' learns from it. Give dialogs, or take sft out of 'steps'."


def _format_problems(values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    from llamachat.sources import SOURCES

    data = values.get("data")
    known = ["auto", "native", *sorted(SOURCES)]
    for key, sources in data.items() if isinstance(data, Mapping) else ():
        for index, source in enumerate(sources) if isinstance(sources, list) else ():
            name = source.get("format") if isinstance(source, Mapping) else None
            if isinstance(name, str) and name.replace("-", "_") not in known:
                near = nearest(name.replace("-", "_"), known)
                advice = f"Did you mean '{near}'?" if near else f"Known: {', '.join(known)}."
                yield ("data", key, index, "format"), f"there is no format '{name}'. {advice}"


def _commands(steps: object) -> set[str]:
    entries = steps if isinstance(steps, list) else []
    names = [next(iter(entry), "") if isinstance(entry, Mapping) else entry for entry in entries]
    return {name for name in names if isinstance(name, str)}


def _step_problems(layers: Layers) -> Iterator[Problem]:
    steps = layers.values.get("steps", ["sft"])
    if not isinstance(steps, list):
        return  # the types say so already
    if not steps:
        yield Problem(layers.source(("steps",)), "steps", f"empty, so nothing would run. Known: {', '.join(STAGES)}.")
    seen: dict[str, int] = {}
    for index, entry in enumerate(steps):
        at: Key = ("steps", index)
        problem = _entry_problem(entry)
        if problem:
            yield Problem(layers.source(at), dotted(at), problem)
            continue
        command, overrides = _parts(entry)
        name = overrides.get("name", command)
        name_problem = _name_problem(name, command, seen)
        if name_problem:
            yield Problem(layers.source((*at, command, "name")), dotted((*at, command, "name")), name_problem)
        else:
            seen[name] = index
        yield from _override_problems(layers, STAGES[command], overrides, (*at, command))


def _entry_problem(entry: object) -> str | None:
    """What is wrong with the form of one entry of the list, if anything."""
    if isinstance(entry, Mapping) and len(entry) == 1:
        command, overrides = next(iter(entry.items()))
        if overrides is not None and not isinstance(overrides, Mapping):
            return f"found {describe(overrides)} under '{command}', but a mapping is required: {{{command}: {{name: ...}}}}."
    elif isinstance(entry, str):
        command = entry
    else:
        return f"found {describe(entry)}, but a command, or one command with its values, is required: {{sft: {{...}}}}."
    if command in STAGES:
        return None
    if command in LATER:
        return f"{not_yet(f'the step {command!r}')} Take it out of 'steps'."
    near = nearest(command, [*STAGES, *LATER])
    advice = f"Did you mean '{near}'?" if near else f"Known: {', '.join(STAGES)}."
    return f"there is no step '{command}'. {advice}"


def _name_problem(name: object, command: str, seen: Mapping[str, int]) -> str | None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in _TAKEN_NAMES:
        found = "a name that the run folder needs" if name in _TAKEN_NAMES else describe(name)
        return f"found {found}, but the name of the step's folder is required: small letters, digits, '.', '-', '_'."
    if name != command and name in {*STAGES, *LATER}:
        return f"'{name}' is another command, and the step's folder would look like its work. Name it '{command}-2'."
    if name in seen:
        free = next(f"{command}-{n}" for n in range(2, len(seen) + 3) if f"{command}-{n}" not in seen)
        return f"the step {seen[name]} has the name '{name}' already. Name this one: {{{command}: {{name: {free}}}}}."
    return None


def _override_problems(layers: Layers, stage: Stage, overrides: Mapping[str, Any], at: Key) -> Iterator[Problem]:
    """Problems that a step's own values bring; those of the sections they go over are told there."""
    own, tuning = _split(overrides)
    for schema, section, given, place in (
        (stage.config, stage.section, own, at),
        (Tuning, "tuning", tuning, (*at, "tuning")),
    ):
        if not isinstance(given, Mapping):
            text = f"found {describe(given)}, but a mapping is required: {{method: lora}}."
            yield Problem(layers.source(place), dotted(place), text)
            continue
        below = layers.values.get(section)
        below = below if isinstance(below, Mapping) else {}
        before = section_problems(schema, below, source=layers.source, at=place, root=Recipe)
        for problem in section_problems(schema, merged(below, given), source=layers.source, at=place, root=Recipe):
            if problem not in before:
                yield problem
