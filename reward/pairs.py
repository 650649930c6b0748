"""Encode preferences and labels as token ids: mixing by model, splitting, shortening, counting dropped records.

The mixes are those of Llama 2 section 3.2.2: the helpfulness model is trained on all helpfulness pairs and the same
number of others, the safety model on all safety pairs and a tenth of others. The judge (ours) is trained on a side of
the split that neither sees. Contrast pairs (ours, reward/contrast.py) are added to each mix.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Literal

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Dialog, with_system
from llamachat.config.sections import Data
from llamachat.data.loading import Mixture, load_mixture, mix
from llamachat.data.pairs import Domain, PairEncoder, PairExample, Tagged, load_preferences
from llamachat.data.problems import left_out
from llamachat.data.records import Preference, Prompt, first_user_turn
from llamachat.errors import DataError
from llamachat.runs.inputs import Which
from llamachat.tables import plural
from reward.config import HARMFUL_SHARES, MOST_HELD_OUT, Config
from reward.contrast import answers_preferred, contrast_pairs, preferred_dialogs, real_refusals, refusals_preferred
from reward.loss import MARGINS

log = logging.getLogger(__name__)

DOMAINS: tuple[Domain, ...] = ("helpfulness", "safety", "open")  # domains with sources in `data`
TESTED: tuple[Domain, ...] = ("helpfulness", "safety")  # open data sets are only trained on


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelExample:
    """One answer labelled safe or unsafe."""

    ids: tuple[int, ...]
    is_safe: bool
    source: str
    prompt: str  # the first user turn


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Training and evaluation data of one reward model."""

    train: list[PairExample]
    labels: list[LabelExample]  # single responses of the safety auxiliary loss
    validation: list[PairExample]  # pairs of the model's own domain, and contrast pairs
    test: list[PairExample]  # pairs of both domains
    dialogs: list[Dialog]  # the test side of data.sft, for the probe
    test_labels: list[LabelExample]
    dropped: dict[str, int]  # number of dropped records, by reason


def load_examples(
    config: Config, data: Data, chat_format: ChatFormat, *, which: Which, system: str | None, max_tokens: int, seed: int
) -> Examples:
    """Token ids of one reward model's mix, and of the test pairs of both domains."""
    mixtures = load_preferences(data, chat_format, DOMAINS, seed=seed)
    longest = min(max_tokens, config.max_tokens or max_tokens)
    encoder = PairEncoder(chat_format, system, longest, MARGINS[config.margin])
    for mixture in mixtures.values():
        encoder.dropped.update(mixture.dropped)
    dialogs = load_mixture(data.sft, data.split, Dialog, forbidden=chat_format.forbidden, seed=seed)
    train = _mix(config, encoder, mixtures, which=which, seed=seed)
    side: Literal["judge", "train"] = "judge" if which == "judge" else "train"
    sources = ContrastSources(
        dialogs, mixtures["helpfulness"], mixtures["safety"], _harmful_prompts(data, chat_format, seed=seed)
    )
    train += _contrast(config, encoder, sources, side, num_others=len(train), which=which, seed=seed)
    counts = Counter(example.domain for example in train)
    log.info("rm/%s learns from %s", which, ", ".join(plural(count, f"{name} pair") for name, count in counts.items()))
    rated = [example for example in train if example.domain != "contrast"]
    unrated = sum(example.preference.rating is None for example in rated)
    if unrated and config.margin != "none":
        log.info("%d of %d training pairs have no rating: their margin is 0", unrated, len(rated))
    own = TESTED if which == "judge" else (which,)
    validation = list(encoder.pairs((domain, pair) for domain in own for pair in mixtures[domain].validation))
    if not train or not validation:
        raise DataError(
            f"rm/{which}: {plural(len(train), 'training pair')} and {plural(len(validation), 'validation pair')} are left of data."
            f"{' and data.'.join(own)}{left_out(encoder.dropped)}. Both are needed. Add pairs, raise base.max_tokens or "
            "reward.max_tokens where they are longer, or change data.split."
        )
    validation += _contrast(config, encoder, sources, "validation", num_others=len(validation), which=which, seed=seed)
    tested = replace(encoder, max_tokens=max_tokens)
    test = list(tested.pairs((domain, pair) for domain in TESTED for pair in mixtures[domain].test))
    labels, test_labels = _load_labels(config, data, encoder, tested, which=which, seed=seed)
    for reason, count in sorted(encoder.dropped.items()):
        log.warning("%s: %s", plural(count, "record"), reason)
    return Examples(
        train=train,
        labels=labels,
        validation=validation,
        test=test,
        dialogs=dialogs.test,
        test_labels=test_labels,
        dropped=dict(encoder.dropped),
    )


