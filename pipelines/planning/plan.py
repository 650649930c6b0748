"""The plan: what would run, from which inputs, why, and at what cost. Reads no weights and imports neither torch nor
trl."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llamachat.chat_format.dialog import Dialog
from llamachat.config.section import from_home
from llamachat.config.sections import DataSource, Split
from llamachat.data.loading import SplitName, read_records, side_sizes, sides_of, user_turns
from llamachat.data.records import Preference, Prompt
from llamachat.errors import ChangedError, LlamachatError, first_line
from llamachat.memory.estimates import Estimate
from llamachat.runs.artifacts import Manifest, StepFolder, is_published, read_artifact
from llamachat.runs.checkpoints import newest
from llamachat.runs.code import digest_of_code
from llamachat.runs.fingerprints import digest_of_file
from llamachat.runs.locks import living_owner
from llamachat.runs.state import StepState, step_state
from llamachat.runs.user_cache import cached
from llamachat.tables import plural
from pipelines.execution.run import Work, find_work, lacks_labels, lacks_policy, other_code, parent_folder
from pipelines.planning.estimates import estimate_step
from pipelines.recipe.recipe import Recipe, Step, choose_steps

FEW_STEPS = 100
MUCH_WARMUP = 0.2
# For full tuning: Llama 2 sections 3.1, 3.2.2, 3.2.3; for dpo Rafailov et al. 2023, appendix B.
FULL_TUNING_RATES = {"sft": 2e-5, "rm": 1e-5, "ppo": 1e-6, "dpo": 1e-6}
LARGEST_READ = 64 << 20  # bytes of a data file up to which a plan reads it to count its splits
RECORDS_OF: dict[str, type[Dialog] | type[Preference] | type[Prompt]] = {
    **dict.fromkeys(("sft", "labels"), Dialog),
    **dict.fromkeys(("helpfulness", "safety", "open"), Preference),
    **dict.fromkeys(("prompts", "adversarial"), Prompt),
}
BATCHES = ("examples_per_step", "pairs_per_step")


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of the plan: what would happen to it, and why."""

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
    """The plan of the recipe's steps of one command, or of all; `only` restricts it to these models."""
    chosen = choose_steps(recipe.steps, command, only)
    planned: list[PlannedStep] = []
    to_run: set[str] = set()
    reused: dict[str, StepFolder] = {}
    for step in recipe.steps:
        planned_step = _plan_step(recipe, step, to_run, reused)
        if planned_step.will_run:
            to_run.add(step.name)
        if planned_step.verdict == "reuse" and recipe.run.parent is not None:
            reused[step.name] = StepFolder(Path(recipe.run.parent) / step.name)
        if step in chosen:
            planned.append(planned_step)
    return planned


def sides_of_data(recipe: Recipe) -> Iterator[str]:
    """The size of each split of each kind of local data; warnings about uneven splits and faulty sources."""
    data = recipe.sections.data
    record: Any  # one class of records after the other
    for key, record in RECORDS_OF.items():
        counts: Counter[SplitName] = Counter()
        warnings: list[str] = []
        for source in getattr(data, key):
            path = Path(from_home(source.path))
            if not path.is_file() or path.stat().st_size > LARGEST_READ:
                continue
            try:
                sizes, warning = _sides_of_source(source, record, data.split)
            except LlamachatError as error:
                warnings.append(f"{first_line(error)} The steps that read it will refuse it.")
                continue
            counts.update(sizes)
            warnings += [f"{source.path}: data.split: {warning}"] if warning else []
        if counts or warnings:
            yield f"data.{key}: {side_sizes(counts) or 'no record that can be read'}"
            yield from (f"  warning: {warning}" for warning in warnings)


def _sides_of_source(source: DataSource, record: Any, split: Split) -> tuple[dict[SplitName, int], str | None]:
    """The size of each split of a file, and a warning; cached until the file or the code that reads it changes."""

    def count() -> list[Any]:
        spread = sides_of([user_turns(one) for one in read_records(source, record)], split)
        return [Counter(spread.sides), spread.warning(split)]

    follows_from = {
        "file": digest_of_file(Path(from_home(source.path))),
        "source": source.model_dump(mode="json", exclude={"weight"}),
        "record": record.__name__,
        "split": split.model_dump(mode="json"),
        "code": digest_of_code("llamachat/data", "llamachat/chat_format"),
    }
    sizes, warning = cached("sides", follows_from, count)
    return sizes, warning


