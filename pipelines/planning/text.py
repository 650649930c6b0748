"""The plan as text: each step with its inputs and cost, a table of all steps, and the totals; and all presets."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from llamachat.config.gpus import Gpu, parse_gpu
from llamachat.errors import UsageError
from llamachat.memory.estimates import Estimate, assumed_speed
from llamachat.tables import duration, plural, text_table
from pipelines.execution.jobs import one_by_one
from pipelines.planning.estimates import card
from pipelines.planning.fit import Fit, fits, largest_microbatch, presets, way_to_fit, way_to_shorten
from pipelines.planning.plan import PlannedStep, sides_of_data
from pipelines.planning.side_by_side import side_by_side, wall_seconds
from pipelines.recipe.recipe import Recipe

SIZES = ("24GiB", "48GiB", "80GiB")
GIB = 2**30


def plan_text(recipe: Recipe, planned: Sequence[PlannedStep], *, hours: float | None = None) -> str:
    """The plan as text."""
    gpu = card(recipe)
    lines = [f"Plan of {recipe.run.dir}:"]
    for step in planned:
        lines.append(f"  {step.name}: {step.verdict}, {step.why}")
        if step.verdict != "waits":  # then the reason names them
            lines.append(f"    from {step.inputs}")
        if step.will_run:
            lines += [f"    {line}" for line in _cost(recipe, step.estimate, gpu)]
            lines += [f"    warning: {warning}" for warning in step.warnings]
    if any(step.estimate and step.estimate.seconds for step in planned if step.will_run):
        speeds = {assumed_speed(gpu, recipe.step(step.name).tuning.method): None for step in planned if step.will_run}
        lines.append(f"  times assume {' or '.join(speeds)}")
    lines += [f"  {line}" for line in sides_of_data(recipe)]
    if len(planned) > 1:
        lines += ["", *_table(recipe, planned, gpu)]
    running = Fit(gpu, {step.name: step.estimate for step in planned if step.will_run and step.estimate is not None})
    if running.steps and (len(planned) > 1 or hours is not None or not running.fits):
        lines += _verdict(recipe, running, hours)
    return "\n".join(lines)


def _cost(recipe: Recipe, estimate: Estimate | None, gpu: Gpu | None) -> Iterator[str]:
    """Steps and time, memory by part, and whether it fits."""
    if estimate is None:
        yield f"no estimate: the shape of '{recipe.base.model}' is unknown until its config.json is local"
        return
    steps = "" if estimate.optimizer_steps is None else f"about {plural(estimate.optimizer_steps, 'optimizer step')}, "
    if steps or estimate.assumed:
        yield f"{steps}{duration(estimate.seconds)} {estimate.assumed}".rstrip()
    else:
        yield "optimizer steps and hours: unknown before the download (a 'limit' on each hub set bounds them)"
    if not estimate.memory:
        return
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in estimate.memory.items() if size)
    of_each = " of each card" if gpu and gpu.count > 1 else ""
    fits = ""
    if gpu is not None:
        usable = f"{gpu.usable_bytes / GIB:.1f} of {gpu.gib:g} GiB"
        verdict = "fits" if estimate.peak_bytes <= gpu.usable_bytes else "does not fit"
        fits = f", {verdict} {gpu} (a step should need at most {usable})"
    yield f"memory, estimated: {estimate.peak_bytes / GIB:.2f} GiB at the peak{of_each}{fits}: {parts}"


def _table(recipe: Recipe, planned: Sequence[PlannedStep], gpu: Gpu | None) -> list[str]:
    """One line per step: what happens to it, its peak, optimizer steps, time, and the largest micro-batch on the
    card."""
    rows = [["step", "", "GiB", "steps", "time", *(("fits", "largest micro-batch") if gpu else ())]]
    for step in planned:
        cost = step.estimate or Estimate()
        peak = f"{cost.peak_bytes / GIB:.2f}" if cost.memory else ""
        count = time = largest = ""
        if step.will_run:
            count = "" if cost.optimizer_steps is None else str(cost.optimizer_steps)
            time = duration(cost.seconds) if cost.seconds else "not counted"
            largest = largest_microbatch(recipe, recipe.step(step.name), gpu) if gpu else ""
        does_fit = ("yes" if Fit(gpu, {step.name: cost}).fits else "NO") if peak else ""
        rows.append([step.name, step.verdict, peak, count, time, *((does_fit, largest) if gpu else ())])
    return text_table(rows, indent="  ")


def _verdict(recipe: Recipe, running: Fit, hours: float | None) -> Iterator[str]:
    """The totals: time and peak, whether the recipe fits, and what to lower if it does not."""
    gpu = running.gpu
    steps = [step for step in recipe.steps if step.name in running.steps]
    groups = one_by_one(steps) if gpu else side_by_side(recipe, steps)  # times of a step are those of all cards
    by_step = {name: estimate.seconds for name, estimate in running.steps.items()}
    total_seconds, seconds = sum(by_step.values()), wall_seconds(recipe, groups, by_step)
    uncounted = [name for name, estimate in running.steps.items() if not estimate.seconds]
    total = f"about {duration(total_seconds)}"
    if uncounted:
        total += f" without {', '.join(uncounted)}, unknown before the download"
    yield f"  all together: {total}; at most {running.peak_bytes / GIB:.2f} GiB ('{running.worst}')"
    for group in groups:
        if group.jobs > 1:
            names = ", ".join(step.name for step in group.steps)
            each = (
                f"each on its own card of {', '.join(group.cards)}"
                if group.cards
                else f"with {plural(group.threads or 1, 'thread')} each"
            )
            yield f"  side by side: {names}, {group.jobs} at once {each} (run.jobs={recipe.run.jobs})"
    if seconds < total_seconds:
        yield f"  so the whole run takes about {duration(seconds)}"
    if gpu is not None:
        usable = f"{gpu.usable_bytes / GIB:.1f} of {gpu.gib:g} GiB; the rest is left to CUDA itself"
        verdict, way = ("fits", "") if running.fits else ("DOES NOT FIT", f". {way_to_fit(recipe, gpu)}")
        yield f"  {verdict} {gpu}: at most {usable}{way}"
    if hours is not None and seconds <= 3600 * hours:
        yield f"  within {hours:g} h: {duration(3600 * hours - seconds)} to spare"
    elif hours is not None:
        yield f"  OVER {hours:g} h by {duration(seconds - 3600 * hours)}. Shorten all steps by the same factor, and plan again:"
        yield f"    {way_to_shorten(steps, seconds, hours)}"
        yield f"    or run.max_hours={hours:g}: a command then ends with its best checkpoint, and the same command resumes"


def presets_text(gpu: str | None = None) -> str:
    """Every preset on cards of three sizes, or on one card: its worst step and that step's memory."""
    try:
        cards = [parse_gpu(text) for text in ((gpu,) if gpu else SIZES)]
    except ValueError as error:
        raise UsageError(f"--gpu: {error}") from None
    rows = [["preset", "base", "card", *((gpu,) if gpu else SIZES), f"time on {'it' if gpu else 'its card'}"]]
    for path, recipe in presets():
        own = card(recipe)
        count = own.count if own else 1  # the number of cards that the preset is for
        cells = [_on(recipe, replace(one, count=one.count if one.count > 1 else count)) for one in cards]
        fit = fits(recipe, cards[0] if gpu else own)
        time = "not counted" if fit is None or fit.hours is None else duration(3600 * fit.hours)
        rows.append([path.stem, recipe.base.model.rpartition("/")[2], str(own or "CPU"), *cells, time])
    remark = (
        "GiB at the peak of the worst step; at most nine tenths of a card should be needed. Computed, not measured."
    )
    return "\n".join([*text_table(rows), remark])


def _on(recipe: Recipe, gpu: Gpu) -> str:
    """Whether the recipe fits the card or cards."""
    fit = fits(recipe, gpu)
    if fit is None:
        return "shape not known"
    cards = f"{gpu.count} x: " if gpu.count > 1 else ""
    return f"{cards}{'fits' if fit.fits else 'NO'} {fit.peak_bytes / GIB:.1f} ({fit.worst})"
