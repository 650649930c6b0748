"""Small results that are slow to compute and depend only on files, kept in the user's cache folder between commands.

A result is stored under a digest of everything that it depends on, so a changed file or code gives a new entry. If the
folder is not writable, only time is lost. `$XDG_CACHE_HOME/llamachat` may be deleted at any time.
"""

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from llamachat.runs.fingerprints import fingerprint


def cached(kind: str, follows_from: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """The result of `compute`, as JSON would return it, or the stored result for an equal `follows_from`."""
    file = _folder() / kind / f"{fingerprint(follows_from)[:40]}.json"
    with suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    value = json.loads(json.dumps(compute()))
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        side = file.with_name(f"{file.name}.{os.getpid()}")
        side.write_text(json.dumps(value), encoding="utf-8")
        side.replace(file)
    return value


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamachat"
