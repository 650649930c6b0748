"""The plan's last words: a table of all steps, the whole against the card and the hours that there are; and all presets."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llamachat.config.gpus import Gpu, parse_gpu
from llamachat.errors import UsageError
from llamachat.memory.estimates import Estimate
from pipelines.planning.fit import fits, largest_microbatch, presets, way_to_fit
from pipelines.recipe.recipe import Recipe, Step, resolve_steps

if TYPE_CHECKING:
    from pipelines.planning.plan import PlannedStep

SIZES = ("24GiB", "48GiB", "80GiB")
# What makes a step longer, in the order in which to lower it: of those that its section has, the first.
LENGTHS = ("iterations", "epochs", "prompts", "test_prompts", "dialogs")
MOST_OF_A_STEP = 0.8  # that one is asked to save alone
GIB = 2**30


def table(recipe: Recipe, planned: Sequence["PlannedStep"], gpu: Gpu | None) -> list[str]:
    """A line a step: what happens to it, its peak, the largest micro-batch on the card, optimizer steps, time."""
    from pipelines.planning.plan import duration

    steps = {step.name: step for step in resolve_steps(recipe)}
    rows: list[tuple[str, ...]] = [
        ("step", "", "GiB", *(("fits",) if gpu else ()), "steps", "time", *(("largest micro-batch",) if gpu else ()))
    ]
    for found in planned:
        cost = found.estimate or Estimate()
        peak = f"{cost.peak_bytes / GIB:.2f}" if cost.memory else ""
        count = time = largest = ""
        if found.will_run:
            count = "" if cost.optimizer_steps is None else str(cost.optimizer_steps)
            time = duration(cost.seconds) if cost.seconds else "not counted"
            largest = str((gpu and largest_microbatch(recipe, steps[found.name], gpu)) or "")
        if gpu is None:
            rows.append((found.name, found.verdict, peak, count, time))
        else:
            does_fit = ("yes" if cost.peak_bytes <= gpu.usable_bytes else "NO") if peak else ""
            rows.append((found.name, found.verdict, peak, does_fit, count, time, largest))
    return [f"  {line}" for line in _columns(rows)]


def verdict(recipe: Recipe, planned: Sequence["PlannedStep"], gpu: Gpu | None, hours: float | None) -> list[str]:
    """What the whole comes to: time and peak, whether it fits, and what to lower where there are not hours enough."""
    from pipelines.planning.plan import duration

    running = [step for step in planned if step.will_run and step.estimate is not None]
    if not running:
        return []
    seconds = {step.name: step.estimate.seconds for step in running if step.estimate}
    uncounted = [name for name, of_it in seconds.items() if not of_it]
    total = f"about {duration(sum(seconds.values()))}"
    if uncounted:
        total += f" without {', '.join(uncounted)}, which cannot be counted before download"
    worst = max(running, key=lambda step: step.estimate.peak_bytes if step.estimate else 0)
    peak = worst.estimate.peak_bytes if worst.estimate else 0
    lines = [f"  all together: {total}; at most {peak / GIB:.2f} GiB ('{worst.name}')"]
    if gpu is not None:
        usable = f"{gpu.usable_bytes / GIB:.1f} of {gpu.gib:g} GiB, the rest being for CUDA and its allocator"
        if peak <= gpu.usable_bytes:
            lines.append(f"  fits {gpu}: at most {usable}")
        else:
            lines.append(f"  DOES NOT FIT {gpu}: at most {usable}. {way_to_fit(recipe, gpu)}")
    if hours is not None:
        lines += _against(recipe, planned, seconds, hours)
    return lines


def _against(
    recipe: Recipe, planned: Sequence["PlannedStep"], seconds: dict[str, float], hours: float
) -> Iterator[str]:
    from pipelines.planning.plan import duration

    total, limit = sum(seconds.values()), 3600 * hours
    if total <= limit:
        yield f"  within {hours:g} h: {duration(limit - total)} to spare"
        return
    over = total - limit
    yield f"  OVER {hours:g} h by {duration(over)}. What takes most, and what to set:"
    steps = {step.name: step for step in resolve_steps(recipe)}
    for name in sorted(seconds, key=lambda name: -seconds[name])[:3]:
        # A step that is long enough can save all of it alone; else every step is to be shortened alike.
        is_enough = over <= MOST_OF_A_STEP * seconds[name]
        share = 1 - over / seconds[name] if is_enough else limit / total
        ways = " or ".join(_ways(steps[name], seconds[name], share))
        if ways:
            yield f"    {name}, {duration(seconds[name])}: {ways}{'' if is_enough else ', with the others shortened alike'}"
    yield f"    or run.max_hours={hours:g}: a command ends at its best checkpoint then, and the same command goes on"


def _ways(step: Step, seconds: float, share: float) -> Iterator[str]:
    """Settings with which a step takes that share of its time."""
    section, values = step.stage.section, step.config.model_dump()
    name = next((name for name in LENGTHS if isinstance(values.get(name), int | float)), None)
    if name is not None:
        less = values[name] * share
        told = f"{max(1, int(less))}" if isinstance(values[name], int) else f"{less:.2g}"
        yield f"{section}.{name}={told} (now {values[name]:g})"
    if "max_hours" in values:
        yield f"{section}.max_hours={seconds * share / 3600:.1f}"


def presets_text(gpu: str | None = None) -> str:
    """Every preset on cards of three sizes, or on one: its worst step and the bytes of that."""
    from pipelines.planning.limits import preset_limits
    from pipelines.planning.plan import card, duration

    if gpu is not None:
        try:
            parse_gpu(gpu)
        except ValueError as error:
            raise UsageError(f"--gpu: {error}") from None
    sizes = (gpu,) if gpu else SIZES
    rows: list[tuple[str, ...]] = [("preset", "base", "card", *sizes, f"time on {'it' if gpu else 'its card'}")]
    for path, recipe in presets():
        own = card(recipe)
        cells = [_on(recipe, size, own.count if own else 1) for size in sizes]
        timed = fits(recipe, parse_gpu(gpu) if gpu else own)
        time = "not counted" if timed is None or timed.hours is None else duration(3600 * timed.hours)
        rows.append((path.stem, recipe.base.model.rpartition("/")[2], str(own or "CPU"), *cells, time))
    told = "GiB at the peak of the worst step; at most nine tenths of a card should be needed. Computed, not measured."
    limits = (
        "Tokens a second at most, by the card's data sheet: of 64 answers decoded at once, of sft, of one reward model."
    )
    return "\n".join([*_columns(rows), told, "", *_columns(list(preset_limits())), limits])


def _on(recipe: Recipe, size: str, count: int) -> str:
    """Whether the recipe fits so many cards of the size, or the cards that are named."""
    gpu = parse_gpu(size)
    if gpu.count == 1 and count > 1:
        gpu = Gpu(gpu.name, gpu.gib, gpu.tflops, count)
    found = fits(recipe, gpu)
    if found is None:
        return "shape not known"
    many = f"{gpu.count} x: " if gpu.count > 1 else ""
    return f"{many}{'fits' if found.fits else 'NO'} {found.peak_bytes / GIB:.1f} ({found.worst.name})"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
