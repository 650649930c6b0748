"""Encode dialogs as token ids with a loss mask: reading, mixing, splitting, shortening, counting dropped records."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from llamachat.chat_format import ChatFormat, TokenizedExample, TrainOn
from llamachat.chat_format.dialog import Dialog, Message, with_system
from llamachat.config.sections import Data, DataSource
from llamachat.data.loading import load_mixture, read_records
from llamachat.data.packing import epoch_order
from llamachat.runs.artifacts import DIALOGS, HELD_OUT_DIALOGS
from llamachat.tables import plural

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Examples:
    """Training and validation data of one SFT step."""

    train: list[TokenizedExample]
    validation: list[TokenizedExample]
    prompts: list[tuple[Message, ...]]  # held-out contexts to sample answers to, first turns only
    dropped: dict[str, int]  # number of dropped records, by reason


def load_examples(
    data: Data,
    chat_format: ChatFormat,
    *,
    system: str | None,
    train_on: TrainOn,
    max_tokens: int,
    num_prompts: int,
    seed: int,
    step_dialogs: Path | None = None,
    sft_share: float = 0.0,
) -> Examples:
    """Token ids of the training and validation dialogs of `data.sft`; the test and judge parts are not touched.

    With `step_dialogs`, a folder of dialogs from a step, training uses all of those plus `sft_share` of the dialogs of
    `data.sft`; held-out dialogs also come from the folder if it has any.
    """
    own, own_held_out = read_step_dialogs(step_dialogs, chat_format) if step_dialogs else ([], [])
    dropped: Counter[str] = Counter()
    train_side, held_out_side = own, own_held_out
    if step_dialogs is None or sft_share or not own_held_out:
        mixture = load_mixture(data.sft, data.split, Dialog, forbidden=chat_format.forbidden, seed=seed)
        dropped.update(mixture.dropped)
        share = len(mixture.train) if step_dialogs is None else round(sft_share * len(mixture.train))
        chosen = (
            epoch_order(len(mixture.train), 1, f"beside made dialogs {seed}")[:share] if step_dialogs else range(share)
        )
        train_side = [*own, *(mixture.train[place] for place in chosen)]
        held_out_side = [*own_held_out, *mixture.validation]
    dialogs, held_out = (
        [Dialog(with_system(dialog.messages, system), dialog.is_safe) for dialog in side]
        for side in (train_side, held_out_side)
    )
    train = _encode(dialogs, chat_format, train_on=train_on, max_tokens=max_tokens, dropped=dropped)
    validation = _encode(held_out, chat_format, train_on=train_on, max_tokens=max_tokens, dropped=dropped)
    for reason, count in sorted(dropped.items()):
        log.warning("%s: %s", plural(count, "dialog"), reason)
    prompts = held_out_prompts(held_out, chat_format, count=num_prompts, max_tokens=max_tokens)
    return Examples(train, validation, prompts, dict(dropped))


def read_step_dialogs(folder: Path, chat_format: ChatFormat) -> tuple[list[Dialog], list[Dialog]]:
    """Training and held-out dialogs of a step. They are not split again: the split depends on the first turn, which
    a shortened prompt may have lost."""
    sides = []
    for path in (folder / DIALOGS, folder / HELD_OUT_DIALOGS):
        is_there = path.is_file() and path.stat().st_size > 0
        source = DataSource(path=str(path), format="native")
        sides.append(read_records(source, Dialog, forbidden=chat_format.forbidden) if is_there else [])
    return sides[0], sides[1]


def _encode(
    dialogs: Sequence[Dialog],
    chat_format: ChatFormat,
    *,
    train_on: TrainOn,
    max_tokens: int,
    dropped: Counter[str],
) -> list[TokenizedExample]:
    examples: list[TokenizedExample] = []
    for dialog in dialogs:
        messages = chat_format.shorten(dialog.messages, max_tokens=max_tokens)
        if messages is None:
            dropped[f"left out: the last turn pair alone is longer than {max_tokens} tokens"] += 1
            continue
        if len(messages) < len(dialog.messages):
            dropped[f"shortened: oldest turns dropped to fit {max_tokens} tokens"] += 1
        example = chat_format.encode_dialog(messages, train_on=train_on)
        if any(example.loss_mask):
            examples.append(example)
        else:
            dropped["left out: no answer to learn (train: false)"] += 1
    return examples


def held_out_prompts(
    dialogs: Sequence[Dialog], chat_format: ChatFormat, *, count: int, max_tokens: int
) -> list[tuple[Message, ...]]:
    """Openings (system text and first user turn) of `count` distinct dialogs that leave room for an answer.

    They are evenly spaced, so that each source of the mixture has its share.
    """
    prompts: list[tuple[Message, ...]] = []
    stride = max(1, len(dialogs) // max(1, count))
    for dialog in chain(dialogs[::stride], dialogs):
        if len(prompts) == count:
            break
        opening = dialog.messages[: 2 if dialog.messages[0].role == "system" else 1]
        if opening not in prompts and len(chat_format.encode_prompt(opening)) < max_tokens:
            prompts.append(opening)
    return prompts
