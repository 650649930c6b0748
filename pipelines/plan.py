"""What would run, from which inputs, why, and what it would cost; reads no weights and imports neither torch nor trl."""

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamachat.config.sections import DataSource
from llamachat.errors import ChangedError, LlamachatError
from llamachat.models.estimates import Estimate, read_shape
from llamachat.runs.artifacts import is_published, read_artifact
from llamachat.runs.checkpoints import newest
from llamachat.runs.folder import StepFolder
from llamachat.runs.locks import living_owner
from llamachat.runs.state import StepState, step_state
from pipelines.recipe import Recipe, Step, resolve_steps
from pipelines.resolve import earlier_policies, step_folder
from pipelines.running import Work, find_work, parent_folder
from sft import Config as SftConfig
from sft.estimate import Workload

FEW_STEPS = 100
MUCH_WARMUP = 0.2
FULL_TUNING_RATE = 2e-5  # Llama 2 section 3.1, for all weights
BYTES_PER_TOKEN = 4.0  # of JSON lines of English dialogs; ours, rough


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of the plan: what would happen to it and why."""

    name: str
    verdict: str  # new, resume, done, reuse, changed, running, waits, blocked
    why: str
    inputs: str
    estimate: Estimate | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def will_run(self) -> bool:
        return self.verdict in ("new", "resume", "waits")


@dataclass(frozen=True, slots=True)
class DataSize:
    """Records in local files of JSON lines, weights counted, and what one holds."""

    records: float
    bytes_per_record: float


def make_plan(recipe: Recipe, command: str = "all") -> list[PlannedStep]:
    """The plan of the recipe's steps of one command, or of all."""
    steps = resolve_steps(recipe)
    planned: list[PlannedStep] = []
    to_run: set[str] = set()
    reused: dict[str, StepFolder] = {}
    for step in steps:
        found = _plan_step(recipe, steps, step, to_run, reused)
        if found.will_run:
            to_run.add(step.name)
        if found.verdict == "reuse" and recipe.run.parent is not None:
            reused[step.name] = StepFolder(Path(recipe.run.parent) / step.name)
        if command in ("all", step.stage.command):
            planned.append(found)
    return planned


def _plan_step(
    recipe: Recipe, steps: Sequence[Step], step: Step, to_run: set[str], reused: Mapping[str, StepFolder]
) -> PlannedStep:
    estimate = estimate_step(recipe, step)
    warnings = tuple(warn(step, estimate))
    nearest = next(iter(earlier_policies(steps, step)), None)
    if nearest is not None and nearest.name in to_run:
        why, inputs = f"runs after '{nearest.name}'", f"policy of '{nearest.name}', once it is there"
        if is_published(step_folder(recipe, step)):
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


def estimate_step(recipe: Recipe, step: Step) -> Estimate | None:
    """The stage's estimate; None where the shape of the base is not known here (a model of the hub)."""
    try:
        shape = read_shape(Path(recipe.base.model))
    except (KeyError, ValueError):
        return None  # another architecture, or no JSON: refused in words where it is loaded
    if shape is None:
        return None
    assert isinstance(step.config, SftConfig), "each stage has an estimate of its own kind"
    size = measure_data(recipe.data.sft)
    kept = 1.0 - recipe.data.split.test - recipe.data.split.validation - recipe.data.split.judge
    workload = Workload(
        shape=shape,
        base=recipe.base,
        tuning=step.tuning,
        dialogs=round(size.records * kept) if size else None,
        tokens_per_dialog=min(size.bytes_per_record / BYTES_PER_TOKEN, recipe.base.max_tokens) if size else 200.0,
    )
    return step.stage.package.estimate(step.config, workload)


def warn(step: Step, estimate: Estimate | None) -> list[str]:
    """Settings that load but seldom do what is wanted."""
    warnings = []
    steps = estimate.optimizer_steps if estimate else None
    assert isinstance(step.config, SftConfig), "each stage has values of its own kind"
    key = step.stage.section
    if steps is not None and steps < FEW_STEPS:
        warnings.append(
            f"only about {steps} optimizer steps, under {FEW_STEPS}: a model learns little from so few."
            f" Lower {key}.examples_per_step, or raise {key}.epochs."
        )
    if step.config.warmup_fraction > MUCH_WARMUP:
        warnings.append(
            f"warm-up takes {step.config.warmup_fraction:.0%} of the steps, more than a fifth: the rate is seldom at its"
            f" peak. Lower {key}.warmup_fraction."
        )
    if step.tuning.method != "full" and step.config.learning_rate <= FULL_TUNING_RATE:
        warnings.append(
            f"{key}.learning_rate {step.config.learning_rate:g} is that of full tuning, and tuning.method is"
            f" {step.tuning.method}: adapters want about ten times as much."
        )
    return warnings


def measure_data(sources: Sequence[DataSource]) -> DataSize | None:
    """Size of the sources; None as soon as one is not a local file of JSON lines."""
    records = weighted_bytes = 0.0
    for source in sources:
        path = Path(source.path)
        if not path.is_file() or not path.name.endswith((".jsonl", ".jsonl.gz")):
            return None
        lines = num_bytes = 0
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for line in stream:
                if source.limit is not None and lines >= source.limit:
                    break
                lines, num_bytes = lines + 1, num_bytes + len(line)
        records += lines * source.weight
        weighted_bytes += num_bytes * source.weight
    return DataSize(records, weighted_bytes / records) if records else None


def plan_text(recipe: Recipe, planned: Sequence[PlannedStep]) -> str:
    """The plan for people."""
    lines = [f"Plan of {recipe.run.dir}:"]
    for step in planned:
        lines += [f"  {step.name}: {step.verdict}, {step.why}", f"    from {step.inputs}"]
        if step.will_run and step.estimate is not None:
            lines.append(f"    {_cost(step.estimate)}")
        if step.will_run:
            lines += [f"    warning: {warning}" for warning in step.warnings]
    running = [step.estimate for step in planned if step.will_run and step.estimate is not None]
    if len(running) > 1:
        total = Estimate(seconds=sum(estimate.seconds for estimate in running))
        lines.append(f"  all together: about {duration(total.seconds)}")
    return "\n".join(lines)


def _cost(estimate: Estimate) -> str:
    parts = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in estimate.memory.items() if size)
    memory = f"about {sum(estimate.memory.values()) / 2**30:.2f} GiB at the peak ({parts})"
    if estimate.optimizer_steps is None:
        return f"optimizer steps not known before the data are read; {memory}"
    return f"about {estimate.optimizer_steps} optimizer steps, {duration(estimate.seconds)}; {memory}"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