def _mix(
    config: Config, encoder: PairEncoder, mixtures: dict[Domain, Mixture[Preference]], *, which: Which, seed: int
) -> list[PairExample]:
    """Training pairs of one model: all pairs of its own domain, and a sample of the others."""
    if which == "judge":
        return list(encoder.pairs((domain, pair) for domain, mixture in mixtures.items() for pair in mixture.judge))
    share = config.other_share if which == "helpfulness" else config.helpfulness_share
    own = list(encoder.pairs((which, pair) for pair in mixtures[which].train))
    others: tuple[Domain, ...] = ("safety" if which == "helpfulness" else "helpfulness", "open")
    pool: list[Tagged] = [(domain, pair) for domain in others for pair in mixtures[domain].train]
    wanted = round(len(own) * share / (1 - share))
    sampled = _draw(pool, wanted, encoder, seed=seed)
    if len(sampled) < wanted:
        log.warning(
            "rm/%s: its mix needs %d pairs of data.%s and data.open, but there are %d: their share is %.0f%% instead of"
            " %.0f%%",
            which,
            wanted,
            others[0],
            len(sampled),
            100 * len(sampled) / max(1, len(own) + len(sampled)),
            100 * share,
        )
    return own + sampled


@dataclass(frozen=True, slots=True)
class ContrastSources:
    """Sources of contrast pairs: dialogs with good answers, pairs of both domains, and harmful prompts."""

    dialogs: Mixture[Dialog]
    helpfulness: Mixture[Preference]
    safety: Mixture[Preference]
    harmful: Mixture[Prompt]


def _harmful_prompts(data: Data, chat_format: ChatFormat, *, seed: int) -> Mixture[Prompt]:
    """`data.adversarial`, and the prompts of `data.prompts` marked is_safety."""
    adversarial, prompts = (
        load_mixture(sources, data.split, Prompt, forbidden=chat_format.forbidden, seed=seed)
        for sources in (data.adversarial, data.prompts)
    )
    sides = {
        side: [*getattr(adversarial, side), *(p for p in getattr(prompts, side) if p.is_safety)]
        for side in ("train", "validation", "judge")
    }
    return replace(adversarial, **sides)


def _contrast(
    config: Config,
    encoder: PairEncoder,
    sources: ContrastSources,
    side: Literal["train", "validation", "judge"],
    *,
    num_others: int,
    which: Which,
    seed: int,
) -> list[PairExample]:
    """Contrast pairs of one side of the split; their number is the configured share of the `num_others` other pairs.

    Some pairs of the safety model and the judge prefer a refusal to a harmful answer, so that pairs against refusals
    of harmless prompts do not teach them to dislike refusals in general.
    """
    dialogs: list[Dialog] = getattr(sources.dialogs, side)
    if dialogs:  # without data.sft there are no contrast pairs
        dialogs = [*dialogs, *preferred_dialogs(getattr(sources.helpfulness, side))]
    safety: list[Preference] = getattr(sources.safety, side)
    count = round(num_others * config.contrast.share / (1 - config.contrast.share)) if dialogs else 0
    count = min(count, MOST_HELD_OUT) if side == "validation" else count
    longest = config.contrast.max_tokens
    apart = replace(encoder, dropped=Counter())  # dropped contrast pairs are not counted as the user's records
    short = replace(apart, max_tokens=min(encoder.max_tokens, longest or encoder.max_tokens))
    dialogs = [dialog for dialog in dialogs if len(encoder.encode(dialog.messages).input_ids) <= short.max_tokens]
    kinds = config.contrast.kinds
    pairs: list[PairExample] = []

    def add(by: PairEncoder, preferences: Sequence[Preference], most: int) -> None:
        pairs.extend(islice(by.pairs(("contrast", pair) for pair in preferences), most))

    if "refusal" in kinds and (share := HARMFUL_SHARES.get(which)):
        prompts: list[Prompt] = getattr(sources.harmful, side)
        add(short, refusals_preferred(safety, prompts, dialogs, seed=seed), round(share * count))
    if "refusal" in kinds and which == "safety" and count:
        add(apart, answers_preferred(getattr(sources.helpfulness, side)), count - len(pairs))
    others, refusals = count - len(pairs), real_refusals(safety)
    add(apart, contrast_pairs(dialogs, others, which=which, kinds=kinds, seed=seed, refusals=refusals), others)
    if side != "validation" and len(pairs) < count:
        within = "" if longest is None else f" of at most {longest} tokens (reward.contrast.max_tokens)"
        log.warning("rm/%s: dialogs%s allow %d contrast pairs instead of %d", which, within, len(pairs), count)
    return pairs


