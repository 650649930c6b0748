"""Prompts: those of the training side in a seeded order, and fixed held-out ones.

Reads `data.prompts` and `data.adversarial` (marked is_safety), else the questions of the tuning data. All stages
of a recipe choose the same held-out prompts, so that their metrics are comparable.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message, with_system
from llamachat.config.sections import Base, Data, DataSource, Rollout
from llamachat.data.files import source_names
from llamachat.data.loading import fraction, load_mixture, read_records
from llamachat.data.packing import epoch_order
from llamachat.data.problems import left_out
from llamachat.data.records import Prompt
from llamachat.errors import ConfigError, DataError
from llamachat.tables import plural

log = logging.getLogger(__name__)

_SALT = "ppo"  # of the first stage that used it; changing it would change the prompts of all stages


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as token ids; `is_safety` marks prompts likely to elicit an unsafe answer (read by the gate)."""

    messages: tuple[Message, ...]
    ids: tuple[int, ...]
    is_safety: bool
    name: str  # the record's id, or ""


@dataclass(frozen=True, slots=True)
class PromptSplits:
    """The prompts of a step by side, without overlap, and the dropped records, by reason."""

    train: list[EncodedPrompt]
    validation: list[EncodedPrompt]
    test: list[EncodedPrompt]
    dropped: dict[str, int]

    def drawn(self, count: int | None, *, seed: int) -> list[EncodedPrompt]:
        """`count` different prompts of the training side (all if None), in a seeded order."""
        different = list({prompt.ids: prompt for prompt in self.train}.values())
        return [different[place] for place in _order(len(different), seed, 0)][:count]

    def batch(self, iteration: int, *, count: int, seed: int) -> list[EncodedPrompt]:
        """The prompts of one iteration, counting from 0: the next ones in an order that is reshuffled each pass.

        They depend only on the iteration, so checkpoints need not store a position.
        """
        prompts = []
        for number in range(iteration * count, (iteration + 1) * count):
            epoch, place = divmod(number, len(self.train))
            prompts.append(self.train[_order(len(self.train), seed, epoch)[place]])
        return prompts


@cache
def _order(count: int, seed: int, epoch: int) -> tuple[int, ...]:
    return tuple(epoch_order(count, 1, f"{_SALT} {seed} {epoch}"))


def check_room(base: Base, rollout: Rollout) -> None:
    """Raise ConfigError if the longest answer leaves no room for a prompt."""
    if rollout.max_new_tokens >= base.max_tokens:
        raise ConfigError(
            f"rollout.max_new_tokens: {rollout.max_new_tokens}, but base.max_tokens is {base.max_tokens}, and prompt and "
            "answer must fit into it together. Lower rollout.max_new_tokens, or raise base.max_tokens."
        )


def load_prompts(
    data: Data,
    chat_format: ChatFormat,
    *,
    system: str | None,
    max_tokens: int,
    held_out: tuple[int, int],
    seed: int,
    only_safety: bool = False,
) -> PromptSplits:
    """Load the prompts, shortened to `max_tokens`; `held_out` gives the sizes of the validation and the test side.

    With `only_safety`, use only the prompts marked is_safety.
    """
    dropped: Counter[str] = Counter()
    sides: dict[str, list[EncodedPrompt]] = {"train": [], "validation": [], "test": []}
    for sources, is_safety in _parts(data):
        mixture = load_mixture(sources, data.split, Prompt, forbidden=chat_format.forbidden, seed=seed)
        dropped.update(mixture.dropped)
        for side, prompts in (("train", mixture.train), ("validation", mixture.validation), ("test", mixture.test)):
            selected = [prompt for prompt in prompts if is_safety or prompt.is_safety or not only_safety]
            sides[side] += _encoded(
                selected, chat_format, is_safety=is_safety, system=system, max_tokens=max_tokens, dropped=dropped
            )
    for reason, count in sorted(dropped.items()):
        log.warning("%s: %s", plural(count, "prompt"), reason)
    for side, share in (("train", "data.split"), ("validation", "data.split.validation"), ("test", "data.split.test")):
        if not sides[side]:
            what, key = ("prompt", "data.prompts")
            if only_safety:
                what, key = "adversarial prompt (under data.adversarial, or marked is_safety)", "data.adversarial"
            raise DataError(
                f"{key}: no {what} of at most {max_tokens} tokens is left on "
                f"the {side} split{left_out(dropped)}. Training, validation and test each need prompts. Add some, "
                f"or change {share}."
            )
    validation, test = (_chosen(sides[side], size) for side, size in zip(("validation", "test"), held_out, strict=True))
    return PromptSplits(sides["train"], validation, test, dict(dropped))


def load_borderline(
    data: Data, chat_format: ChatFormat, *, system: str | None, max_tokens: int, count: int
) -> dict[str, list[EncodedPrompt]]:
    """At most `count` prompts from each file of `data.borderline`, by metric name; no prompt is in two of them.

    They come from all sides of the split, since no step trains on them.
    """
    names = source_names(source.path for source in data.borderline)
    chosen: dict[str, list[EncodedPrompt]] = {}
    for source in data.borderline:
        prompts = read_records(source, Prompt, forbidden=chat_format.forbidden)
        encoded = _encoded(
            prompts, chat_format, is_safety=False, system=system, max_tokens=max_tokens, dropped=Counter()
        )
        seen = {prompt.ids for others in chosen.values() for prompt in others}
        chosen[names[source.path]] = _chosen([prompt for prompt in encoded if prompt.ids not in seen], count)
    return chosen


def _parts(data: Data) -> list[tuple[tuple[DataSource, ...], bool]]:
    """The sources, each with whether all its prompts ask for something unsafe."""
    if data.prompts or data.adversarial:
        parts = [(data.prompts, False), (data.adversarial, True)]
    else:
        # Annotators of safety comparisons were asked to elicit unsafe answers (Llama 2, section 3.2.1).
        parts = [(data.sft, False), (data.helpfulness, False), (data.safety, True)]
    return [(sources, is_safety) for sources, is_safety in parts if sources]


def _encoded(
    prompts: Iterable[Prompt],
    chat_format: ChatFormat,
    *,
    is_safety: bool,
    system: str | None,
    max_tokens: int,
    dropped: Counter[str],
) -> list[EncodedPrompt]:
    encoded = []
    for prompt in prompts:
        messages = with_system(prompt.messages, system)
        fitting = chat_format.shorten(messages, max_tokens=max_tokens)
        if fitting is None:
            dropped[f"left out: the last question alone is longer than {max_tokens} tokens"] += 1
            continue
        if len(fitting) < len(messages):
            dropped[f"shortened: oldest turns dropped to fit {max_tokens} tokens"] += 1
        ids = tuple(chat_format.encode_prompt(fitting))
        encoded.append(EncodedPrompt(fitting, ids, is_safety or prompt.is_safety, prompt.id or ""))
    return encoded


def _chosen(prompts: Sequence[EncodedPrompt], size: int) -> list[EncodedPrompt]:
    """`size` different prompts, chosen by a hash of the text, independent of other contents of the files."""
    different = {prompt.ids: prompt for prompt in prompts}.values()
    ranked = sorted(different, key=lambda prompt: (fraction(prompt.messages[-1].content, salt=_SALT), prompt.ids))
    return ranked[:size]
