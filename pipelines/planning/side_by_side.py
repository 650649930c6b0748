"""How many processes share a step's work on a CPU, and how many independent steps run in parallel, on which threads or
cards."""

import os
from collections.abc import Mapping, Sequence

from llamachat import distributed
from llamachat.memory.estimates import shape_of
from pipelines.execution.jobs import Group, independent_steps, one_by_one
from pipelines.planning.estimates import estimate_step
from pipelines.planning.hardware import installed_bytes, usable_cores, visible_cards
from pipelines.recipe.recipe import Recipe, Step
from pipelines.recipe.stages import REPORT

MEMORY_SHARE = 0.75  # of the machine's memory that parallel steps may use
# A model of this width or less runs as fast with one thread as with two (the bundled model, measured). For a wider one
# we assume that two parallel steps with half of the threads each take as long as two steps in sequence.
SMALL_HIDDEN_SIZE = 256
MOST_PROCESSES = 4  # a batch of a small model has too few rows for more


def processes(recipe: Recipe, groups: Sequence[Group]) -> int:
    """The number of CPU processes that should share the work of each step that runs alone; 1 with a card.

    Kernels of a small model gain little from a second thread, but a second process halves the rows of each process.
    """
    alone = [step for group in groups if group.jobs == 1 for step in group.steps if step.product.makes != REPORT]
    if not alone or distributed.are_launched() or distributed.has_launcher() or visible_cards():
        return 1
    if recipe.run.processes != "auto":
        return recipe.run.processes
    most = min(usable_cores(), MOST_PROCESSES)
    if most == 1 or os.environ.get("OMP_NUM_THREADS") or any(step.rollout.server for step in alone):
        return 1
    if is_small(recipe):
        return most
    estimates = [estimate_step(recipe, step) for step in alone]
    need = max((one.peak_bytes if one else installed_bytes() for one in estimates), default=0)
    return max(1, min(most, int(MEMORY_SHARE * installed_bytes() / max(need, 1))))


def is_small(recipe: Recipe) -> bool:
    """Whether the base is so narrow that its kernels run as fast on one thread as on two."""
    shape = shape_of(recipe.base.model)
    return shape is not None and shape.hidden_size <= SMALL_HIDDEN_SIZE


def side_by_side(recipe: Recipe, chosen: Sequence[Step]) -> list[Group]:
    """The chosen steps in the groups in which they run: one by one in the recipe's order, or independent ones in
    parallel."""
    if recipe.run.jobs == 1 or distributed.has_launcher():
        return one_by_one(chosen)
    groups = [_group(recipe, steps) for steps in independent_steps(chosen)]
    return groups if any(group.jobs > 1 for group in groups) else one_by_one(chosen)


def _group(recipe: Recipe, steps: Sequence[Step]) -> Group:
    if len(steps) == 1:
        return Group(tuple(steps))
    cards, cores, threads = visible_cards(), usable_cores(), _requested_threads()
    if recipe.run.jobs != "auto":
        jobs = min(recipe.run.jobs, len(steps))
    elif any(step.rollout.server for step in steps if "rollout" in step.stage.shared):
        jobs = 1  # the server holds the weights of one policy only
    elif cards:
        jobs = min(len(cards), len(steps))
    else:
        # Three steps on two cores end sooner in parallel than two and then one.
        most = cores // threads if threads else 2 * cores if cores > 1 else 1
        jobs = _most_in_memory(recipe, steps, min(len(steps), max(1, most)))
    if jobs == 1:
        return Group(tuple(steps))
    threads = threads or max(1, cores // jobs)
    if cards or jobs * threads <= cores:
        return Group(tuple(steps), jobs, threads, tuple(cards))
    return Group(tuple(steps), jobs, threads, at_once=max(1, cores // threads), seconds=_seconds(recipe, steps))


def _seconds(recipe: Recipe, steps: Sequence[Step]) -> tuple[float, ...]:
    """The planned duration of each step; empty if one of them cannot be estimated."""
    estimates = [estimate_step(recipe, step) for step in steps]
    seconds = tuple(one.seconds for one in estimates if one and one.seconds)
    return seconds if len(seconds) == len(steps) else ()


def _requested_threads() -> int | None:
    """The number of threads that the user has set; None if unset, or set by a command that divides its work."""
    text = os.environ.get("OMP_NUM_THREADS", "")
    return int(text) if text.isdecimal() and distributed.OWN_LAUNCH not in os.environ else None


def _most_in_memory(recipe: Recipe, steps: Sequence[Step], most: int) -> int:
    """How many of the steps, at most `most`, fit into the machine's memory at once by the plan."""
    estimates = [estimate_step(recipe, step) for step in steps]
    needs = sorted((one.peak_bytes if one else installed_bytes() for one in estimates), reverse=True)
    room = MEMORY_SHARE * installed_bytes()
    return next((jobs for jobs in range(most, 1, -1) if sum(needs[:jobs]) <= room), 1)


def wall_seconds(recipe: Recipe, groups: Sequence[Group], seconds: Mapping[str, float]) -> float:
    """How long the groups take, given the seconds of each step when it runs alone."""
    has_small_base = is_small(recipe)
    total = 0.0
    for group in groups:
        # Each step is assigned to the process that is free first.
        busy = [0.0] * group.jobs
        for step in group.steps:
            share = 1 if group.cards or has_small_base else group.jobs
            busy[busy.index(min(busy))] += share * seconds.get(step.name, 0.0)
        # More steps than cores wait for one another; with a wide base they share the cores already.
        shared = sum(busy) / usable_cores() if has_small_base and not group.cards else 0.0
        total += max(*busy, shared)
    return total
