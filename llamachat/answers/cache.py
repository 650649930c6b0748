"""What a step has sampled so far, in files that are there whole or not at all: a resumed step samples nothing twice.

A value that was just made also goes through JSON, so that a resumed run continues with the very same values.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat import distributed
from llamachat.runs.atomic import storage_errors, write_text


@dataclass(frozen=True, slots=True)
class StepCache:
    """JSON values of one step by name, a file each; the step's lock keeps other processes out."""

    folder: Path

    def get_or_make(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of this name; `make` is called and its result written where there is none yet."""
        path = self._path(name)
        if not self.has(name):
            write_text(path, json.dumps(make(), allow_nan=False) + "\n")
            distributed.wait()
        with storage_errors(path):
            return json.loads(path.read_text(encoding="utf-8"))

    def has(self, name: str) -> bool:
        """Whether the value is there."""
        return distributed.broadcast_object(self._path(name).is_file())

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
