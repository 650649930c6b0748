"""How `init` brings a recipe onto a card and into the hours: the plan's own estimates, asked until they allow it.

First the memory: the method that costs the result least and fits. Then the time: the full work of the presets, then less of
what is sampled, then one pass over the data, then no Ghost Attention. What still does not fit is refused, with the way out.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llamachat.chat_format.llama2 import SPECIAL_TAGS
from llamachat.chat_format.tokenizer import Tokenizer, load_tokenizer
from llamachat.config.gpus import CARDS, Gpu, parse_gpu
from llamachat.config.loading import from_plain
from llamachat.config.paths import ModelPath, is_hub_name
from llamachat.errors import ConfigError, TokenizerError, UsageError
from llamachat.memory.estimates import KNOWN_BASES, Estimate, shape_of
from llamachat.models.hub import UNGATED, require_llama, tokenizer_folder
from pipelines.planning import hardware as devices
from pipelines.planning.estimates import duration, estimate_step
from pipelines.planning.init_choices import LONG_ENOUGH, UNKNOWN_CONTEXT, Asked, Effort, Method, Values
from pipelines.planning.init_data import CountTokens, look_at
from pipelines.planning.init_sizes import plain, values
from pipelines.recipe.recipe import Recipe, RecipeSections, resolve

SHARE_FOR_STEPS = 0.85  # of the hours; the rest is for what no estimate counts: loading, saving, figures. Ours
HALVINGS = 7  # of the range in which the effort is looked for
PPO_GUARD = 4 / 3  # of the hours that the plan gives PPO
CHARACTERS = 3.5  # a token, of English text with 32,000 pieces; ours, rough
COUNTED = 2000  # texts that the base's own tokenizer counts; what comes after is taken to be like them
RANK, LEAST_RANK = 64, 16
HOURS_WITHOUT_A_CARD = (
    200  # more than a week of two CPU cores is taken to be meant for a card, unless --hours asks for it
)


@dataclass(frozen=True, slots=True)
class Made:
    """The recipe that was chosen and what it would cost."""

    asked: Asked
    method: Method
    effort: Effort
    sections: Values
    estimates: tuple[tuple[str, Estimate], ...]  # by step
    card: Gpu | None

    @property
    def worst(self) -> tuple[str, Estimate]:
        """The step that needs most memory."""
        return max(self.estimates, key=lambda step: step[1].peak_bytes)

    @property
    def seconds(self) -> float:
        return sum(estimate.seconds for _, estimate in self.estimates)


def make(
    base: str, given: Mapping[str, Sequence[Path]], *, card: Gpu | None, gpu: str, hours: float | None, run_dir: str
) -> Made:
    """The recipe for what was given; UsageError where no recipe fits the card or ends within the hours."""
    folder = _folder(base)
    shape = shape_of(str(folder or base))
    if shape is None:
        raise UsageError(
            f"--base: the config.json of '{base}' tells no sizes. What fits a card follows from them. Give the folder of a "
            "Llama model with its config.json."
        )
    found = look_at(given, SPECIAL_TAGS, _counter(folder))
    asked = Asked(base, shape, _context(folder), found, gpu, hours, run_dir)
    maker = _Maker(asked, card, str(folder or base))
    return maker.within_hours(maker.method())


class _Maker:
    """Asks the plan what a choice would cost, and chooses again."""

    def __init__(self, asked: Asked, card: Gpu | None, place: str) -> None:
        self.asked, self.card, self.place = asked, card, place

    def method(self) -> Method:
        """The first way to train, in the order of what it costs the result, that the card or the machine holds."""
        smallest: Made | None = None
        room = self.card.usable_bytes if self.card else devices.installed_bytes()
        for method in methods(self.asked):
            smallest = self._made(method, Effort())
            if smallest.worst[1].peak_bytes <= room:
                return method
        assert smallest is not None, "there is a way to train"
        if self.card is None:
            name, estimate = smallest.worst
            peak, held = (f"{size / 2**30:.1f}" for size in (estimate.peak_bytes, room))
            found = f"'{name}' needs about {peak} GiB by estimate, and this machine has {held}"
            raise UsageError(_without_a_card(smallest, found, self._least_card()))
        raise UsageError(_too_small(smallest, _card_that_holds(smallest)))

    def within_hours(self, method: Method) -> Made:
        """As much of the full work as the hours allow."""
        if self.asked.hours is None:
            made = self._made(method, Effort())
            if self.card is None and made.seconds > HOURS_WITHOUT_A_CARD * 3600:
                found = f"two CPU cores take about {duration(made.seconds)} by estimate"
                raise UsageError(_without_a_card(made, found, self._least_card(), "give fewer records or --hours, or"))
            return made
        most = self.asked.hours * 3600 * SHARE_FOR_STEPS
        least: Made | None = None
        for effort in (Effort(), Effort(again=False), Effort(again=False, gatt=False)):
            full, least = self._made(method, effort), self._made(method, replace(effort, share=0.0))
            if full.seconds <= most:
                return self._guarded(full)
            if least.seconds <= most:
                return self._guarded(self._largest(method, effort, most))
        assert least is not None
        needed = math.ceil(least.seconds / SHARE_FOR_STEPS / 36) / 100
        raise UsageError(
            f"--hours: {self.asked.hours:g} are too few: the least of which the steps learn something takes about"
            f" {duration(least.seconds)} by estimate ({times(least)}). Give --hours {needed:g} or more, a faster card with"
            " --gpu, or fewer records."
        )

    def _largest(self, method: Method, effort: Effort, most: float) -> Made:
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            is_allowed = self._made(method, replace(effort, share=middle)).seconds <= most
            low, high = (middle, high) if is_allowed else (low, middle)
        return self._made(method, replace(effort, share=low))

    def _guarded(self, made: Made) -> Made:
        """With a limit to PPO's hours, which are the least certain: a third more than planned, if the other steps leave it."""
        ppo = sum(estimate.seconds for name, estimate in made.estimates if name == "ppo")
        if not ppo or self.asked.hours is None:
            return made
        left = self.asked.hours * 3600 - (made.seconds - ppo)
        guard = float(f"{min(PPO_GUARD * ppo, left) / 3600:.2g}")
        return self._made(made.method, replace(made.effort, ppo_hours=guard))

    def _made(self, method: Method, effort: Effort) -> Made:
        sections = values(self.asked, method, effort)
        recipe = self._recipe(sections)
        estimates = []
        for step in recipe.steps:
            estimate = estimate_step(recipe, step, self.card)
            assert estimate is not None, "the shape of the base is known"
            estimates.append((step.name, estimate))
        return Made(self.asked, method, effort, sections, tuple(estimates), self.card)

    def _recipe(self, sections: Values) -> Recipe:
        """As it will be loaded, but for a base of the hub, whose config.json lies in a folder."""
        told = plain(sections)
        return resolve(from_plain(RecipeSections, {**told, "base": {**told["base"], "model": self.place}}))

    def _least_card(self) -> str:
        """The smallest known card for what was asked of none."""
        asked, card = replace(self.asked, gpu="24GiB"), parse_gpu("24GiB")  # memory does not hang on which it is
        *_, last = methods(asked)
        return _card_that_holds(_Maker(asked, card, self.place)._made(last, Effort()))


