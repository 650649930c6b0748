"""What would run, from which inputs, why, and what it would cost; reads no weights and imports neither torch nor trl."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llamachat.config.gpus import Gpu, parse_gpu
from llamachat.errors import ChangedError, LlamachatError
from llamachat.memory.estimates import Estimate, shape_of
from llamachat.runs.artifacts import is_published, read_artifact
from llamachat.runs.checkpoints import newest
from llamachat.runs.folder import StepFolder
from llamachat.runs.locks import living_owner
from llamachat.runs.state import StepState, step_state
from pipelines.execution.gate_labels import lacks_labels
from pipelines.execution.handing import stage_estimate
from pipelines.execution.resolve import earlier_makers, lacks_policy, step_folder
from pipelines.execution.run import Work, choose_steps, find_work, parent_folder
from pipelines.planning.measured import timed
from pipelines.recipe.recipe import Recipe, Step, resolve_steps

FEW_STEPS = 100
MUCH_WARMUP = 0.2
FULL_TUNING_RATES = {"sft": 2e-5, "rm": 1e-5, "ppo": 1e-6}  # Llama 2 sections 3.1, 3.2.2, 3.2.3, for all weights
BATCHES = ("examples_per_step", "pairs_per_step")


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of the plan: what would happen to it and why."""

    name: str
    verdict: str  # new, resume, done, reuse, renew, changed, running, waits, blocked
    why: str
    inputs: str
    estimate: Estimate | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def will_run(self) -> bool:
        return self.verdict in ("new", "resume", "renew", "waits")


def make_plan(recipe: Recipe, command: str = "all", only: Sequence[str] = ()) -> list[PlannedStep]:
    """The plan of the recipe's steps of one command, or of all; with `only` of these models."""
    steps = resolve_steps(recipe)
    chosen = choose_steps(steps, command, only)
    planned: list[PlannedStep] = []
    to_run: set[str] = set()
    reused: dict[str, StepFolder] = {}
    for step in steps:
        found = _plan_step(recipe, steps, step, to_run, reused)
        if found.will_run:
            to_run.add(step.name)
        if found.verdict == "reuse" and recipe.run.parent is not None:
            reused[step.name] = StepFolder(Path(recipe.run.parent) / step.name)
        if step in chosen:
            planned.append(found)
    return planned


def _plan_step(
    recipe: Recipe, steps: Sequence[Step], step: Step, to_run: set[str], reused: Mapping[str, StepFolder]
) -> PlannedStep:
    estimate = estimate_step(recipe, step)
    lacks = (lacks_policy(recipe, steps, step), lacks_labels(recipe, steps, step))
    warnings = (*(text for text in lacks if text), *warn(step, estimate, card(recipe)))
    nearest = {role: makers[0] for role, makers in earlier_makers(steps, step).items() if makers}
    awaited = {f"{role} of '{maker.name}'": maker.name for role, maker in nearest.items() if maker.name in to_run}
    for earlier in steps[: list(steps).index(step)]:
        if earlier.name in to_run and earlier.product.makes.kind in step.stage.surveys:
            awaited |= {f"{earlier.product.makes} of '{earlier.name}'": earlier.name}
    if awaited:
        why = f"runs after {' and '.join(repr(name) for name in dict.fromkeys(awaited.values()))}"
        inputs = ", ".join(awaited) + ", once it is there"
        if is_published(step_folder(recipe, step)) and not step.stage.surveys:
            why += "; its present result was made from another one and would then be refused as changed"
        return PlannedStep(step.name, "waits", why, inputs, estimate, warnings)
    try:
        work = find_work(recipe, steps, step, reused)
        verdict, why = _verdict(recipe, work)
    except LlamachatError as error:
        return PlannedStep(step.name, "blocked", str(error), "nothing that can be used", estimate, warnings)
    return PlannedStep(step.name, verdict, why, work.taken.words, estimate, warnings)


