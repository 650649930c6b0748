"""Options that take several values in a row: `--sft a.jsonl b.jsonl` for `--sft a.jsonl --sft b.jsonl`."""

from collections.abc import Collection
from typing import Any

from typer.core import TyperCommand


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
