"""What the variants of a study share: told from the recipes alone, before anything is run.

A step's mark is a digest of its identity in which each input is the mark of the step that makes it. Two recipes whose
steps have one mark would make the same thing, so it is made once.
"""

from collections.abc import Mapping, Sequence

from llamachat.runs.fingerprints import fingerprint
from pipelines.execution.resolve import earlier_makers
from pipelines.recipe.identity import step_identity
from pipelines.recipe.recipe import Recipe, Step, resolve_steps

SHARED = "shared"
Origins = Mapping[tuple[str, str], str]  # variant and step's name -> SHARED, or the variant in which it is run


def marks(recipe: Recipe, steps: Sequence[Step]) -> dict[str, str]:
    """The mark of each step, by its name."""
    found: dict[str, str] = {}
    for step in steps:
        inputs = {role.key: found[makers[0].name] for role, makers in earlier_makers(steps, step).items() if makers}
        earlier = steps[: list(steps).index(step)]
        pooled = [one.name for one in earlier if step.stage.pools and one.stage is step.stage]
        values = step_identity(recipe, step, {})
        values["inputs"] = inputs | {f"dialogs/{name}": found[name] for name in pooled}
        found[step.name] = fingerprint(values)
    return found


def first_changed(shared: Recipe, homes: Mapping[str, Recipe]) -> int:
    """The place of the first step that some variant would make otherwise than the recipe; 0 where none would."""
    rows = [list(marks(recipe, resolve_steps(recipe)).items()) for recipe in (shared, *homes.values())]
    shortest = min(map(len, rows))
    places = [place for place in range(shortest) if len({row[place] for row in rows}) > 1]
    if places:
        return places[0]
    # Variants that only leave out last steps: the last one that all have is what can be compared.
    return shortest - 1 if len({len(row) for row in rows}) > 1 else 0


def origins(shared: Recipe, homes: Mapping[str, Recipe], before: Mapping[str, Sequence[Step]]) -> Origins:
    """Where each variant's steps before its commands are run: once for all that have one mark."""
    known = dict.fromkeys(marks(shared, resolve_steps(shared)).items(), SHARED)
    found: dict[tuple[str, str], str] = {}
    for variant, recipe in homes.items():
        for name, mark in marks(recipe, before[variant]).items():
            found[variant, name] = known.setdefault((name, mark), variant)
    return found
