"""What a step has sampled so far, in files that are there whole or not at all: a resumed step samples nothing twice.

A value that was just made also goes through JSON, so that a resumed run continues with the very same values.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat import distributed
from llamachat.runs.atomic import storage_errors, write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StepCache:
    """JSON values of one step by name, a file each; the step's lock keeps other processes out."""

    folder: Path

    def get_or_make(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of this name; `make` is called and its result written where there is none yet."""
        if not self.has(name):
            write_text(self._path(name), json.dumps(make(), allow_nan=False) + "\n")
            distributed.wait()
        return self._read(name)

    def has(self, name: str) -> bool:
        """Whether the value is there; a damaged one is not."""
        if not distributed.broadcast_object(self._path(name).is_file()):
            return False
        try:
            self._read(name)
        except ValueError as error:
            log.warning("warning: %s: cannot be understood (%s): it is made again", self._path(name), error)
            return False
        return True

    def _read(self, name: str) -> Any:
        with storage_errors(self._path(name)):
            return json.loads(self._path(name).read_text(encoding="utf-8"))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
