"""The commits of the hub that this process has read, so that an artifact's manifest says which ones made it.

A name of the hub without a revision means whatever its main branch is on that day; `owner/name@commit` pins it.
"""

from collections.abc import Mapping
from typing import Any

from llamachat.config.loading import texts_in

_commits: dict[str, str] = {}


def note_commit(name: str, commit: str) -> None:
    """Remember the commit that a name of the hub was read at; `name` as the recipe has it."""
    _commits[name] = commit


def commit_of(name: str) -> str | None:
    """The commit that this process has read a name of the hub at."""
    return _commits.get(name)


def commits_in(identity: Mapping[str, Any]) -> dict[str, str]:
    """The commits of the names that an identity holds, where this process has read them."""
    return {text: _commits[text] for text in texts_in(identity) if text in _commits}