def _draw(pool: Sequence[Tagged], wanted: int, encoder: PairEncoder, *, seed: int) -> list[PairExample]:
    """Draw up to `wanted` examples uniformly without replacement."""
    # Sort by random() instead of sample(): Python only guarantees that random() is stable across versions.
    numbers = Random(f"mix {seed}")
    order = sorted(range(len(pool)), key=[numbers.random() for _ in pool].__getitem__)
    return list(islice(encoder.pairs(pool[index] for index in order), wanted))


def _load_labels(
    config: Config, data: Data, encoder: PairEncoder, tested: PairEncoder, *, which: Which, seed: int
) -> tuple[list[LabelExample], list[LabelExample]]:
    """Labelled single responses for training, and with the encoder `tested` for testing; only the safety model is
    trained on them."""
    train: list[tuple[Dialog, str]] = []
    test: list[tuple[Dialog, str]] = []
    for source in data.labels:
        mixture = load_mixture((source,), data.split, Dialog, forbidden=encoder.chat_format.forbidden, seed=seed)
        encoder.dropped.update(mixture.dropped)
        train += [(dialog, source.path) for dialog in mixture.train]
        test += [(dialog, source.path) for dialog in mixture.test]
    if which != "safety" or config.safety_auxiliary_weight == 0:
        train = []
    labels = _encode_labels(encoder, train)
    return (_balance(labels, seed=seed) if config.balance_labels else labels), _encode_labels(tested, test)


def _encode_labels(encoder: PairEncoder, dialogs: Iterable[tuple[Dialog, str]]) -> list[LabelExample]:
    """Encode the labelled last answers of these dialogs; each dialog comes with its file."""
    examples: list[LabelExample] = []
    for dialog, source in dialogs:
        if dialog.is_safe is None:
            encoder.dropped["labels left out: without is_safe"] += 1
            continue
        limit = encoder.max_tokens
        messages = encoder.chat_format.shorten(with_system(dialog.messages, encoder.system), max_tokens=limit)
        if messages is None:
            encoder.dropped[f"labels left out: the last turn pair alone is longer than {limit} tokens"] += 1
            continue
        ids, prompt = encoder.encode(messages).input_ids, first_user_turn(dialog)
        examples.append(LabelExample(ids=ids, is_safe=dialog.is_safe, source=source, prompt=prompt))
    return examples


def _balance(labels: list[LabelExample], *, seed: int) -> list[LabelExample]:
    """Oversample the rarer class until both classes have the same size: whole copies, then a random sample."""
    safe = [example for example in labels if example.is_safe]
    unsafe = [example for example in labels if not example.is_safe]
    if not safe or not unsafe:
        return labels
    most = max(len(safe), len(unsafe))
    balanced = mix([(safe, most / len(safe)), (unsafe, most / len(unsafe))], seed)
    log.info(
        "%d safe and %d unsafe labelled responses; the rarer class is repeated to %d", len(safe), len(unsafe), most
    )
    return balanced
