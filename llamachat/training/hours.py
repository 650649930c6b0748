"""The time budgets of a step: its own hours over all its starts (`<section>.max_hours`), and its command's
(`run.max_hours`).

The time used is saved with the step's other state (in each checkpoint, in `sampling/`), so that a kill and a restart do
not reset the clock. The clock is read after each piece of work, so even the smallest budget lets one optimizer step or
one batch through.
"""

import json
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from llamachat import distributed
from llamachat.runs.atomic import storage_errors, write_json

log = logging.getLogger(__name__)

FILE = "hours.json"
EndedBy = Literal["max_hours", "run.max_hours"]


@dataclass(slots=True)
class Hours:
    """The clock of one step's work."""

    step: str
    section: str  # the section of max_hours
    limit: float | None = None  # hours of work, over all starts
    deadline: float | None = None  # by time.monotonic(): the end of the command's hours
    seconds_before: float = 0.0  # in earlier starts
    ended_by: EndedBy | None = None
    _began: float = field(default_factory=lambda: time.monotonic())

    @property
    def are_limited(self) -> bool:
        """Whether the work may end early at all."""
        return self.limit is not None or self.deadline is not None

    @property
    def seconds(self) -> float:
        """The time that the work has taken, over all starts."""
        return self.seconds_before + time.monotonic() - self._began

    @property
    def details(self) -> dict[str, Any]:
        """The manifest's details about work that the hours ended; empty if the work ended normally."""
        return {} if self.ended_by is None else {"ended_by": self.ended_by}

    @property
    def key(self) -> str:
        """The key that ended the work, for messages."""
        return "run.max_hours" if self.ended_by == "run.max_hours" else f"{self.section}.max_hours"

    def are_over(self, where: str) -> bool:
        """Whether the work ends here; once true, it stays true."""
        if self.ended_by is not None:
            return True
        if not self.are_limited:
            return False
        self.ended_by = distributed.broadcast_object(self._ending())
        if self.ended_by == "max_hours":
            log.warning("%s: %s (%g) is used up at %s", self.step, self.key, self.limit, where)
        elif self.ended_by == "run.max_hours":
            log.warning("%s: %s is used up at %s", self.step, self.key, where)
        return self.ended_by is not None

    def _ending(self) -> EndedBy | None:
        if self.limit is not None and self.seconds > 3600 * self.limit:
            return "max_hours"
        if self.deadline is not None and time.monotonic() > self.deadline:
            return "run.max_hours"
        return None

    def save(self, folder: Path) -> None:
        """Write the clock into the folder; without a limit nothing is written."""
        if self.are_limited or self.ended_by is not None:
            write_json(folder / FILE, {"seconds": self.seconds, "ended_by": self.ended_by})


def open_hours(step: str, section: str, limit: float | None, deadline: float | None, saved: Path | None) -> Hours:
    """The clock as it was saved in the folder, or a new one."""
    path = None if saved is None else saved / FILE
    if path is None or not path.is_file():
        return Hours(step, section, limit, deadline)
    with storage_errors(path):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            seconds, ended_by = float(values["seconds"]), values["ended_by"]
            if not (0 <= seconds < math.inf and ended_by in (None, *get_args(EndedBy))):
                raise ValueError(f"{seconds:g} s, ended by {ended_by!r}")
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s: cannot be read (%s): the step's hours are counted from now on", path, error)
            return Hours(step, section, limit, deadline)
    return Hours(step, section, limit, deadline, seconds_before=seconds, ended_by=ended_by)
