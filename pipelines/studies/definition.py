"""A study: steps of a recipe with several variants of their values and several seeds.

Its file names the recipe (`extends`), the variants and the seeds. The steps before the studied commands run
with the recipe's own seed, once for all variants that share them; each `<run.dir>/<variant>/seed-<n>` takes them by
reference and runs only the studied commands.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from llamachat.config.loading import Layers, from_plain, parse_mapping, read_text
from llamachat.config.section import ConfigProblem, Key, Section, dotted, from_home, raise_all, section_problems
from llamachat.runs.fingerprints import fingerprint
from pipelines.recipe.recipe import Recipe, Step, choose_steps, load, step_identity
from pipelines.recipe.stages import STAGES

ALL, AUTO = "all", "auto"
SHARED = "shared"  # the folder of the steps before the commands that no variant changes
Origins = Mapping[tuple[str, str], str]  # variant and step's name -> SHARED, or the variant in which it is run
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Variant(Section):
    """One way to run the commands."""

    only: tuple[str, ...] = Field(
        default=(), description="Models that the variant trains; empty: all models of the command."
    )
    values: dict[str, Any] = Field(default={}, description="Overrides of the recipe: {reward.margin: none}.")


class Table(Section):
    """Figures of some variants in one table; differences are to the first one."""

    title: str = Field(description="Title of the table.")
    variants: tuple[str, ...] = Field(default=(), description="Its rows, in order; empty: all variants.")
    columns: dict[str, str] = Field(
        default={}, description="Heading -> name of the figure (metrics.md), as STEP:NAME where several have it."
    )
    margins: bool = Field(default=False, description="Show the margins by rating that each variant trains with.")


class Study(Section):
    """The contents of a study's file."""

    extends: str = Field(min_length=1, description="The recipe, relative to this file.")
    values: dict[str, Any] = Field(
        default={}, description="Overrides of the recipe in every variant: {run.dir: runs/x}."
    )
    command: str | tuple[str, ...] = Field(
        default=AUTO,
        description="The commands to run in each variant: rm, a list such as [rs, ppo], all, or auto (from the first step that a variant changes).",
    )
    variants: dict[str, Variant] = Field(min_length=1, description="Name -> what the variant changes.")
    seeds: tuple[int, ...] = Field(min_length=1, description="Each variant runs once per seed (run.seed).")
    axis: str = Field(
        default="",
        description="Label of the x-axis if the variants' names are numbers; empty: the key that they change.",
    )
    tables: tuple[Table, ...] = Field(
        default=(), description="The tables of study.md; empty: the main figures of all variants."
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """A study with the recipes that it runs."""

    study: Study
    run_dir: Path
    shared: Recipe
    homes: Mapping[str, Recipe]  # by variant: the recipe of the steps before the commands, with the recipe's own seed
    variants: Mapping[tuple[str, int], Recipe]  # by name and seed, in the order in which they run
    first: int  # with auto: the index of the first step that a variant changes

    @property
    def commands(self) -> str:
        """The commands, as text."""
        command = self.study.command
        if isinstance(command, tuple):
            return ", ".join(command)
        return f"all from '{self.shared.steps[self.first].name}' on" if command == AUTO else command

    def steps(self, recipe: Recipe, name: str) -> list[Step]:
        """The steps that one variant runs."""
        chosen, variant = self._chosen(recipe.steps), self.study.variants[name]
        if not variant.only:
            return chosen
        return [s for s in chosen if not s.stage.models or s in choose_steps(chosen, s.stage.command, variant.only)]

    def before(self, variant: str) -> list[Step]:
        """The steps before the commands in one variant."""
        steps = self.homes[variant].steps
        return list(steps[: steps.index(self._chosen(steps)[0])])

    def origins(self) -> Origins:
        """Where each step before the commands is run: in `shared`, or in the first variant that has it in this form."""
        known = dict.fromkeys(_fingerprints(self.shared, self.shared.steps).items(), SHARED)
        return {
            (variant, name): known.setdefault((name, digest), variant)
            for variant, recipe in self.homes.items()
            for name, digest in _fingerprints(recipe, self.before(variant)).items()
        }

    def origin(self, where: str) -> Recipe:
        """The recipe that runs the steps before the commands in `shared`, or in a variant."""
        return self.shared if where == SHARED else self.homes[where]

    def _chosen(self, steps: Sequence[Step]) -> list[Step]:
        command = self.study.command
        if isinstance(command, tuple):
            wanted = [step for one in command for step in choose_steps(steps, one)]
            return [step for step in steps if step in wanted]
        return list(steps[self.first :]) if command == AUTO else choose_steps(steps, command)


def load_study(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The study of a file; overrides apply to its own keys (`seeds=[0]`) or else to the recipe."""
    layers = Layers(str(path))
    values, problems = parse_mapping(read_text(path), str(path))
    layers.add(values, str(path))
    own = [text for text in overrides if _key(text).partition(".")[0] in Study.model_fields]
    problems += [problem for text in own if (problem := layers.override(text))]
    schema_problems = section_problems(Study, layers.values, source=layers.source, root=Study)
    problems += schema_problems or [
        ConfigProblem(layers.source(key), dotted(key), text) for key, text in _faults(layers.values)
    ]
    raise_all(problems)
    study = from_plain(Study, layers.values)
    recipe_file = path.parent / from_home(study.extends)
    over = [*_lines(study.values), *(text for text in overrides if text not in own)]
    run_dir = Path(load(recipe_file, over).run.dir)
    if not any(_key(text) == "run.dir" for text in over):
        run_dir = run_dir.with_name(f"{run_dir.name}-{path.stem}")  # the recipe's own run is not the study's
    recipes = {
        (name, seed): load(recipe_file, [*over, *_lines(variant.values), *_lines(_place(run_dir, name, seed))])
        for seed in study.seeds
        for name, variant in study.variants.items()
    }
    homes = {
        name: load(recipe_file, [*over, *_lines(variant.values), *_lines({"run.dir": str(run_dir / name / SHARED)})])
        for name, variant in study.variants.items()
    }
    shared = load(recipe_file, [*over, *_lines({"run.dir": str(run_dir / SHARED)})])
    first = _first_changed(shared, homes) if study.command == AUTO else 0
    return Plan(study, run_dir, shared, homes, recipes, first)


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _place(run_dir: Path, name: str, seed: int) -> dict[str, Any]:
    # Earlier steps are taken from `shared`; a parent run has no steps with other seeds.
    return {"run.dir": str(run_dir / name / f"seed-{seed}"), "run.seed": seed, "run.parent": None}


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _faults(values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """Problems of a study that types cannot express."""
    command, variants, seeds = values.get("command", AUTO), values["variants"], values["seeds"]
    commands = list(STAGES) if command in (ALL, AUTO) else [command] if isinstance(command, str) else command
    unknown = [name for name in commands if name not in STAGES]
    if unknown or not commands:
        reason = f"there is no command '{unknown[0]}'" if unknown else "an empty list"
        yield ("command",), f"{reason}. Known: {', '.join(STAGES)}, lists of them, {ALL}, {AUTO}."
        return
    if len({*seeds}) < len(seeds):
        yield ("seeds",), "a seed is listed twice, and would count twice. List each once."
    models = [model for name in commands for model in STAGES[name].models]
    for name, variant in variants.items():
        if not _NAME.fullmatch(name) or name == SHARED:
            text = (
                f"'{name}' cannot be the folder of a variant. Use small letters, digits, '.', '-', '_', not '{SHARED}'."
            )
            yield ("variants", name), text
        unknown = [model for model in variant.get("only", ()) if model not in models]
        if unknown:
            known = ", ".join(models) or "none, it is one step"
            text = f"'{unknown[0]}' is not a model of '{', '.join(commands)}', whose models are: {known}. Correct it."
            yield ("variants", name, "only"), text
    yield from _table_faults(values, commands)


def _table_faults(values: Mapping[str, Any], commands: Sequence[str]) -> Iterator[tuple[Key, str]]:
    variants = values["variants"]
    for index, table in enumerate(values.get("tables", ())):
        unknown = [name for name in table.get("variants", ()) if name not in variants]
        if unknown:
            text = f"there is no variant '{unknown[0]}'. The variants: {', '.join(variants)}. Correct the name."
            yield ("tables", index, "variants"), text
        if table.get("margins") and not any(STAGES[command].section == "reward" for command in commands):
            text = f"'{', '.join(commands)}' has no margins by rating; the command 'rm' has. Remove it."
            yield ("tables", index, "margins"), text


def _fingerprints(recipe: Recipe, steps: Sequence[Step]) -> dict[str, str]:
    """By name, a fingerprint of each step that uses the fingerprints of the steps that make its inputs.

    It is known from the recipe alone, before anything is run: steps of two recipes with equal fingerprints have equal
    results.
    """
    prints: dict[str, str] = {}
    for step in steps:
        makers = recipe.makers(step).items()
        pooled = [one.name for one in recipe.before(step) if step.stage.pools and one.stage is step.stage]
        values = step_identity(recipe, step, {})
        values["inputs"] = {role.key: prints[producers[0].name] for role, producers in makers if producers}
        values["inputs"] |= {f"dialogs/{name}": prints[name] for name in pooled}
        prints[step.name] = fingerprint(values)
    return prints


def _first_changed(shared: Recipe, homes: Mapping[str, Recipe]) -> int:
    """The index of the first step that differs between some variant and the recipe; 0 if none does."""
    rows = [list(_fingerprints(recipe, recipe.steps).items()) for recipe in (shared, *homes.values())]
    shortest = min(map(len, rows))
    places = [place for place in range(shortest) if len({row[place] for row in rows}) > 1]
    if places:
        return places[0]
    # Variants that only drop last steps: the last step that all have can be compared.
    return shortest - 1 if len({len(row) for row in rows}) > 1 else 0