def _verdict(recipe: Recipe, work: Work) -> tuple[str, str]:
    folder = work.folder
    owner = living_owner(folder)
    if owner is not None:
        return "running", f"{owner} works on it"
    kept = parent_folder(recipe, work)
    if kept is not None and read_artifact(kept.artifact).manifest.fingerprint == work.fingerprint:
        return "reuse", f"unchanged in {kept.path}, taken from there by reference"
    try:
        state = step_state(folder, work.fingerprint, work.identity)
    except ChangedError as error:
        if work.step.stage.surveys:
            return "renew", "what it is about has changed since"
        return "changed", str(error)
    if state is StepState.DONE:
        return "done", f"unchanged since it was made ({folder.artifact})"
    if state is StepState.RESUME:
        checkpoint = newest(folder.checkpoints)
        return (
            "resume",
            f"from step {checkpoint.step}" if checkpoint else "begun, and stopped before its first checkpoint",
        )
    return "new", "changed since the parent run" if kept is not None else f"nothing in {folder.path} yet"


def card(recipe: Recipe) -> Gpu | None:
    """The card that the recipe is meant for."""
    return parse_gpu(recipe.run.gpu) if recipe.run.gpu else None


def estimate_step(recipe: Recipe, step: Step, gpu: Gpu | None = None) -> Estimate | None:
    """The stage's estimate, on this card in place of the recipe's; None where the shape of the base is not known here.

    On the recipe's own card seconds are those of a finished step of that name, where there is one to go by.
    """
    found = _estimated(recipe, step, gpu or card(recipe))
    return found if found is None or gpu else timed(recipe, step, found, lambda r, s: _estimated(r, s, card(r)))


def _estimated(recipe: Recipe, step: Step, gpu: Gpu | None) -> Estimate | None:
    try:
        shape = shape_of(recipe.base.model)
        return _bounded(step, stage_estimate(recipe, step, shape, gpu)) if shape else None
    except (KeyError, ValueError):
        return None  # another architecture, no JSON, or targets that are none: refused in words where it is loaded


def _bounded(step: Step, estimate: Estimate) -> Estimate:
    """No longer than the step's own hours, where they bound all of its work (they bound but the sampling of rs and its like)."""
    hours = step.config.model_dump().get("max_hours")
    if hours is None or step.stage.tunes or estimate.seconds <= 3600 * hours:
        return estimate
    return replace(
        estimate,
        seconds=3600 * hours,
        assumed=f"as {step.stage.section}.max_hours has it; else {duration(estimate.seconds)} {estimate.assumed}",
    )


def warn(step: Step, estimate: Estimate | None, gpu: Gpu | None = None) -> list[str]:
    """Settings that load but seldom do what is wanted."""
    warnings = []
    steps = estimate.optimizer_steps if estimate else None
    # A stage has those of these keys that mean it something.
    key, values, command = step.stage.section, step.config.model_dump(), step.stage.command
    if step.stage.tunes:  # with the section sft, and values of its own over it
        key, values, command = f"{key}.sft", {"examples_per_step": None, **values["sft"]}, "sft"
    if steps is not None and steps < FEW_STEPS:
        batch = next((f"{key}.{name}" for name in BATCHES if name in values), "the batch")
        warnings.append(
            f"only about {steps} optimizer steps, under {FEW_STEPS}: a model learns little from so few."
            f" Lower {batch}, or raise {key}.epochs."
        )
    warmup = values.get("warmup_fraction", 0.0)
    if warmup > MUCH_WARMUP:
        warnings.append(
            f"warm-up takes {warmup:.0%} of the steps, more than a fifth: the rate is seldom at its peak."
            f" Lower {key}.warmup_fraction."
        )
    rate = values.get("learning_rate")
    if step.tuning.method != "full" and rate is not None and rate <= FULL_TUNING_RATES[command]:
        warnings.append(
            f"{key}.learning_rate {rate:g} is that of full tuning, and tuning.method is {step.tuning.method}: adapters"
            " want about ten times as much."
        )
    if estimate and gpu and estimate.peak_bytes > gpu.usable_bytes:
        warnings.append(
            f"about {estimate.peak_bytes / 2**30:.1f} GiB do not fit {gpu}, of which a step should need at most"
            f" {gpu.usable_bytes / 2**30:.1f}. {smaller(step)}"
        )
    return warnings


