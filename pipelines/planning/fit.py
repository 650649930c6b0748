"""Whether a whole recipe fits a card and the hours: its worst step, the largest micro-batches, and settings that would
fit.

Needs no torch and takes well under a second.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo import Config as DpoConfig
from llamachat.config.gpus import Gpu
from llamachat.errors import LlamachatError
from llamachat.memory.estimates import Estimate
from pipelines.planning.estimates import estimate_step
from pipelines.recipe.recipe import Recipe, Step, load
from ppo import Config as PpoConfig
from ppo.config import critic_kind
from reward import Config as RewardConfig
from sft import Config as SftConfig

PRESETS = Path(__file__).resolve().parents[2] / "configs"
_SMALL_RANK, _SHORT_TOKENS = 16, 512  # the lowest values that are proposed
_LEAST_TOKENS = 64  # per row: shorter rows are filled up to it
# What makes a step longer, in the order in which to lower it: the first of these keys that its section has.
_LENGTHS = ("iterations", "epochs", "prompts", "test_prompts", "dialogs")
_MARGIN = 0.9  # for the fixed costs of a step

Setting = tuple[str, Any]  # such as ("ppo.critic", "shared")


@dataclass(frozen=True, slots=True)
class Fit:
    """What the steps need of a card, or of two CPU cores if it is None."""

    gpu: Gpu | None
    steps: Mapping[str, Estimate]  # by name, in the recipe's order

    @property
    def worst(self) -> str:
        """The step that needs the most memory."""
        return max(self.steps, key=lambda name: self.steps[name].peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the worst step, on one card."""
        return self.steps[self.worst].peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the worst step stays within the usable memory; on a CPU everything fits."""
        return self.gpu is None or self.peak_bytes <= self.gpu.usable_bytes

    @property
    def hours(self) -> float | None:
        """Hours of all steps; None if one of them is unknown (a hub set without a limit)."""
        seconds = [estimate.seconds for estimate in self.steps.values()]
        return sum(seconds) / 3600 if all(seconds) else None


def fits(recipe: Recipe, gpu: Gpu | None) -> Fit | None:
    """The whole recipe on this card (None: its own card, or a CPU) with its current settings; None if the shape of
    its base is not known."""
    estimates = {step.name: estimate_step(recipe, step, gpu) for step in recipe.steps}
    known = {name: estimate for name, estimate in estimates.items() if estimate is not None}
    return Fit(gpu, known) if len(known) == len(estimates) else None


def largest_microbatch(recipe: Recipe, step: Step, gpu: Gpu) -> str:
    """The setting of a training step with the largest forward pass that fits this card; empty if it has no such
    setting."""
    longest, config = recipe.base.max_tokens, step.config
    if (
        isinstance(config, SftConfig) and config.packing
    ):  # a packed forward pass is one row, as long as the longest dialog
        key, least, most = "base.max_tokens", _LEAST_TOKENS, longest
    elif isinstance(config, SftConfig):
        key, least, most = "sft.rows_per_microbatch", 1, config.examples_per_step
    elif isinstance(config, RewardConfig):
        key, least, most = "reward.row_tokens", 2 * longest, 2 * longest * config.pairs_per_step
    elif isinstance(config, DpoConfig):
        key, least, most = "dpo.row_tokens", 2 * longest, 2 * longest * config.pairs_per_step
    elif isinstance(config, PpoConfig):
        key, least, most = "ppo.tokens_per_microbatch", longest, longest * config.responses_per_minibatch
    else:
        return ""
    section, _, name = key.partition(".")

    def has_room(times: int) -> bool:
        value = times * least
        if section == "base":
            estimate = estimate_step(changed(recipe, [(key, value)]), step, gpu)
        else:
            estimate = estimate_step(recipe, replace(step, config=step.config.model_copy(update={name: value})), gpu)
        return estimate is not None and estimate.peak_bytes <= gpu.usable_bytes

    low, high = 0, max(1, most // least)  # in units of the lowest value: above the upper bound nothing changes
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if has_room(middle) else (low, middle - 1)
    if not low:
        return f"none: the lowest {key} does not fit"
    return f"{key}={low * least}" + (" (the maximum)" if low * least >= most else "")


def settings_to_fit(recipe: Recipe, gpu: Gpu) -> list[Setting] | None:
    """The fewest settings with which the whole recipe fits the card; None if none do, or its shape is unknown.

    Settings are tried in the order of how much they cost the result.
    """
    applied: list[Setting] = []
    settings = _less_and_less(recipe, gpu)
    while not _fits_with(recipe, gpu, applied):
        setting = next(settings, None)
        if setting is None:
            return None
        applied.append(setting)
    for setting in applied[:-1]:  # drop settings that turn out to be unnecessary
        without = [other for other in applied if other != setting]
        if _fits_with(recipe, gpu, without):
            applied = without
    return applied


def way_to_fit(recipe: Recipe, gpu: Gpu) -> str:
    """A sentence with the settings with which the whole recipe fits the card, or else the presets that fit."""
    settings = settings_to_fit(recipe, gpu)
    if settings is None:
        others = [path.stem for path, other in presets() if (on := fits(other, gpu)) and on.fits and other.run.gpu]
        instead = f"these presets do: {', '.join(others)}" if others else "no preset does: use a larger card"
        return f"No setting makes this base fit {gpu}; {instead}."
    if not settings:
        return "It fits."
    peak = fits(changed(recipe, settings), gpu)
    assert peak is not None, "the shape is known"
    words = " ".join(f"{key}={str(value).lower()}" for key, value in settings)
    return f"It would fit with {words}: {peak.peak_bytes / 2**30:.1f} GiB."


def way_to_shorten(steps: Sequence[Step], seconds: float, hours: float) -> str:
    """Settings that shorten the steps, all by the same factor, from this many seconds to about the hours."""
    share = _MARGIN * 3600 * hours / seconds
    settings: dict[str, str] = {}
    for step in steps:
        name = next((name for name in _LENGTHS if isinstance(getattr(step.config, name, None), (int, float))), None)
        if name is not None:
            value = getattr(step.config, name)
            shorter = max(1, int(value * share)) if isinstance(value, int) else float(f"{value * share:.2g}")
            settings[f"{step.stage.section}.{name}"] = f"{shorter:g}"
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _fits_with(recipe: Recipe, gpu: Gpu, settings: Sequence[Setting]) -> bool:
    fit = fits(changed(recipe, settings), gpu)
    return fit is not None and fit.fits


def _less_and_less(recipe: Recipe, gpu: Gpu) -> Iterator[Setting]:
    """Settings that save memory and are not used yet: first those that cost time, then those that cost the result."""
    commands = {step.stage.command for step in recipe.steps}
    sections = {"sft": "sft", "rm": "reward", "dpo": "dpo", "ppo": "ppo"}
    if commands & {"rs", "gatt", "distill"}:
        commands.add("sft")
    reward, ppo = (getattr(recipe.sections, sections[command]) for command in ("rm", "ppo"))
    for command, section in sections.items():
        if command in commands and not getattr(recipe.sections, section).gradient_checkpointing:
            yield f"{section}.gradient_checkpointing", True
    if "sft" in commands and recipe.tuning.method == "full" and gpu.count > 1 and recipe.sections.sft.sample_prompts:
        yield "sft.sample_prompts", 0  # they are sampled from the gathered weights
    if "rm" in commands and reward.row_tokens == "auto":
        yield "reward.row_tokens", 2 * recipe.base.max_tokens
    if "dpo" in commands and recipe.sections.dpo.row_tokens == "auto":
        yield "dpo.row_tokens", 2 * recipe.base.max_tokens
    if "ppo" in commands and ppo.tokens_per_microbatch != recipe.base.max_tokens:
        yield "ppo.tokens_per_microbatch", recipe.base.max_tokens
    if commands & {"rs", "gatt", "distill", "ppo", "eval"}:
        yield "rollout.cache_gib", 1.0
    if recipe.tuning.method == "full":
        yield "tuning.method", "lora"
    if recipe.tuning.method != "qlora" and recipe.base.dtype == "bfloat16":
        yield "tuning.method", "qlora"
    if "ppo" in commands and critic_kind(ppo) == "separate":
        yield "ppo.critic", "shared"
    if recipe.tuning.rank > _SMALL_RANK:
        yield "tuning.rank", _SMALL_RANK
    tokens = recipe.base.max_tokens // 2
    while tokens >= _SHORT_TOKENS:
        yield "base.max_tokens", tokens
        tokens //= 2


def changed(recipe: Recipe, settings: Sequence[Setting]) -> Recipe:
    """The recipe with these settings; a later setting of a key overrides an earlier one."""
    for key, value in settings:
        section, _, name = key.partition(".")
        values = getattr(recipe.sections, section).model_copy(update={name: value})
        recipe = recipe.changed(**{section: values})
    return recipe


def presets() -> Iterator[tuple[Path, Recipe]]:
    """The recipes in `configs` that can be loaded here."""
    for path in sorted(PRESETS.glob("*.yaml")):
        with suppress(LlamachatError):
            yield path, load(path)
