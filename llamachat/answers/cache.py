"""What a step has sampled so far, in files that are complete or absent: a resumed step samples nothing twice.

A new value also passes through JSON, so that a resumed run continues with exactly the same values. Each
file has its digest next to it, so that a changed one is recreated; a file without a digest (the step ended between the
two writes) is accepted.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from llamachat import distributed
from llamachat.runs.atomic import storage_errors, write_text

log = logging.getLogger(__name__)

DIGEST = ".sha256"


@dataclass(frozen=True, slots=True)
class StepCache:
    """JSON values of one step by name, one file each; the step's lock keeps other processes out."""

    folder: Path

    def get_or_make(self, name: str, make: Callable[[], Any]) -> Any:
        """The value with this name; if there is none yet, `make` is called and its result is written."""
        if not self.has(name):
            text = json.dumps(make(), allow_nan=False) + "\n"
            write_text(self._path(name), text)
            write_text(self._path(name).with_suffix(DIGEST), sha256(text.encode()).hexdigest() + "\n")
            distributed.wait()
        return self._read(name)

    def has(self, name: str) -> bool:
        """Whether there is a value; a damaged one does not count."""
        if not distributed.broadcast_object(self._path(name).is_file()):
            return False
        try:
            self._read(name)
        except ValueError as error:
            log.warning("warning: %s: cannot be read (%s): it is sampled again", self._path(name), error)
            return False
        return True

    def _read(self, name: str) -> Any:
        path = self._path(name)
        with storage_errors(path):
            text, digest = path.read_bytes(), path.with_suffix(DIGEST)
            if digest.is_file() and digest.read_bytes().strip() != sha256(text).hexdigest().encode():
                raise ValueError(f"it does not match {digest.name}")
            return json.loads(text)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