def smaller(step: Step) -> str:
    """What would take less memory, in the order of what it costs the result."""
    ways, values, section = [], step.config.model_dump(), step.stage.section
    if values.get("gradient_checkpointing") is False:
        ways.append(f"set {section}.gradient_checkpointing: true")
    if not values.get("packing", True) and values.get("rows_per_microbatch", 1) > 1:
        ways.append(f"lower {section}.rows_per_microbatch")
    ways += [
        f"lower {section}.{key}"
        for key in ("row_tokens", "tokens_per_microbatch")
        if values.get(key) not in (None, "auto")
    ]
    if step.rollout.cache_gib != "auto" and "rollout" in step.stage.shared:
        ways.append("lower rollout.cache_gib")
    if values.get("optimizer") == "adamw" and step.tuning.method == "full":
        ways.append(f"set {section}.optimizer: paged_adamw_8bit")
    if values.get("critic") == "separate":
        ways.append(f"set {section}.critic: shared")
    less = {"full": "lora or qlora", "lora": "qlora"}.get(step.tuning.method)
    if less:
        ways.append(f"set tuning.method: {less}")
    if step.tuning.method != "full":
        ways.append("lower tuning.rank")
    text = ", ".join([*ways, "lower base.max_tokens", "or take a larger card"])
    return text[0].upper() + text[1:] + "."


def plan_text(recipe: Recipe, planned: Sequence[PlannedStep], *, hours: float | None = None) -> str:
    """The plan for people: each step with its inputs and cost, a table of them all, and what the whole comes to."""
    from pipelines.planning.text import table, verdict

    lines = [f"Plan of {recipe.run.dir}:"]
    for step in planned:
        lines += [f"  {step.name}: {step.verdict}, {step.why}", f"    from {step.inputs}"]
        if step.will_run:
            lines += [f"    {line}" for line in _cost(recipe, step.estimate)]
            lines += [f"    warning: {warning}" for warning in step.warnings]
    if len(planned) > 1:
        lines += ["", *table(recipe, planned, card(recipe))]
    if len(planned) > 1 or hours is not None:
        lines += verdict(recipe, planned, card(recipe), hours)
    return "\n".join(lines)


def _cost(recipe: Recipe, estimate: Estimate | None) -> list[str]:
    """Steps and time, memory by part, and whether it fits."""
    if estimate is None:
        return [f"no estimate: the shape of '{recipe.base.model}' is not known before its config.json is here"]
    gpu, peak = card(recipe), estimate.peak_bytes / 2**30
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in estimate.memory.items() if size)
    if not estimate.memory:
        return [_steps_and_time(estimate)]
    memory = f"memory, estimated: about {peak:.2f} GiB at the peak{' of each card' if gpu and gpu.count > 1 else ''}"
    lines = [_steps_and_time(estimate), f"{memory} ({parts})"]
    if gpu is not None:
        verdict = "fits" if estimate.peak_bytes <= gpu.usable_bytes else "does not fit"
        usable = f"{gpu.usable_bytes / 2**30:.1f} of {gpu.gib:g} GiB"
        lines.append(f"{verdict} {gpu}: {peak:.1f} GiB, and a step should need at most {usable}")
    return lines


def _steps_and_time(estimate: Estimate) -> str:
    if estimate.optimizer_steps is None and not estimate.assumed:
        return "optimizer steps and hours: not counted before download (a 'limit' on each hub set bounds them)"
    steps = "" if estimate.optimizer_steps is None else f"about {estimate.optimizer_steps} optimizer steps"
    return f"{steps}{', ' if steps else ''}{duration(estimate.seconds)} {estimate.assumed}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
