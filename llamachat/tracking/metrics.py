"""The names of metrics: each has one row in `metrics.md` next to this file, with meaning, unit, reduction and panel.

`docs/metrics.md` is a copy for readers: `python -m llamachat.tracking.metrics > docs/metrics.md`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

_VARIABLES = {
    "which": "helpfulness|safety|judge",
    "rating": "significantly_better|better|slightly_better|negligibly_better",
    "domain": "helpfulness|safety",
    "source": "[A-Za-z0-9][A-Za-z0-9_~-]*",
    "kind": "safe_unsafe|both_safe|both_unsafe",
    "bound": "low|high",
    "prefix": "sft|rm/(?:helpfulness|safety|judge)|rs|gatt|distill|dpo|ppo|eval|report",
    "moment": "start|final",
    "tuned": "ppo|rs|gatt|distill",
    "score": "score|judge|judge_like_length|judge_finished|reward_(?:helpfulness|safety|combined)",
    "wins": "combined|judge|reward_(?:helpfulness|safety)",
    "policy": "[a-z0-9][a-z0-9._-]*",
    "way": "original|generic|template",
    "refused": "unfinished|empty|equal|not_better",
    "asked": "harmful|ordinary|harmless",
    "outcome": "complied|partly_refused|refused|unanswered",
    "refusing": "false_refusal|refusal",
    "turn": "[0-9]+",
    "keeping": "consistency|chance",
    "length": "chosen_longer|similar_length|chosen_shorter",
    "prompts": "harmless|harmful",
    "probed": "refusal_[a-z]+|unsure|no_idea|thanks|please|one_word|echo|swapped|half|twice",
    "measure": "consistency|recall",
    "compared": "start|final|chance|over_start|over_chance",
    "family": "[a-z_]+",
    "temperature": "[0-9][0-9.e+-]*",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table; metrics of one panel share a picture and so must share a scale."""

    name: str
    meaning: str
    unit: str
    reduction: str
    panel: str


class UnknownMetricError(LookupError):
    """A metric is logged under a name that the table lacks: our bug, not the user's."""


_ROW = re.compile(r"^\| `(.+?)` \| (.+) \| (.+) \| (.+) \| (.*) \|$", re.MULTILINE)
_PAGE = Path(__file__).with_name("metrics.md").read_text(encoding="utf-8")
METRICS = {row[1]: Metric(*row.groups()) for row in _ROW.finditer(_PAGE)}


@cache
def find_metric(name: str) -> Metric | None:
    """The row of the table for a name; None for a name of another version of the table."""
    if name in METRICS and "<" not in name:
        return METRICS[name]
    return next((metric for pattern, metric in _patterns() if pattern.fullmatch(name)), None)


def check_names(names: Iterable[str]) -> None:
    """Raise UnknownMetricError for the first name that the table lacks."""
    for name in names:
        if find_metric(name) is None:
            near = get_close_matches(name, METRICS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise UnknownMetricError(
                f"metric '{name}' is not in the table of llamachat/tracking/metrics.md.{hint} Add a row, or correct the"
                " name."
            )


@cache
def _patterns() -> list[tuple[re.Pattern[str], Metric]]:
    patterns = []
    for name, metric in METRICS.items():
        if "<" in name:
            parts = re.split(r"<(\w+)>", name)
            texts = [f"(?:{_VARIABLES[part]})" if index % 2 else re.escape(part) for index, part in enumerate(parts)]
            patterns.append((re.compile("".join(texts)), metric))
    return patterns


if __name__ == "__main__":
    print(_PAGE, end="")