def _plan_step(recipe: Recipe, step: Step, to_run: set[str], reused: Mapping[str, StepFolder]) -> PlannedStep:
    estimate = estimate_step(recipe, step)
    lacks = (lacks_policy(recipe, step), lacks_labels(recipe, step))
    warnings = (*(text for text in lacks if text), *warn(step, estimate))
    nearest = {role: makers[0] for role, makers in recipe.makers(step).items() if makers}
    awaited = {f"{role} of '{maker.name}'": maker.name for role, maker in nearest.items() if maker.name in to_run}
    for earlier in recipe.before(step):
        if earlier.name in to_run and earlier.product.makes.kind in step.stage.surveys:
            awaited |= {f"{earlier.product.makes} of '{earlier.name}'": earlier.name}
    if awaited:
        inputs = ", ".join(awaited)
        why = f"needs {inputs}"
        if is_published(recipe.folder(step)) and not step.stage.surveys:
            why += "; its current result was made from another one and would then be refused as changed"
        return PlannedStep(step.name, "waits", why, inputs, estimate, warnings)
    try:
        work = find_work(recipe, step, reused)
        verdict, why = _verdict(recipe, work)
    except LlamachatError as error:
        return PlannedStep(step.name, "blocked", str(error), "nothing usable", estimate, warnings)
    return PlannedStep(step.name, verdict, why, work.taken.words, estimate, warnings)


def _verdict(recipe: Recipe, work: Work) -> tuple[str, str]:
    folder = work.folder
    owner = living_owner(folder)
    if owner is not None:
        return "running", f"{owner} is working on it"
    parent = parent_folder(recipe, work)
    if parent is not None and (manifest := read_artifact(parent.artifact).manifest).fingerprint == work.fingerprint:
        return "reuse", f"unchanged in {parent.path}, taken from there by reference{_stale(work, manifest)}"
    try:
        state = step_state(folder, work.fingerprint, work.identity)
    except ChangedError as error:
        if work.step.stage.surveys:
            return "renew", "the steps that it reads have changed"
        return "changed", str(error)
    if state is StepState.DONE:
        stale = _stale(work, read_artifact(folder.artifact).manifest)
        return "done", f"unchanged since it was made ({folder.artifact}){stale}"
    if state is StepState.RESUME:
        checkpoint = newest(folder.checkpoints)
        return (
            "resume",
            f"from step {checkpoint.step}" if checkpoint else "started, and stopped before its first checkpoint",
        )
    return "new", "changed since the parent run" if parent is not None else f"nothing in {folder.path} yet"


def _stale(work: Work, manifest: Manifest) -> str:
    """A warning on its own line if a finished step was made by other code."""
    warning = other_code(work, manifest.code)
    return f"\n    warning: {warning}" if warning else ""


def warn(step: Step, estimate: Estimate | None) -> list[str]:
    """Warnings about settings that are valid but seldom intended; whether the step fits a card is reported for the
    whole recipe."""
    warnings = []
    steps = estimate.optimizer_steps if estimate else None
    # Each stage has the keys of these that it uses.
    key, values, command = step.stage.section, step.config.model_dump(), step.stage.command
    if step.stage.tunes:  # with the section sft, and its own overrides
        key, values, command = f"{key}.sft", {"examples_per_step": None, **values["sft"]}, "sft"
    if steps is not None and steps < FEW_STEPS:
        batch = next((f"{key}.{name}" for name in BATCHES if name in values), "the batch")
        warnings.append(
            f"only about {plural(steps, 'optimizer step')}, fewer than {FEW_STEPS}: a model learns little in so few steps."
            f" Lower {batch}, or raise {key}.epochs."
        )
    warmup = values.get("warmup_fraction", 0.0)
    if warmup > MUCH_WARMUP:
        warnings.append(
            f"warm-up takes {warmup:.0%} of the steps, more than a fifth: the learning rate is seldom at its peak."
            f" Lower {key}.warmup_fraction."
        )
    rate = values.get("learning_rate")
    if step.tuning.method != "full" and rate is not None and rate <= FULL_TUNING_RATES[command]:
        warnings.append(
            f"{key}.learning_rate {rate:g} suits full tuning, but tuning.method is {step.tuning.method}: adapters"
            " need about ten times as much."
        )
    return warnings
