"""Statistics of binary outcomes and of scores against labels, with 95% intervals; imports numpy only.

Outcomes of one prompt are not independent, so the bootstrap resamples whole groups if groups are given. All sampling is
seeded: the same values give the same interval. A single group gives no estimate of the variance: the bounds are nan.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_Z = 1.959963984540054  # the standard normal's 97.5% quantile
_DRAWS = 5000
_WORD = re.compile(r"\w+")
_CHUNK = 500  # resamples at once: 20 MB with 5,000 groups
_MOST_KEPT = 2**22  # counts that are cached (8 MiB); drawing them takes 30 times as long as using them


@dataclass(frozen=True, slots=True)
class Difference:
    """An estimate with its 95% interval, usually mean(a) - mean(b) over the same items."""

    value: float
    low: float
    high: float

    def named(self, name: str) -> dict[str, float]:
        """The value, and its bounds if they exist, as metrics: `name`, `name_low`, `name_high`."""
        ends = {f"{name}_low": self.low, f"{name}_high": self.high}
        return {name: self.value} | {end: bound for end, bound in ends.items() if math.isfinite(bound)}


@dataclass(frozen=True, slots=True)
class Detection:
    """Recall and precision of a rule that detects a class; nan if the class is empty or nothing is detected."""

    recall: float
    precision: float


def wilson(successes: float, n: float) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927); a tie counts as half a success."""
    assert n > 0 and 0 <= successes <= n, (successes, n)
    share = successes / n
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    # Exact at the ends, where rounding would leave a small residue.
    return (0.0 if successes == 0 else max(0.0, centre - half)), (1.0 if successes == n else min(1.0, centre + half))