def methods(asked: Asked) -> Iterator[Method]:
    """The ways to train, in the order of what they cost the result."""
    lengths = [tokens for tokens in LONG_ENOUGH if tokens <= asked.context] or [asked.context]
    wanted = asked.found.sizes.holding(0.99)
    longest = next((tokens for tokens in lengths if tokens >= wanted), lengths[-1])
    if asked.is_tiny:
        yield Method("full", checkpointing=False, rank=RANK, max_tokens=longest)
        return
    names = ("lora", "qlora") if asked.gpu else ("lora",)
    for name in names:
        for checkpointing in (False, True):
            yield Method(name, checkpointing=checkpointing, rank=RANK, max_tokens=longest)
    for tokens in reversed([tokens for tokens in lengths if tokens < longest]):
        yield Method(names[-1], checkpointing=True, rank=RANK, max_tokens=tokens)
    yield Method(names[-1], checkpointing=True, rank=LEAST_RANK, max_tokens=lengths[0])


def times(made: Made) -> str:
    """What each step would take, in words."""
    return ", ".join(f"{name} {duration(estimate.seconds)}" for name, estimate in made.estimates)


def _card_that_holds(made: Made) -> str:
    """The smallest known card that holds this way to train."""
    held = (name for name in CARDS if made.worst[1].peak_bytes <= parse_gpu(name).usable_bytes)
    return min(held, key=lambda name: CARDS[name][0], default="")


def _without_a_card(made: Made, found: str, card: str, less: str = "") -> str:
    known = f"the smallest known that holds it is {card}" if card else "none that is known holds it"
    smaller = "a smaller base" if made.asked.base == UNGATED else f"a smaller base, such as {UNGATED}"
    return (
        f"--base: '{made.asked.base}' is too large for this machine without a card: {found}. Name the card that it will run"
        f" on with --gpu ({known}), {less or 'or'} take {smaller}."
    )


def _too_small(made: Made, card: str) -> str:
    name, estimate = made.worst
    assert made.card is not None
    smaller = "" if made.asked.base == UNGATED else f", or a smaller base, such as {UNGATED}"
    larger = f"Take a larger card ({card} holds it)" if card else "Take a larger card than any that is known"
    return (
        f"--gpu: {made.card} does not hold '{made.asked.base}': with {made.method.name}, rank {made.method.rank} and"
        f" {made.method.max_tokens} tokens, the least that is tried, '{name}' needs about {estimate.peak_bytes / 2**30:.1f} GiB by"
        f" estimate, and a step should need at most {made.card.usable_bytes / 2**30:.1f}. {larger}{smaller}."
    )


def _folder(base: str) -> Path | None:
    """The folder with the base's small files; None for a known base of the hub, which need not be asked for them."""
    for _, text in ModelPath().problems(base):
        raise UsageError(f"--base: {text}")
    if Path(base).is_dir():
        require_llama(Path(base), base)
        return Path(base)
    if base in KNOWN_BASES:
        return None
    assert is_hub_name(base), "what is neither a folder nor such a name has been refused"
    return tokenizer_folder(base)


def _context(folder: Path | None) -> int:
    """The longest sequence that the base was trained with, where its config.json says so."""
    path = folder / "config.json" if folder else None
    told = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    return min(int(told.get("max_position_embeddings", UNKNOWN_CONTEXT)), LONG_ENOUGH[-1])


def _counter(folder: Path | None) -> CountTokens:
    """Tokens of a text: by the base's own tokenizer where it is here, and else by its length."""
    try:
        tokenizer = load_tokenizer(folder) if folder else None
    except (TokenizerError, ConfigError):
        tokenizer = None  # told by `doctor` and where it is loaded
    return _Counter(tokenizer).count


class _Counter:
    """Counts the first texts and measures the others by them."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer, self.texts, self.tokens, self.characters = tokenizer, 0, 0, 0

    def count(self, text: str) -> float:
        if self.tokenizer is None:
            return len(text) / CHARACTERS
        if self.texts < COUNTED:
            tokens = len(self.tokenizer.encode(text))
            self.texts, self.tokens, self.characters = self.texts + 1, self.tokens + tokens, self.characters + len(text)
            return tokens
        return len(text) * self.tokens / max(1, self.characters)
