"""Training data of direct preference optimisation: pairs of `data.helpfulness` and `data.safety` in packed rows.

Shapes: 1 a packed row, T positions, N answer tokens in the row, B pairs in the row.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message, with_system
from llamachat.config.sections import Base, Data
from llamachat.data.packing import pack_responses
from llamachat.data.pairs import Domain, PairEncoder, PairExample, load_preferences
from llamachat.data.problems import left_out
from llamachat.errors import DataError
from llamachat.tables import plural

log = logging.getLogger(__name__)

DOMAINS: tuple[Domain, ...] = ("helpfulness", "safety")


@dataclass(frozen=True, slots=True)
class Examples:
    """Training and validation data of one step."""

    train: list[PairExample]
    validation: list[PairExample]
    prompts: list[tuple[Message, ...]]  # held-out contexts to sample answers to
    dropped: dict[str, int]  # number of dropped records, by reason


def load_examples(data: Data, chat_format: ChatFormat, *, base: Base, num_prompts: int, seed: int) -> Examples:
    """Token ids of the training and validation pairs; the test and judge parts are not touched."""
    mixtures = load_preferences(data, chat_format, DOMAINS, seed=seed)
    encoder = PairEncoder(chat_format, base.system, base.max_tokens)
    for mixture in mixtures.values():
        encoder.dropped.update(mixture.dropped)
    train = list(encoder.pairs((domain, pair) for domain in DOMAINS for pair in mixtures[domain].train))
    validation = list(encoder.pairs((domain, pair) for domain in DOMAINS for pair in mixtures[domain].validation))
    if not train or not validation:
        raise DataError(
            f"data.helpfulness and data.safety: {plural(len(train), 'training pair')} and {plural(len(validation), 'validation pair')} are"
            f" left{left_out(encoder.dropped)}. Both are needed. Add pairs, raise base.max_tokens if they are longer, or"
            " change data.split."
        )
    for reason, count in sorted(encoder.dropped.items()):
        log.warning("%s: %s", plural(count, "pair"), reason)
    prompts = dict.fromkeys(with_system(pair.preference.prompt, base.system) for pair in validation)
    short = [prompt for prompt in prompts if len(chat_format.encode_prompt(prompt)) < base.max_tokens]
    evenly = short[:: max(1, len(short) // max(1, num_prompts))][:num_prompts]
    return Examples(train, validation, evenly, dict(encoder.dropped))


def pair_tokens(pair: PairExample, *, branches: bool) -> int:
    """Number of tokens of a pair in a row of `collate`."""
    return pair.tokens - (_common(pair) if branches else 0)


def _common(pair: PairExample) -> int:
    """Number of leading tokens that a branch shares, short of all: positions must jump where the branch starts."""
    return min(pair.shared, len(pair.chosen) - 1)


def collate(pairs: Sequence[PairExample], *, branches: bool) -> dict[str, Tensor]:
    """Pack pairs into one row of separate sequences: input_ids and position_ids [1, T]; for each answer token its id,
    the position whose hidden state predicts it (`states_at`) and the number of its answer (`answers`), [N].

    The answers of pair b are 2b (chosen) and 2b + 1. With `branches`, for a model that attends by sequence, the prefix
    shared by the chosen and the rejected sequence is computed once.
    """
    rows: list[tuple[int, ...]] = []
    shared: list[int] = []
    states_at: list[int] = []
    next_tokens: list[int] = []
    answers: list[int] = []
    start = 0
    for number, pair in enumerate(pairs):
        common = _common(pair) if branches else 0
        moved = len(pair.chosen) - common  # from rejected positions to row indices after chosen
        places = [range(len(pair.chosen)), [*range(common), *range(common + moved, len(pair.rejected) + moved)]]
        sides = ((pair.chosen, pair.chosen_tokens), (pair.rejected, pair.rejected_tokens))
        for side, (ids, count) in enumerate(sides):
            states_at += [start + place for place in places[side][-count - 1 : -1]]
            next_tokens += ids[-count:]
            answers += [2 * number + side] * count
        rows += [pair.chosen, pair.rejected[common:]]
        shared += [0, common]
        start += len(pair.chosen) + len(pair.rejected) - common
    packed = pack_responses(rows, shared)
    return {
        "input_ids": packed["input_ids"],
        "position_ids": packed["position_ids"],
        "states_at": torch.tensor(states_at, dtype=torch.long),
        "next_tokens": torch.tensor(next_tokens, dtype=torch.long),
        "answers": torch.tensor(answers, dtype=torch.long),
    }
