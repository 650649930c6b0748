"""The plan in words: each step with its inputs and cost, a table of them all, what the whole comes to; and all presets."""

from collections.abc import Iterable, Iterator, Sequence

from llamachat.config.gpus import Gpu, parse_gpu
from llamachat.errors import UsageError
from llamachat.memory.estimates import Estimate
from llamachat.tables import text_table
from pipelines.planning.estimates import card, duration
from pipelines.planning.fit import fits, largest_microbatch, presets, way_to_fit, ways_to_shorten
from pipelines.planning.plan import PlannedStep
from pipelines.recipe.recipe import Recipe

SIZES = ("24GiB", "48GiB", "80GiB")
GIB = 2**30


def plan_text(recipe: Recipe, planned: Sequence[PlannedStep], *, hours: float | None = None) -> str:
    """The plan for people."""
    gpu = card(recipe)
    lines = [f"Plan of {recipe.run.dir}:"]
    for step in planned:
        lines += [f"  {step.name}: {step.verdict}, {step.why}", f"    from {step.inputs}"]
        if step.will_run:
            lines += [f"    {line}" for line in _cost(recipe, step.estimate, gpu)]
            lines += [f"    warning: {warning}" for warning in step.warnings]
    if len(planned) > 1:
        lines += ["", *_table(recipe, planned, gpu)]
    running = {step.name: step.estimate for step in planned if step.will_run and step.estimate is not None}
    if running and (len(planned) > 1 or hours is not None or not _fit(running.values(), gpu)):
        lines += _verdict(recipe, running, gpu, hours)
    return "\n".join(lines)


def _fit(estimates: Iterable[Estimate], gpu: Gpu | None) -> bool:
    return gpu is None or all(estimate.peak_bytes <= gpu.usable_bytes for estimate in estimates)


def _cost(recipe: Recipe, estimate: Estimate | None, gpu: Gpu | None) -> list[str]:
    """Steps and time, memory by part, and whether it fits."""
    if estimate is None:
        return [f"no estimate: the shape of '{recipe.base.model}' is not known before its config.json is here"]
    peak = estimate.peak_bytes / GIB
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in estimate.memory.items() if size)
    if not estimate.memory:
        return [_steps_and_time(estimate)]
    of_each = " of each card" if gpu and gpu.count > 1 else ""
    lines = [
        _steps_and_time(estimate),
        f"memory, estimated: about {peak:.2f} GiB at the peak{of_each} ({parts})",
    ]
    if gpu is not None:
        verdict = "fits" if _fit([estimate], gpu) else "does not fit"
        usable = f"{gpu.usable_bytes / GIB:.1f} of {gpu.gib:g} GiB"
        lines.append(f"{verdict} {gpu}: {peak:.1f} GiB, and a step should need at most {usable}")
    return lines


def _steps_and_time(estimate: Estimate) -> str:
    if estimate.optimizer_steps is None and not estimate.assumed:
        return "optimizer steps and hours: not counted before download (a 'limit' on each hub set bounds them)"
    steps = "" if estimate.optimizer_steps is None else f"about {estimate.optimizer_steps} optimizer steps, "
    return f"{steps}{duration(estimate.seconds)} {estimate.assumed}"


def _table(recipe: Recipe, planned: Sequence[PlannedStep], gpu: Gpu | None) -> list[str]:
    """A line a step: what happens to it, its peak, optimizer steps, time, the largest micro-batch on the card."""
    steps = {step.name: step for step in recipe.steps}
    rows = [["step", "", "GiB", "steps", "time", *(("fits", "largest micro-batch") if gpu else ())]]
    for step in planned:
        cost = step.estimate or Estimate()
        peak = f"{cost.peak_bytes / GIB:.2f}" if cost.memory else ""
        count = time = largest = ""
        if step.will_run:
            count = "" if cost.optimizer_steps is None else str(cost.optimizer_steps)
            time = duration(cost.seconds) if cost.seconds else "not counted"
            largest = str((gpu and largest_microbatch(recipe, steps[step.name], gpu)) or "")
        does_fit = ("yes" if _fit([cost], gpu) else "NO") if peak else ""
        rows.append([step.name, step.verdict, peak, count, time, *((does_fit, largest) if gpu else ())])
    return text_table(rows, indent="  ")


def _verdict(recipe: Recipe, running: dict[str, Estimate], gpu: Gpu | None, hours: float | None) -> Iterator[str]:
    """What the whole comes to: time and peak, whether it fits, and what to lower where it does not."""
    seconds = {name: estimate.seconds for name, estimate in running.items()}
    uncounted = [name for name, of_it in seconds.items() if not of_it]
    total = f"about {duration(sum(seconds.values()))}"
    if uncounted:
        total += f" without {', '.join(uncounted)}, which cannot be counted before download"
    worst = max(running, key=lambda name: running[name].peak_bytes)
    peak = running[worst].peak_bytes
    yield f"  all together: {total}; at most {peak / GIB:.2f} GiB ('{worst}')"
    if gpu is not None:
        usable = f"{gpu.usable_bytes / GIB:.1f} of {gpu.gib:g} GiB, the rest being for CUDA and its allocator"
        if peak <= gpu.usable_bytes:
            yield f"  fits {gpu}: at most {usable}"
        else:
            yield f"  DOES NOT FIT {gpu}: at most {usable}. {way_to_fit(recipe, gpu)}"
    if hours is not None:
        spare = 3600 * hours - sum(seconds.values())
        if spare >= 0:
            yield f"  within {hours:g} h: {duration(spare)} to spare"
            return
        yield f"  OVER {hours:g} h by {duration(-spare)}. What takes most, and what to set:"
        yield from (f"    {line}" for line in ways_to_shorten(recipe.steps, seconds, hours))


def presets_text(gpu: str | None = None) -> str:
    """Every preset on cards of three sizes, or on one: its worst step and the bytes of that."""
    if gpu is not None:
        try:
            parse_gpu(gpu)
        except ValueError as error:
            raise UsageError(f"--gpu: {error}") from None
    sizes = (gpu,) if gpu else SIZES
    rows = [["preset", "base", "card", *sizes, f"time on {'it' if gpu else 'its card'}"]]
    for path, recipe in presets():
        own = card(recipe)
        cells = [_on(recipe, size, own.count if own else 1) for size in sizes]
        fit = fits(recipe, parse_gpu(gpu) if gpu else own)
        time = "not counted" if fit is None or fit.hours is None else duration(3600 * fit.hours)
        rows.append([path.stem, recipe.base.model.rpartition("/")[2], str(own or "CPU"), *cells, time])
    remark = (
        "GiB at the peak of the worst step; at most nine tenths of a card should be needed. Computed, not measured."
    )
    return "\n".join([*text_table(rows), remark])


def _on(recipe: Recipe, size: str, count: int) -> str:
    """Whether the recipe fits this many cards of the size, or the cards that are named."""
    gpu = parse_gpu(size)
    if gpu.count == 1 and count > 1:
        gpu = Gpu(gpu.name, gpu.gib, gpu.tflops, count)
    fit = fits(recipe, gpu)
    if fit is None:
        return "shape not known"
    cards = f"{gpu.count} x: " if gpu.count > 1 else ""
    return f"{cards}{'fits' if fit.fits else 'NO'} {fit.peak_bytes / GIB:.1f} ({fit.worst.name})"
