"""Values of constraints: words, lists of figures, hobbies and languages, and the held-out share."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from llamachat.constraints.texts import words
from llamachat.data.loading import fraction
from llamachat.errors import DataError

Side = Literal["train", "held_out"]

# Share of a family's values held out of all training. Not configurable, so that runs remain comparable.
HELD_OUT = 0.25

# No system text of data/sft asks for any of these words, so the held-out ones were never trained on.
_WORDS = json.loads(Path(__file__).with_name("words.json").read_text(encoding="utf-8"))
ENDINGS, BEGINNINGS, NAMES = (tuple(_WORDS[kind].split()) for kind in ("endings", "beginnings", "names"))
LETTERS = tuple("bcdfghkmpuvwy")  # most answers lack rarer letters anyway, and nearly all contain commoner ones
LIMITS = tuple(str(limit) for limit in range(5, 26) if limit not in (5, 8, 10, 12, 15, 20))

_MARK = re.compile(r"^\s*(?:[-*\u2022]|\(?\d{1,3}[.):]|\(?[a-z]\))\s*", re.IGNORECASE)
_MOST_WORDS = 5


def side_of(family: str, value: str) -> Side:
    """Whether training may use this value; decided by a hash, independent of the rest of the list."""
    return "held_out" if fraction(value.casefold(), salt=f"constraint {family}") < HELD_OUT else "train"


def read_list(path: Path) -> tuple[str, ...]:
    """Read a file with one entry per line, without duplicates."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: the list cannot be read ({error}). Constraints draw their values from it. Give a UTF-8 text file with "
            "one entry a line."
        ) from error
    entries = _each_once(" ".join(line.split()) for line in lines)
    if not entries:
        raise DataError(
            f"{path}: the list has no entry. Constraints draw their values from it. Write one entry a line, ten or more, "
            "since some are held out for measuring."
        )
    return entries


def parse_list(text: str) -> list[str]:
    """Parse a list written by a model: numbered, with dashes, or comma-separated on one line.

    Introductions ("Here are some hobbies:"), whole sentences (more than five words) and duplicates are dropped. Remarks
    after a colon, a dash or a bracket are removed.
    """
    lines = [line for line in text.splitlines() if words(line)]
    if len(lines) == 1:
        lines = re.split(r"[,;]|\band\b", lines[0].partition(":")[2] or lines[0])
    entries = []
    for line in lines:
        item = _MARK.sub("", line)
        if item.rstrip().endswith(":"):
            continue
        item = re.split(r"\s[-\u2013\u2014]\s|:|\(", item)[0]
        item = " ".join(item.replace('"', "").replace("*", "").split()).strip(" .,;!'")
        if 1 <= len(words(item)) <= _MOST_WORDS and any(char.isalpha() for char in item):
            entries.append(item)
    return list(_each_once(entries))


def _each_once(entries: Iterable[str]) -> tuple[str, ...]:
    return tuple({entry.casefold(): entry for entry in reversed([*entries]) if entry}.values())[::-1]
