"""What a step has sampled so far, in files that are there whole or not at all: killed at any moment, nothing is sampled
twice and nothing is lost. One thing surprises: what `kept` returns has been through JSON also when it was just made, so
that a run that was killed goes on with the very values of one that was not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamachat import distributed
from llamachat.runs.atomic import storage_errors, write_text


class Store:
    """The files of one step; the step's lock keeps others out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value of this name; made, and written, where it is not there yet."""
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
