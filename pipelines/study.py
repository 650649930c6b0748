"""A study: one command of a recipe, run with several variants of its values and several seeds, and compared.

Its file names the recipe (`extends`). What comes before the command is run once, in `<run.dir>/shared`, with the recipe's
own seed; each `<run.dir>/<variant>/seed-<n>` takes it by reference and runs the command alone. Stopped and started
again it goes on where it was, and the tables so far are written after every run.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from llamachat.config.layers import Layers
from llamachat.config.loading import from_plain
from llamachat.config.problems import Key, Problem, dotted, raise_all, section_problems
from llamachat.config.section import Section
from llamachat.config.yaml_files import parse_mapping
from llamachat.errors import ConfigError
from llamachat.runs.artifacts import is_published
from llamachat.runs.folder import StepFolder
from llamachat.runs.state import reference
from pipelines.plan import duration, make_plan, plan_text
from pipelines.recipe import Recipe, Step, load, resolve_steps
from pipelines.resolve import step_folder
from pipelines.running import choose_steps, run_command, run_step
from pipelines.stages import STAGES

log = logging.getLogger(__name__)
SHARED = "shared"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")


class Variant(Section):
    """One way to run the command."""

    only: tuple[str, ...] = Field(default=(), description="Models that it trains; empty: all of the command.")
    values: dict[str, Any] = Field(default={}, description="Over the recipe's: {reward.margin: none}.")


class Table(Section):
    """Figures of some variants side by side; differences are to the first one."""

    title: str = Field(description="What it compares.")
    variants: tuple[str, ...] = Field(min_length=1, description="Its rows, in order.")
    columns: dict[str, str] = Field(default={}, description="Heading -> name of the figure (docs/metrics.md).")
    margins: bool = Field(default=False, description="Show the margins by rating that each variant trains with.")


class Study(Section):
    """What a study's file holds."""

    extends: str = Field(min_length=1, description="The recipe, seen from this file.")
    values: dict[str, Any] = Field(default={}, description="Over the recipe's, in every variant: {run.dir: runs/x}.")
    command: str = Field(description="The command that is run in each variant, such as rm.")
    variants: dict[str, Variant] = Field(min_length=1, description="Name -> what it changes.")
    seeds: tuple[int, ...] = Field(min_length=1, description="Each variant runs once with each as run.seed.")
    tables: tuple[Table, ...] = Field(default=(), description="What is written into study.md.")


@dataclass(frozen=True, slots=True)
class Plan:
    """A study with the recipes that it runs."""

    study: Study
    run_dir: Path
    shared: Recipe
    variants: Mapping[tuple[str, int], Recipe]  # by name and seed, in the order in which they run

    def steps(self, recipe: Recipe, variant: str) -> list[Step]:
        """What one variant runs."""
        return choose_steps(resolve_steps(recipe), self.study.command, self.study.variants[variant].only)

    def before(self) -> list[Step]:
        """What comes before the command, and is run once."""
        steps = resolve_steps(self.shared)
        return list(steps[: steps.index(choose_steps(steps, self.study.command)[0])])


def is_study(path: Path) -> bool:
    """Whether a file is a study; what cannot be read is told where it is taken for a recipe."""
    try:
        values, _ = parse_mapping(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError):
        return False
    return "variants" in values


def load_study(path: Path, overrides: Sequence[str] = ()) -> Plan:
    """The study of a file; overrides go over its own keys (`seeds=[0]`), the others over the recipe's."""
    layers = Layers(str(path))
    values, problems = parse_mapping(path.read_text(encoding="utf-8"), str(path))
    layers.add(values, str(path))
    own = [text for text in overrides if text.partition("=")[0].partition(".")[0].strip() in Study.model_fields]
    problems += [problem for text in own if (problem := layers.override(text))]
    found = section_problems(Study, layers.values, source=layers.source, root=Study)
    problems += found or _problems(layers)
    raise_all(problems)
    study = from_plain(Study, layers.values)
    recipe_file = path.parent / study.extends
    over = [*_lines(study.values), *(text for text in overrides if text not in own)]
    run_dir = Path(load(recipe_file, over).run.dir)
    recipes = {
        (name, seed): load(recipe_file, [*over, *_lines(variant.values), *_lines(_place(run_dir, name, seed))])
        for seed in study.seeds
        for name, variant in study.variants.items()
    }
    return Plan(study, run_dir, load(recipe_file, [*over, *_lines({"run.dir": str(run_dir / SHARED)})]), recipes)


def _place(run_dir: Path, name: str, seed: int) -> dict[str, Any]:
    # What comes before is taken from `shared`; a parent run would be asked for steps of other seeds in vain.
    return {"run.dir": str(run_dir / name / f"seed-{seed}"), "run.seed": seed, "run.parent": None}


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def _problems(layers: Layers) -> list[Problem]:
    return [Problem(layers.source(key), dotted(key), text) for key, text in _faults(layers.values)]


