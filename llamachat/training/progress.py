"""The progress display of a training: a bar with the loss and the time left, or without a terminal a line every few
seconds.

If several trainings run in their own processes, without a terminal, the parent command turns their lines back into
bars (`SharedProgress`).
"""

import math
import re
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from llamachat import distributed

LINE_EVERY_S = 5.0  # without a terminal


class StepProgress:
    """Counts optimizer steps; use as a context manager. Of several processes only the first one displays them."""

    def __init__(self, title: str, *, steps: int, done: int = 0) -> None:
        self._title, self._steps, self._started, self._first = title, steps, time.monotonic(), done
        self._printed = -math.inf  # when the last line was printed
        self._console = Console(file=sys.stderr, quiet=not distributed.is_first())
        self._bar = _bars(self._console)
        self._task = self._bar.add_task(title, total=steps, completed=done, headline="")

    def __enter__(self) -> "StepProgress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def step(self, step: int, headline: str) -> None:
        """Show that `step` optimizer steps are done; `headline` is the main metric."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, headline=headline)
            return
        now = time.monotonic()
        if step < self._steps and now - self._printed < LINE_EVERY_S:
            return
        self._printed = now
        passed = now - self._started
        left = passed / max(1, step - self._first) * (self._steps - step)
        self.say(f"{self._title} {step}/{self._steps}  {headline}  {_clock(passed)} elapsed, {_clock(left)} left")

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        _say(self._console, text)


# The line that `StepProgress` prints without a terminal.
_LINE = re.compile(r"(?P<title>\S+) (?P<step>\d+)/(?P<steps>\d+)  (?P<headline>.*)  [\d:]+ elapsed, [\d:]+ left")


class SharedProgress:
    """The output of several steps on one terminal: a bar for each, and above them their lines, with the step's name.

    Use as a context manager. Without a terminal every line is printed with the name of its step.
    """

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr)
        self._bar = _bars(self._console)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "SharedProgress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def line(self, step: str, text: str) -> None:
        """Handle a line that a step printed."""
        progress = _LINE.fullmatch(text) if self._console.is_terminal else None
        if progress is None:
            _say(self._console, text if text.startswith(step) or not text.strip() else f"{step}: {text}")
            return
        if step not in self._tasks:
            self._tasks[step] = self._bar.add_task(step, total=int(progress["steps"]), headline="")
        # A step may have several counters, such as answers first and then optimizer steps.
        total, completed = int(progress["steps"]), int(progress["step"])
        self._bar.update(self._tasks[step], total=total, completed=completed, headline=progress["headline"])

    def end(self, step: str) -> None:
        """Remove the bar of a step that has ended."""
        if step in self._tasks:
            self._bar.remove_task(self._tasks.pop(step))


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[headline]}"),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
        console=console,
        transient=False,
    )


def _clock(seconds: float) -> str:
    """Minutes and seconds, such as 0:25, or with hours, such as 2:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
