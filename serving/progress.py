"""How far a long command is."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def progress(total: int, done_word: str, things: str) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal, on standard error; a line for every tenth where there is none."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        done = 0

        def count(more: int) -> None:
            nonlocal done
            tenths = 10 * done // total
            done += more
            if 10 * done // total > tenths:
                log.info("%s %d of %d %s", done_word, done, total, things)

        yield count
        return
    columns = (
        TextColumn(f"{things} {done_word}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(things, total=total)
        yield lambda more: bar.advance(task, more)
