"""Pseudo-random choices that are the same on every machine, by a hash of the text."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from llamachat.data.loading import fraction

Dialog = list[dict[str, str]]
T = TypeVar("T")


def chosen(items: Iterable[T], count: int, *, key: Callable[[T], str], salt: str) -> list[T]:
    """Up to `count` of the items, in the order of their hashes."""
    return sorted(items, key=lambda item: (fraction(key(item), salt=salt), key(item)))[:count]


def pick(options: Sequence[T], text: str, *, salt: str) -> T:
    """Choose one of the options by the hash of a text."""
    return options[int(fraction(text, salt=salt) * len(options))]


def distinct(items: Iterable[T], *, key: Callable[[T], str]) -> list[T]:
    """The first item of each key."""
    first_by_key: dict[str, T] = {}
    for item in items:
        first_by_key.setdefault(key(item), item)
    return list(first_by_key.values())


def text_of(dialog: Dialog) -> str:
    """All text of a dialog, as a key for choices."""
    return "\n".join(turn["content"] for turn in dialog)


def dialog_of(turns: Sequence[str], *, system: str = "") -> Dialog:
    """A dialog of alternating turns, the user first, truncated after the last answer."""
    even = len(turns) - len(turns) % 2
    messages = [
        {"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(turns[:even])
    ]
    return [{"role": "system", "content": system}, *messages] if system else messages


def turns_of(dialog: Dialog) -> list[str]:
    """The turns without the system text."""
    return [turn["content"] for turn in dialog if turn["role"] != "system"]


def length(dialog: Dialog) -> int:
    return sum(len(turn["content"]) for turn in dialog)


def user_prompt(text: str) -> Dialog:
    return [{"role": "user", "content": text}]


def answer_of(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
