"""Whether a whole recipe fits a card and the hours: its worst step, the largest micro-batches, and what to set where not.

Torch-free, and answered in well under a second.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from llamachat.config.gpus import Gpu
from llamachat.errors import LlamachatError
from llamachat.memory.estimates import Estimate
from pipelines.planning.estimates import duration, estimate_step
from pipelines.recipe.recipe import Recipe, Step, load
from ppo import Config as PpoConfig
from reward import Config as RewardConfig
from sft import Config as SftConfig

PRESETS = Path(__file__).resolve().parents[2] / "configs"
_SMALL_RANK, _SHORT_TOKENS = 16, 512  # the least that is proposed
_LEAST_TOKENS = 64  # of a row: shorter ones are filled up to it
# What makes a step longer, in the order in which to lower it: of those that its section has, the first.
_LENGTHS = ("iterations", "epochs", "prompts", "test_prompts", "dialogs")
_MOST_OF_A_STEP = 0.8  # that one is asked to save alone

Setting = tuple[str, Any]  # such as ("ppo.critic", "shared")


class StepEstimate(NamedTuple):
    """A step's name and what it would cost."""

    name: str
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Fit:
    """What a whole recipe, run from its beginning, asks of a card, or of two CPU cores where that is None."""

    gpu: Gpu | None
    steps: tuple[StepEstimate, ...]  # in the recipe's order

    @property
    def worst(self) -> StepEstimate:
        """The step that needs most memory."""
        return max(self.steps, key=lambda step: step.estimate.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """Of the worst step, on one card."""
        return self.worst.estimate.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the worst step needs no more than a step should; on a CPU nothing is said against it."""
        return self.gpu is None or self.peak_bytes <= self.gpu.usable_bytes

    @property
    def hours(self) -> float | None:
        """Of all steps; None where one of them could not be counted (a set of the hub without a limit)."""
        seconds = [step.estimate.seconds for step in self.steps]
        return sum(seconds) / 3600 if all(seconds) else None


def fits(recipe: Recipe, gpu: Gpu | None) -> Fit | None:
    """The recipe on this card (None: on its own, or on a CPU), with its settings as they stand; None where the shape of its
    base is not known here."""
    steps = []
    for step in recipe.steps:
        estimate = estimate_step(recipe, step, gpu)
        if estimate is None:
            return None
        steps.append(StepEstimate(step.name, estimate))
    return Fit(gpu, tuple(steps))


@dataclass(frozen=True, slots=True)
class Microbatch:
    """The largest forward pass of a training that fits the card, as the setting that asks for it."""

    key: str  # such as ppo.tokens_per_microbatch
    value: int  # 0 where not even the least fits
    is_whole_step: bool = False  # more would not be used

    def __str__(self) -> str:
        if not self.value:
            return f"none: {self.key} at its least does not fit"
        return f"{self.key}={self.value}" + (" (all there is to use)" if self.is_whole_step else "")


def largest_microbatch(recipe: Recipe, step: Step, gpu: Gpu) -> Microbatch | None:
    """What a step that trains could be set to on this card; None where it has no such setting."""
    setting = _microbatch_setting(recipe, step)
    if setting is None:
        return None
    key, least, most, unit = setting
    section, _, name = key.partition(".")

    def has_room(value: int) -> bool:
        if section == "base":
            estimate = estimate_step(changed(recipe, [(key, value)]), step, gpu)
        else:
            estimate = estimate_step(recipe, replace(step, config=step.config.model_copy(update={name: value})), gpu)
        return estimate is not None and estimate.peak_bytes <= gpu.usable_bytes

    low, high = 0, max(1, most // unit)  # in units: the first fits or is 0, and what is above the second is never used
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if has_room(max(least, middle * unit)) else (low, middle - 1)
    value = max(least, low * unit) if low else 0
    return Microbatch(key, value, is_whole_step=value >= most)


def _microbatch_setting(recipe: Recipe, step: Step) -> tuple[str, int, int, int] | None:
    """The key, its least value, the most that a step would use, and the unit in between."""
    longest, config = recipe.base.max_tokens, step.config
    if isinstance(config, SftConfig) and config.packing:  # a packed forward pass is one row, as long as a dialog may be
        return "base.max_tokens", _LEAST_TOKENS, longest, _LEAST_TOKENS
    if isinstance(config, SftConfig):
        return "sft.rows_per_microbatch", 1, config.examples_per_step, 1
    if isinstance(config, RewardConfig):
        return "reward.row_tokens", 2 * longest, 2 * longest * config.pairs_per_step, 2 * longest
    if isinstance(config, PpoConfig):
        return "ppo.tokens_per_microbatch", longest, longest * config.responses_per_minibatch, longest
    return None


def settings_to_fit(recipe: Recipe, gpu: Gpu) -> list[Setting] | None:
    """The fewest settings with which the whole recipe fits the card; None where none do, or its shape is not known.

    Tried in the order of what they cost the result.
    """
    taken: list[Setting] = []
    settings = _less_and_less(recipe, gpu)
    while not _fits_with(recipe, gpu, taken):
        setting = next(settings, None)
        if setting is None:
            return None
        taken.append(setting)
    for setting in taken[:-1]:  # what turns out not to be needed
        without = [other for other in taken if other != setting]
        if _fits_with(recipe, gpu, without):
            taken = without
    return taken


def way_to_fit(recipe: Recipe, gpu: Gpu) -> str:
    """The settings with which the whole recipe fits the card, in words, or else the presets that do."""
    settings = settings_to_fit(recipe, gpu)
    if settings is None:
        others = [path.stem for path, other in presets() if (on := fits(other, gpu)) and on.fits and other.run.gpu]
        instead = f"these presets do: {', '.join(others)}" if others else "no preset does: take a larger card"
        return f"No setting makes this base fit {gpu}; {instead}."
    if not settings:
        return "It fits."
    peak = fits(changed(recipe, settings), gpu)
    assert peak is not None, "the shape is known"
    words = " ".join(f"{key}={str(value).lower()}" for key, value in settings)
    return f"It would fit with {words}: {peak.peak_bytes / 2**30:.1f} GiB."


def ways_to_shorten(steps: Sequence[Step], seconds: Mapping[str, float], hours: float) -> Iterator[str]:
    """Lines on what takes most of the time and what to set, so that all steps end within the hours."""
    total, limit = sum(seconds.values()), 3600 * hours
    over = total - limit
    by_name = {step.name: step for step in steps}
    for name in sorted(seconds, key=lambda name: -seconds[name])[:3]:
        # A step that is long enough can save all of it alone; else every step is to be shortened alike.
        is_enough = over <= _MOST_OF_A_STEP * seconds[name]
        share = 1 - over / seconds[name] if is_enough else limit / total
        step, ways = by_name[name], []
        shorter = _shortened(step, share)
        if shorter is not None:
            key, value = shorter
            ways.append(f"{step.stage.section}.{key}={value:g} (now {getattr(step.config, key):g})")
        if "max_hours" in type(step.config).model_fields:
            ways.append(f"{step.stage.section}.max_hours={seconds[name] * share / 3600:.1f}")
        if ways:
            alike = "" if is_enough else ", with the others shortened alike"
            yield f"{name}, {duration(seconds[name])}: {' or '.join(ways)}{alike}"
    yield f"or run.max_hours={hours:g}: a command ends at its best checkpoint then, and the same command continues"


def _shortened(step: Step, share: float) -> Setting | None:
    """The value of the step's section, and its key there, with which the step takes about this share of its time."""
    for key in _LENGTHS:
        value = getattr(step.config, key, None)
        if isinstance(value, int):
            return key, max(1, int(value * share))
        if isinstance(value, float):
            return key, float(f"{value * share:.2g}")
    return None


def _fits_with(recipe: Recipe, gpu: Gpu, settings: Sequence[Setting]) -> bool:
    fit = fits(changed(recipe, settings), gpu)
    return fit is not None and fit.fits


def _less_and_less(recipe: Recipe, gpu: Gpu) -> Iterator[Setting]:
    """Settings that save memory and are not taken yet: those that cost time, then those that cost the result."""
    commands = {step.stage.command for step in recipe.steps}
    sections = {"sft": "sft", "rm": "reward", "ppo": "ppo"}
    if commands & {"rs", "gatt", "distill"}:
        commands.add("sft")
    reward, ppo = (getattr(recipe.sections, sections[command]) for command in ("rm", "ppo"))
    for command, section in sections.items():
        if command in commands and not getattr(recipe.sections, section).gradient_checkpointing:
            yield f"{section}.gradient_checkpointing", True
    if "sft" in commands and recipe.tuning.method == "full" and gpu.count > 1 and recipe.sections.sft.sample_prompts:
        yield "sft.sample_prompts", 0  # they are sampled from weights gathered whole
    if "rm" in commands and reward.row_tokens == "auto":
        yield "reward.row_tokens", 2 * recipe.base.max_tokens
    if "ppo" in commands and ppo.tokens_per_microbatch != recipe.base.max_tokens:
        yield "ppo.tokens_per_microbatch", recipe.base.max_tokens
    if commands & {"rs", "gatt", "distill", "ppo", "eval"}:
        yield "rollout.cache_gib", 1.0
    if recipe.tuning.method == "full":
        yield "tuning.method", "lora"
    if recipe.tuning.method != "qlora" and recipe.base.dtype == "bfloat16":
        yield "tuning.method", "qlora"
    if "ppo" in commands and ppo.critic == "separate":
        yield "ppo.critic", "shared"
    if recipe.tuning.rank > _SMALL_RANK:
        yield "tuning.rank", _SMALL_RANK
    tokens = recipe.base.max_tokens // 2
    while tokens >= _SHORT_TOKENS:
        yield "base.max_tokens", tokens
        tokens //= 2


def changed(recipe: Recipe, settings: Sequence[Setting]) -> Recipe:
    """The recipe with other values; of two of one key the later one counts."""
    for key, value in settings:
        section, _, name = key.partition(".")
        values = getattr(recipe.sections, section).model_copy(update={name: value})
        recipe = recipe.changed(**{section: values})
    return recipe


def presets() -> Iterator[tuple[Path, Recipe]]:
    """The recipes that lie in `configs`, those that load here."""
    for path in sorted(PRESETS.glob("*.yaml")):
        with suppress(LlamachatError):
            yield path, load(path)
