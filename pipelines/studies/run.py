"""Runs a study: everything that is not done yet, with its tables after every run; and describes the plan of a study.

If it is killed, the same call resumes it.
"""

import json
import logging
from collections.abc import Iterable, Sequence

from llamachat.errors import ConfigError, UsageError
from llamachat.runs.artifacts import Artifact, StepFolder, is_published
from llamachat.runs.reader import step_of
from llamachat.runs.state import reference
from llamachat.tables import duration, plural
from pipelines.execution.run import run_chosen, run_step
from pipelines.planning.estimates import estimate_step
from pipelines.planning.plan import make_plan
from pipelines.planning.text import plan_text
from pipelines.recipe.recipe import Recipe, Step
from pipelines.studies.definition import SHARED, Plan
from pipelines.studies.pictures import draw_study
from pipelines.studies.tables import tables_of, write_tables

log = logging.getLogger(__name__)


def run_study(plan: Plan, *, should_overwrite: bool = False) -> str:
    """Run what is not done yet, write `study.json`, `study.md` and `study.png`, and return the text."""
    hours = next(iter(plan.variants.values())).run.max_hours
    if hours is not None:
        raise ConfigError(
            f"run.max_hours: {hours:g}, but a study compares trainings that ran to their end, and this budget"
            " would end one early. Remove run.max_hours; a killed study resumes where it stopped."
        )
    origins = plan.origins()
    done: set[tuple[str, str]] = set()  # steps before the commands: where, and the step's name
    figures: dict[str, dict[int, dict[str, float]]] = {}
    text = ""
    for number, ((name, seed), recipe) in enumerate(plan.variants.items(), start=1):
        log.info("study: %s with seed %d (%d of %d)", name, seed, number, len(plan.variants))
        for step in plan.before(name):
            where = origins[name, step.name]
            if (where, step.name) not in done:
                origin = plan.origin(where)
                run_step(origin, origin.step(step.name))
                done.add((where, step.name))
            home = plan.homes[name].folder(step)
            if where != name:
                _take(home, plan.origin(where).folder(step))
            _take(recipe.folder(step), home)
        steps = plan.steps(recipe, name)
        artifacts = run_chosen(recipe, steps, should_overwrite=should_overwrite).artifacts
        figures.setdefault(name, {})[seed] = read_figures(steps, artifacts)
        tables = tables_of(plan.study, figures)
        text = write_tables(plan, tables, figures, is_drawn=draw_study(plan, tables, figures))
    return text


def _take(folder: StepFolder, source: StepFolder) -> None:
    """Put a finished step into a run by reference, unless the run would lose work of its own."""
    if folder.identity.exists() and not folder.path.is_symlink():
        raise UsageError(
            f"{folder.path} contains its own work, but the study now takes this step from {source.path}. Its"
            " variants or its command were changed after it had run. Choose another folder with run.dir=NEW, or remove"
            " this folder if it is not needed."
        )
    reference(folder, source)


def read_figures(steps: Sequence[Step], artifacts: Sequence[Artifact]) -> dict[str, float]:
    """The figures of a run: of a name that several steps have, the last one's, and all of them as STEP:NAME."""
    by_step = {step.name: step_of(artifact).summary for step, artifact in zip(steps, artifacts, strict=True)}
    figures = {name: value for summary in by_step.values() for name, value in summary.items()}
    for name in list(figures):
        having = [step for step, summary in by_step.items() if name in summary]
        if len(having) > 1:
            figures |= {f"{step}:{name}": by_step[step][name] for step in having}
    return figures


def study_plan_text(plan: Plan) -> str:
    """The steps before the commands, the runs of each variant, and the hours, in total and remaining."""
    study, origins = plan.study, plan.origins()
    runs = [(recipe, plan.steps(recipe, name)) for (name, _), recipe in plan.variants.items()]
    done = sum(all(is_published(recipe.folder(step)) for step in steps) for recipe, steps in runs)
    lines = [
        f"Study of '{plan.commands}' in {plan.run_dir}: {plural(len(study.variants), 'variant')} with {plural(len(study.seeds), 'seed')} each,"
        f" {plural(len(plan.variants), 'run')}, {done} of them done"
    ]
    for_all = {step for (_, step), where in origins.items() if where == SHARED}
    planned = [step for step in make_plan(plan.shared) if step.name in for_all]
    if planned:
        lines.append(plan_text(plan.shared, planned))
    whole = sum(step.estimate.seconds for step in planned if step.estimate)
    left = sum(step.estimate.seconds for step in planned if step.will_run and step.estimate)
    for name, variant in study.variants.items():
        own = [step for step in plan.before(name) if origins[name, step.name] == name]
        home = plan.homes[name]
        first = f"once {_words(home, own)}, then " if own else ""
        other_variants = {origins[name, step.name] for step in plan.before(name)} - {SHARED, name}
        beside = f", from steps of {' and '.join(sorted(other_variants))}" if other_variants else ""
        seeds = [plan.variants[name, seed] for seed in study.seeds]
        changes = (
            ", ".join(f"{key}={json.dumps(value)}" for key, value in variant.values.items()) or "the recipe's values"
        )
        steps = plan.steps(seeds[0], name)
        lines.append(f"  {name}: {first}{_words(seeds[0], steps)} per seed{beside}, with {changes}")
        whole += _seconds(home, own) + sum(_seconds(recipe, steps) for recipe in seeds)
        left += _seconds(home, _to_run(home, own)) + sum(_seconds(one, _to_run(one, steps)) for one in seeds)
    return "\n".join([*lines, f"  all together: about {duration(whole)} in total, {duration(left)} left"])


def _words(recipe: Recipe, steps: Iterable[Step]) -> str:
    steps = list(steps)
    return f"{', '.join(step.name for step in steps)} (about {duration(_seconds(recipe, steps))})"


def _seconds(recipe: Recipe, steps: Iterable[Step]) -> float:
    return sum(estimate.seconds for step in steps if (estimate := estimate_step(recipe, step)))


def _to_run(recipe: Recipe, steps: Iterable[Step]) -> list[Step]:
    return [step for step in steps if not is_published(recipe.folder(step))]
