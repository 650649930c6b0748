"""data/gatt: lists of public figures, hobbies and languages for Ghost Attention.

The original lists contain a thousand sports and six hundred languages, most of them obscure. Only entries mentioned in
other texts of the origins are kept.
"""

import re
from collections import Counter
from pathlib import Path

from tools.cutting.files import read_json, read_rows, read_text

# Bands among the celebrities, and words with another common meaning.
_BANDS = {"Fleetwood Mac", "Foo Fighters", "One Direction", "Rolling Stones", "The Eagles"}
_NO_SPORTS = {"ball", "chicago", "club", "elle", "killer", "ultimate", "floor", "guts", "trial", "tag", "hunter", "cutting",
              "reining", "ribbon", "rope", "rotation"}  # fmt: skip
_NO_LANGUAGES = {"Alabama", "Delaware", "English", "Akkadian", "Sumerian"}

_NAME = re.compile(r"[A-Z][a-z]+(?: (?:[A-Z][a-z]*\.?|da|de|van|von|the|of)){0,3} [A-Z][a-z]+")


def _talk(root: Path) -> str:
    rows = read_rows(root / "topical-chat/conversations.jsonl.gz")
    turns = [turn[1] for row in rows for turn in row["turns"]]
    turns += [turn for row in read_rows(root / "self-dialogue/dialogues.jsonl.gz") for turn in row["turns"]]
    return "\n".join(turns)


def _books(root: Path) -> str:
    paths = [*(root / "openstax").glob("*.txt.gz"), *(root / "standard-ebooks").glob("*.txt.gz")]
    return "\n".join(read_text(path) for path in sorted(paths))


def _figures(root: Path, books: str, talk: str) -> list[str]:
    """Scientists and presidents often named in textbooks, and celebrities that people chat about."""
    folder = root / "corpora-lists"
    presidents = [entry["person"] for entry in read_json(folder / "humans_us_presidents.json")["objects"]]
    old = {f"{person['firstname']} {person['lastname']}" for person in presidents}
    old |= set(read_json(folder / "humans_scientists.json")["scientists"])
    stars = set(read_json(folder / "humans_celebrities.json")["celebrities"])
    in_books, in_talk = Counter(_NAME.findall(books)), Counter(_NAME.findall(talk))
    known = {name for name in old if in_books[name] >= 5} | {name for name in stars if in_talk[name] >= 25}
    return sorted(name for name in known - _BANDS if name.isascii())


def _hobbies(root: Path, text: str) -> list[str]:
    """Sports that people say they play, do or watch, and musical instruments."""
    folder = root / "corpora-lists"
    verbs = "play|playing|played|enjoy|watch|watching|watched|go|going|went|do|doing|into|tried|try|of"
    done = Counter(re.findall(rf"\b(?:{verbs}) ([a-z]+)(?=[.,!?;]| (?:and|or|with|in|on|as|when|for)\b)", text.lower()))
    words = Counter(re.findall(r"[a-z]+", text.lower()))
    sports = {sport.lower() for sport in read_json(folder / "sports_sports.json")["sports"] if sport.isascii()}
    instruments = {name.lower() for name in read_json(folder / "music_instruments.json")["instruments"]}
    common = {sport for sport in sports if done[sport] >= 2} - instruments - _NO_SPORTS
    played = {f"playing the {name}" for name in instruments if " " not in name and words[name] >= 20}
    return sorted(common | played)


def _languages(root: Path, books: str) -> list[str]:
    """Languages spoken, learned, written or translated in a book."""
    names = {name for name in read_json(root / "language-list/en.json").values() if name.isascii() and name.isalpha()}
    verbs = "speak|speaks|speaking|spoke|spoken|learn|learned|learning|taught|from|into|in|and|or|write"
    used = Counter(re.findall(rf"\b(?:{verbs}) ([A-Z][a-z]+)\b(?! [A-Z])", books))
    mentioned = Counter(re.findall(r"\b([A-Z][a-z]+)(?:-speaking| language| tongue| grammar| dialect)", books))
    return sorted(name for name in names if 3 * mentioned[name] + used[name] >= 6 and name not in _NO_LANGUAGES)


def gatt(root: Path) -> dict[str, list[str]]:
    """List name -> entries."""
    books, talk = _books(root), _talk(root)
    return {
        "figures": _figures(root, books, talk),
        "hobbies": _hobbies(root, talk + books),
        "languages": _languages(root, books),
    }
