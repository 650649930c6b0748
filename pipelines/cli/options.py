"""What the commands share: options, errors reported in words with their exit status, options that take several values.

Exit status: 1 failed, 2 bad usage, configuration or data, 130 interrupted.
"""

import functools
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from typer.core import TyperCommand

from llamachat import distributed
from llamachat.errors import LlamachatError

INTERRUPTED = 130
STATE_IS_KEPT = "State is kept; the same command continues."
P = ParamSpec("P")

TINY = Path("configs/tiny.yaml")
ConfigOption = Annotated[Path, typer.Option("--config", help="The recipe.", metavar="FILE")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Values over the recipe's, such as sft.epochs=1.")
]
GpuOption = Annotated[
    str | None, typer.Option("--gpu", help="The card: 24GiB, rtx-4090, 8x a100-80gb.", metavar="CARD")
]
HoursOption = Annotated[
    float | None, typer.Option("--hours", min=0.0, help="Hours that there are, for the whole.", metavar="H")
]
PresetsOption = Annotated[bool, typer.Option("--presets", help="All presets on cards of 24, 48 and 80 GiB instead.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample from the likeliest tokens of this probability mass.")]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Sample from so many of the likeliest tokens, before top-p; else all.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Longest answer, in tokens.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same answers.")]


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


class SeveralValues(TyperCommand):
    """A command whose repeatable options take several values at once; it has no arguments of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # click's Context, of which later typers hold a copy
        options = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, repeated(args, options))


def repeated(arguments: list[str], options: Collection[str]) -> list[str]:
    """The arguments, each of these options written before each of its values."""
    found: list[str] = []
    option = ""  # the one whose values stand here
    for argument in arguments:
        if not argument.startswith("-"):
            if option and found[-1] != option:
                found.append(option)
        else:
            name = argument.partition("=")[0]
            option = name if name in options else ""
        found.append(argument)
    return found
