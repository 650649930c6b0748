"""What a step has sampled so far, in files that are there whole or not at all: a resumed step samples nothing twice.

A new value also passes through JSON, so that a resumed run continues with exactly the same values. Next to
each file is its digest, so that a changed one is recreated; one without (the step ended between the two) is taken.
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
    """JSON values of one step by name, a file each; the step's lock keeps other processes out."""

    folder: Path

    def get_or_make(self, name: str, make: Callable[[], Any]) -> Any:
        """The value of this name; `make` is called and its result written where there is none yet."""
        if not self.has(name):
            text = json.dumps(make(), allow_nan=False) + "\n"
            write_text(self._path(name), text)
            write_text(self._path(name).with_suffix(DIGEST), sha256(text.encode()).hexdigest() + "\n")
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
        path = self._path(name)
        with storage_errors(path):
            text, digest = path.read_bytes(), path.with_suffix(DIGEST)
            if digest.is_file() and digest.read_bytes().strip() != sha256(text).hexdigest().encode():
                raise ValueError(f"it is not what {digest.name} is the digest of")
            return json.loads(text)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"
