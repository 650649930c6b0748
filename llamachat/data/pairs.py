"""Preferences as token ids: both answers to one prompt, and counts of the records that were dropped."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Literal

from llamachat.chat_format import ChatFormat, TokenizedExample, TrainOn
from llamachat.chat_format.dialog import Message, with_system
from llamachat.chat_format.format import shorten_alike
from llamachat.config.sections import Data, DataSource
from llamachat.data.loading import Mixture, load_mixture
from llamachat.data.records import Preference, Rating
from llamachat.errors import DataError

Domain = Literal["helpfulness", "safety", "open", "contrast"]
Tagged = tuple[Domain, Preference]
UNSAFE_CHOSEN = "left out: the chosen answer is unsafe and the rejected one safe"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairExample:
    """Two answers to one prompt as token ids; both end with EOS, where the reward model's score is read."""

    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    margin: float
    chosen_tokens: int  # of the answer only
    rejected_tokens: int
    preference: Preference  # the original record, for ratings, labels and text baselines
    domain: Domain
    source: str  # path of its file
    shared: int = field(init=False)  # tokens of the common prefix: the prompt, and the start that the answers share

    @property
    def tokens(self) -> int:
        return len(self.chosen) + len(self.rejected)

    def __post_init__(self) -> None:
        both = zip(self.chosen, self.rejected[:-1], strict=False)
        object.__setattr__(self, "shared", sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], both)))


@dataclass(slots=True)
class PairEncoder:
    """Encodes preferences and counts the records that it drops."""

    chat_format: ChatFormat
    system: str | None
    max_tokens: int
    margins: Mapping[Rating, float] = field(default_factory=dict)  # by rating; 0 without one
    dropped: Counter[str] = field(default_factory=Counter)

    def pairs(self, records: Iterable[Tagged]) -> Iterator[PairExample]:
        """Encode the records lazily, skipping those that are dropped."""
        for domain, preference in records:
            example = self._pair(domain, preference)
            if example is not None:
                yield example

    def _pair(self, domain: Domain, preference: Preference) -> PairExample | None:
        if domain == "safety" and preference.chosen_is_safe is False and preference.rejected_is_safe is True:
            self.dropped[UNSAFE_CHOSEN] += 1
            return None
        prompt = with_system(preference.prompt, self.system)
        dialogs = [(*prompt, preference.chosen), (*prompt, preference.rejected)]
        shortened = shorten_alike(self.chat_format, dialogs, max_tokens=self.max_tokens)
        if shortened is None:
            self.dropped[f"left out: an answer and its question alone are longer than {self.max_tokens} tokens"] += 1
            return None
        if len(shortened[0]) < len(dialogs[0]):
            self.dropped[f"shortened: oldest turns dropped to fit {self.max_tokens} tokens"] += 1
        chosen, rejected = (self.encode(dialog) for dialog in shortened)
        if chosen.input_ids == rejected.input_ids:
            self.dropped["left out: both answers have the same tokens"] += 1
            return None
        return PairExample(
            chosen=chosen.input_ids,
            rejected=rejected.input_ids,
            chosen_tokens=sum(chosen.loss_mask),
            rejected_tokens=sum(rejected.loss_mask),
            margin=self.margins.get(preference.rating, 0.0) if preference.rating else 0.0,
            preference=preference,
            domain=domain,
            source=preference.source,
        )

    def encode(self, messages: tuple[Message, ...]) -> TokenizedExample:
        """Encode a dialog with only its last answer in the loss mask."""
        return self.chat_format.encode_dialog(messages, train_on=TrainOn.LAST_ANSWER)


def load_preferences(
    data: Data, chat_format: ChatFormat, domains: Sequence[Domain], *, seed: int
) -> dict[Domain, Mixture[Preference]]:
    """Load the preferences of each domain; the bad lines of all files are reported in one error."""
    mixtures: dict[Domain, Mixture[Preference]] = {}
    errors: list[str] = []
    for domain in domains:
        sources: Sequence[DataSource] = getattr(data, domain)
        try:
            mixtures[domain] = load_mixture(sources, data.split, Preference, forbidden=chat_format.forbidden, seed=seed)
        except DataError as error:
            errors.append(str(error))
    if errors:
        raise DataError("\n".join(errors))
    return mixtures
