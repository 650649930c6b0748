"""From an exception to what a person reads on stderr, and the exit status: 1 failed, 2 bad usage, 130 interrupted."""

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

import typer

from llamachat import distributed
from llamachat.errors import LlamachatError

INTERRUPTED = 130
STATE_IS_KEPT = "State is kept; the same command continues."
P = ParamSpec("P")


def reported(command: Callable[P, None]) -> Callable[P, None]:
    """The command, its errors told in words; an exception that is no LlamachatError is a bug and keeps its traceback."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except LlamachatError as error:
            print(f"llamachat: {error}", file=sys.stderr)
            raise typer.Exit(error.exit_status) from error
        except KeyboardInterrupt as error:
            if distributed.launched_index() == 0:
                print(" ".join(["\nllamachat: interrupted.", *map(str, error.args)]), file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from error

    return wrapped


@contextmanager
def state_is_kept() -> Iterator[None]:
    """An interrupt inside says that the same command goes on from where it was."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(STATE_IS_KEPT) from error
