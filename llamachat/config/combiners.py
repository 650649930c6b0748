"""The names of the ways to make one score of two, and of a function of the user's: `path.py:function`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llamachat.config.paths import missing
from llamachat.config.problems import nearest

COMBINERS = ("llama2_gate", "single", "weighted")


@dataclass(frozen=True, slots=True)
class FunctionName:
    """A function in a Python file."""

    path: Path
    function: str

    def __str__(self) -> str:
        return f"{self.path}:{self.function}"


def function_name(text: str) -> FunctionName | None:
    """The function that `path.py:function` names, or None where the text has another form."""
    path, colon, function = text.rpartition(":")
    return FunctionName(Path(path), function) if colon and path.endswith(".py") and function.isidentifier() else None


@dataclass(frozen=True, slots=True)
class CombinerName:
    """The field names a combiner, or a function in a file that exists."""

    def problems(self, value: object) -> Iterator[tuple[tuple[()], str]]:
        if not isinstance(value, str) or value in COMBINERS:
            return
        name = function_name(value)
        if name is None:
            near = nearest(value, COMBINERS)
            hint = f" Did you mean '{near}'?" if near else ""
            known = f"{', '.join(COMBINERS)}, or a function of yours as path.py:function, such as rewards.py:score"
            yield (), f"there is no combiner '{value}'.{hint} Known: {known}."
        elif not name.path.is_file():
            yield (), missing(str(name.path), what="the file of the reward function")
