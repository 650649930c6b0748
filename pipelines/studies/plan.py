"""What a study would run, where, and how long it takes; runs nothing."""

import json
from collections.abc import Iterable

from llamachat.runs.artifacts import is_published
from pipelines.execution.resolve import step_folder
from pipelines.planning.estimates import duration, estimate_step
from pipelines.planning.plan import make_plan
from pipelines.planning.text import plan_text
from pipelines.recipe.recipe import Recipe, Step
from pipelines.studies.sharing import SHARED
from pipelines.studies.study import Plan


def study_plan_text(plan: Plan) -> str:
    """What comes before the commands, what each variant runs, and the hours, from the beginning and from now on."""
    study, found_at = plan.study, plan.origins()
    runs = [(recipe, plan.steps(recipe, name)) for (name, _), recipe in plan.variants.items()]
    done = sum(all(is_published(step_folder(recipe, step)) for step in steps) for recipe, steps in runs)
    lines = [
        f"Study of '{plan.commands}' in {plan.run_dir}: {len(study.variants)} variants with {len(study.seeds)} seeds each,"
        f" {len(plan.variants)} runs, {done} of them done"
    ]
    for_all = {step for (_, step), where in found_at.items() if where == SHARED}
    planned = [step for step in make_plan(plan.shared) if step.name in for_all]
    if planned:
        lines.append(plan_text(plan.shared, planned))
    whole = sum(step.estimate.seconds for step in planned if step.estimate)
    left = sum(step.estimate.seconds for step in planned if step.will_run and step.estimate)
    for name, variant in study.variants.items():
        own = [step for step in plan.before(name) if found_at[name, step.name] == name]
        home = plan.homes[name]
        first = f"once {_words(home, own)}, then " if own else ""
        taken = {found_at[name, step.name] for step in plan.before(name)} - {SHARED, name}
        beside = f", from steps of {' and '.join(sorted(taken))}" if taken else ""
        seeds = [plan.variants[name, seed] for seed in study.seeds]
        changes = (
            ", ".join(f"{key}={json.dumps(value)}" for key, value in variant.values.items()) or "the recipe's values"
        )
        steps = plan.steps(seeds[0], name)
        lines.append(f"  {name}: {first}{_words(seeds[0], steps)} a seed{beside}, with {changes}")
        whole += _seconds(home, own) + sum(_seconds(recipe, steps) for recipe in seeds)
        left += _seconds(home, _to_run(home, own)) + sum(_seconds(one, _to_run(one, steps)) for one in seeds)
    return "\n".join(
        [*lines, f"  all together: about {duration(whole)} from the beginning, {duration(left)} of it to do"]
    )


def _words(recipe: Recipe, steps: Iterable[Step]) -> str:
    steps = list(steps)
    return f"{', '.join(step.name for step in steps)} (about {duration(_seconds(recipe, steps))})"


def _seconds(recipe: Recipe, steps: Iterable[Step]) -> float:
    return sum(found.seconds for step in steps if (found := estimate_step(recipe, step)))


def _to_run(recipe: Recipe, steps: Iterable[Step]) -> list[Step]:
    return [step for step in steps if not is_published(step_folder(recipe, step))]