def _faults(values: Mapping[str, Any]) -> Iterator[tuple[Key, str]]:
    """What the types cannot say of a study."""
    command, variants, seeds = values["command"], values["variants"], values["seeds"]
    if command not in STAGES:
        yield ("command",), f"there is no command '{command}' to compare variants of. Known: {', '.join(STAGES)}."
        return
    if len({*seeds}) < len(seeds):
        yield ("seeds",), "a seed stands twice, and would be counted twice. Name each once."
    for name, variant in variants.items():
        if not _NAME.fullmatch(name) or name == SHARED:
            text = (
                f"'{name}' cannot be the folder of a variant. Use small letters, digits, '.', '-', '_', not '{SHARED}'."
            )
            yield ("variants", name), text
        unknown = [model for model in variant.get("only", ()) if model not in STAGES[command].models]
        if unknown:
            known = ", ".join(STAGES[command].models) or "none, it is one step"
            text = f"'{unknown[0]}' is no model of '{command}', whose models are: {known}. Correct it."
            yield ("variants", name, "only"), text
    for index, table in enumerate(values.get("tables", ())):
        unknown = [name for name in table["variants"] if name not in variants]
        if unknown:
            text = f"there is no variant '{unknown[0]}'. The variants: {', '.join(variants)}. Correct the name."
            yield ("tables", index, "variants"), text
        if table.get("margins") and STAGES[command].section != "reward":
            text = f"'{command}' has no margins by rating; the command 'rm' has. Remove it."
            yield ("tables", index, "margins"), text


def run_study(plan: Plan, *, should_overwrite: bool = False) -> str:
    """Run what is not done yet, write `study.json` and `study.md`, and return the latter's text."""
    from pipelines.study_tables import write_tables

    if plan.shared.run.max_hours is not None:
        raise ConfigError(
            f"run.max_hours: {plan.shared.run.max_hours:g}, but a study compares trainings that came to their ends, and these"
            " hours would end whichever is at work. Remove run.max_hours; a killed study goes on where it was."
        )
    shared_steps = resolve_steps(plan.shared)
    before = plan.before()
    for step in before:
        run_step(plan.shared, shared_steps, step)
    figures: dict[str, dict[int, dict[str, float]]] = {}
    text = ""
    for number, ((name, seed), recipe) in enumerate(plan.variants.items(), start=1):
        log.info("study: %s with seed %d (%d of %d)", name, seed, number, len(plan.variants))
        for step in before:
            reference(step_folder(recipe, step), step_folder(plan.shared, step))
        variant = plan.study.variants[name]
        made = run_command(recipe, plan.study.command, only=variant.only, should_overwrite=should_overwrite)
        summaries = [StepFolder(artifact.path.parent).summary for artifact in made]
        figures.setdefault(name, {})[seed] = _read_figures(summaries)
        text = write_tables(plan, figures)
    return text


def _read_figures(summaries: Sequence[Path]) -> dict[str, float]:
    found: dict[str, float] = {}
    for path in summaries:
        values = json.loads(path.read_text(encoding="utf-8"))
        found |= {name: value for name, value in values.items() if isinstance(value, (int, float))}
    return found


def study_plan_text(plan: Plan) -> str:
    """What the study would run, with what it takes."""
    study = plan.study
    done = sum(
        all(is_published(step_folder(recipe, step)) for step in plan.steps(recipe, name))
        for (name, _), recipe in plan.variants.items()
    )
    lines = [
        f"Study of '{study.command}' in {plan.run_dir}: {len(study.variants)} variants with {len(study.seeds)} seeds each,"
        f" {len(plan.variants)} runs, {done} of them done"
    ]
    before = {step.name for step in plan.before()}
    planned = [step for step in make_plan(plan.shared) if step.name in before]
    if planned:
        lines.append(plan_text(plan.shared, planned))
    seconds = sum(step.estimate.seconds for step in planned if step.will_run and step.estimate)
    for name, variant in study.variants.items():
        recipe = plan.variants[name, study.seeds[0]]
        steps = make_plan(recipe, study.command, variant.only)
        one = sum(step.estimate.seconds for step in steps if step.estimate)
        seconds += one * len(study.seeds)
        changes = (
            ", ".join(f"{key}={json.dumps(value)}" for key, value in variant.values.items()) or "the recipe's values"
        )
        lines.append(f"  {name}: {', '.join(step.name for step in steps)} with {changes}; about {duration(one)} a seed")
    return "\n".join([*lines, f"  all together, from the beginning: about {duration(seconds)}"])