def proportion_interval(
    outcomes: Sequence[float] | Floats, *, groups: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """95% interval of the mean of outcomes in [0, 1]: Wilson's, with the effective sample size of the groups.

    The sample size is divided by the design effect (Kish 1965), the variance of the mean under sampling of whole groups
    over that of independent outcomes, at least 1. If all outcomes are equal, it is undefined and the number of groups
    is used as the sample size.
    """
    values = np.asarray(outcomes, dtype=np.float64)
    assert values.ndim == 1 and len(values) > 0
    share = mean(values)
    places = _group_numbers(groups, len(values))
    num_groups = int(places.max()) + 1
    independent = share * (1 - share) * len(values)  # variance of the sum
    if num_groups == len(values):
        size = float(len(values))
    elif independent == 0 or num_groups == 1:
        size = float(num_groups)
    else:
        residues = np.bincount(places, weights=values - share)
        drawn_whole = float(residues @ residues) * num_groups / (num_groups - 1)
        size = len(values) / max(1.0, drawn_whole / independent)
    return wilson(share * size, size)


def mean(values: Floats) -> float:
    return float(np.mean(values))


def bootstrap_interval(
    values: Sequence[float] | Floats,
    statistic: Callable[[Floats], float] = mean,
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """95% percentile bootstrap interval of a statistic of `values` (rows, if they are 2-D); resamples whole groups.

    Resamples in which the statistic is nan (one of two classes is missing) are dropped; nan if none remain.
    """
    array = np.asarray(values, dtype=np.float64)
    assert len(array) > 0
    rng = np.random.default_rng(seed)
    if statistic is mean and groups is None and array.ndim == 1 and len(array) > 1:
        # The same draws, in a tenth of the time.
        sizes = [min(_CHUNK, draws - start) for start in range(0, draws, _CHUNK)]
        parts = [array[rng.integers(0, len(array), (size, len(array)))].mean(axis=1) for size in sizes]
        means = np.concatenate(parts)
        return _percentiles(means[np.isfinite(means)])
    places = _group_numbers(groups, len(array))
    members = np.split(np.argsort(places, kind="stable"), np.cumsum(np.bincount(places))[:-1])
    if len(members) == 1:
        return math.nan, math.nan

    def draw() -> Floats:
        drawn = rng.integers(0, len(members), len(members))
        return array[drawn if groups is None else np.concatenate([members[number] for number in drawn])]

    resampled = np.array([statistic(draw()) for _ in range(draws)])
    return _percentiles(resampled[np.isfinite(resampled)])


def paired_bootstrap(
    a: Sequence[float] | Floats,
    b: Sequence[float] | Floats,
    *,
    groups: Sequence[Hashable] | None = None,
    draws: int = _DRAWS,
    seed: int = 0,
) -> Difference:
    """mean(a) - mean(b) over the same items; groups of items (pairs of one prompt) are resampled whole."""
    gaps = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    assert gaps.ndim == 1 and len(gaps) > 0
    places = _group_numbers(groups, len(gaps))
    sums, sizes = np.bincount(places, weights=gaps), np.bincount(places).astype(np.float64)
    if len(sums) == 1:
        return Difference(mean(gaps), math.nan, math.nan)
    draw_counts = _kept_counts if len(sums) * draws <= _MOST_KEPT else _counts
    means = [(counts @ sums) / (counts @ sizes) for counts in draw_counts(len(sums), draws, seed)]
    low, high = _percentiles(np.concatenate(means))
    return Difference(mean(gaps), low, high)


def _counts(groups: int, draws: int, seed: int) -> Iterator[NDArray[np.integer]]:
    """How often each group is drawn in each resample, [draws, groups], in parts."""
    rng = np.random.default_rng(seed)
    for start in range(0, draws, _CHUNK):
        yield rng.multinomial(groups, np.full(groups, 1 / groups), size=min(_CHUNK, draws - start))


@lru_cache(maxsize=8)
def _kept_counts(groups: int, draws: int, seed: int) -> list[NDArray[np.integer]]:
    """As `_counts`, but cached for all comparisons with the same number of groups."""
    return [counts.astype(np.uint16) for counts in _counts(groups, draws, seed)]


def superiority(
    a: Sequence[float] | Floats, b: Sequence[float] | Floats, *, draws: int = 2000, seed: int = 0
) -> Difference:
    """Share of all pairs (one of a, one of b) in which a is higher; ties count half; a[i] and b[i] belong to one item.

    The probability of superiority (Mann-Whitney's U over its maximum). Items are resampled whole for the interval.
    """
    ours, theirs = np.asarray(a, dtype=np.float64)[:, None], np.asarray(b, dtype=np.float64)[None, :]
    assert ours.shape == theirs.T.shape and len(ours) > 0
    wins = (ours > theirs) + (ours == theirs) / 2
    n = len(ours)
    if n == 1:
        return Difference(mean(wins), math.nan, math.nan)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)
    low, high = _percentiles(((counts @ wins) * counts).sum(axis=1) / n**2)
    return Difference(mean(wins), low, high)


def independent_difference(a: Difference, b: Difference) -> Difference:
    """The difference of two independent estimates, with a 95% interval combined from theirs.

    Square-and-add (Newcombe 1998, method 10; Zou and Donner 2008 for any statistic): the distance to each bound is the
    root of the sum of squared distances. For positively correlated estimates on the same items it is too wide.
    """
    value = a.value - b.value
    below = math.hypot(a.value - a.low, b.high - b.value)
    above = math.hypot(a.high - a.value, b.value - b.low)
    return Difference(value, value - below, value + above)


def auroc(scores: Sequence[float] | Floats, labels: Sequence[bool] | NDArray[np.bool_]) -> float:
    """Probability that a positive scores above a negative, with ties counting half; nan if one class is missing."""
    values, is_positive = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    assert values.shape == is_positive.shape and values.ndim == 1
    positives, negatives = int(is_positive.sum()), int((~is_positive).sum())
    if not positives or not negatives:
        return math.nan
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # from 1; equal scores share their mean rank
    return float((ranks[is_positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def detection(is_named: Sequence[bool] | NDArray[np.bool_], is_member: Sequence[bool] | NDArray[np.bool_]) -> Detection:
    """Recall and precision of the items that a rule detects, compared with the true members of the class."""
    named, member = np.asarray(is_named, dtype=bool), np.asarray(is_member, dtype=bool)
    assert named.shape == member.shape and named.ndim == 1
    hits = int((named & member).sum())
    return Detection(recall=_share(hits, int(member.sum())), precision=_share(hits, int(named.sum())))


def balanced_accuracy(
    is_named: Sequence[bool] | NDArray[np.bool_], is_member: Sequence[bool] | NDArray[np.bool_]
) -> float:
    """Mean recall of the two classes: 0.5 for any rule that ignores the input; nan if a class is missing."""
    named, member = np.asarray(is_named, dtype=bool), np.asarray(is_member, dtype=bool)
    return (detection(named, member).recall + detection(~named, ~member).recall) / 2


def distinct_pairs(texts: Sequence[str]) -> float:
    """Distinct pairs of adjacent words over all such pairs in the texts (distinct-2, Li et al. 2016); 0 without pairs.

    It falls with the number of texts, so compare only equal numbers.
    """
    pairs = [pair for text in texts for pair in pairwise(text.split())]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def commonest_count(texts: Sequence[str]) -> int:
    """How often the most common text occurs, ignoring case and punctuation; 0 without texts."""
    counts = Counter(tuple(_WORD.findall(text.casefold())) for text in texts)
    return max(counts.values(), default=0)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _group_numbers(groups: Sequence[Hashable] | None, n: int) -> NDArray[np.intp]:
    if groups is None:
        return np.arange(n)
    assert len(groups) == n
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups])


def _percentiles(values: Floats) -> tuple[float, float]:
    if not len(values):
        return math.nan, math.nan
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
