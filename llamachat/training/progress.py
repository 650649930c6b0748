"""What a person sees of a training: a bar with the loss and the time left, or a line a step without a terminal."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llamachat import distributed


class StepProgress:
    """Counts optimizer steps; use as a context manager. Of several processes the first one shows them."""

    def __init__(self, title: str, *, steps: int, done: int = 0) -> None:
        self._title, self._steps, self._started, self._first = title, steps, time.monotonic(), done
        self._console = Console(file=sys.stderr, quiet=not distributed.is_first())
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[headline]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=False,
        )
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
        """`step` optimizer steps are done; `headline` is the metric that people watch."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, headline=headline)
            return
        passed = time.monotonic() - self._started
        left = passed / max(1, step - self._first) * (self._steps - step)
        self._console.print(f"{self._title} {step}/{self._steps}  {headline}  {left:.0f} s left", highlight=False)

    def say(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, highlight=False, markup=False)
