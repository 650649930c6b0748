"""The hub commits that this process has read, for the manifest of an artifact.

A hub name without a revision refers to the current main branch; `owner/name@commit` pins it.
"""

from collections.abc import Mapping
from typing import Any

from llamachat.config.loading import texts_in

_commits: dict[str, str] = {}


def note_commit(name: str, commit: str) -> None:
    """Record the commit at which a hub name was read; `name` is written as in the recipe."""
    _commits[name] = commit


def commit_of(name: str) -> str | None:
    """The commit at which this process has read a hub name."""
    return _commits.get(name)


def commits_in(identity: Mapping[str, Any]) -> dict[str, str]:
    """The commits of the hub names in an identity, as far as this process has read them."""
    return {text: _commits[text] for text in texts_in(identity) if text in _commits}
