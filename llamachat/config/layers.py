"""The values of a recipe, put together from an extended file, the file itself and the command line.

Mappings merge key by key, anything else is replaced whole; for each value it is known which layer it came from.
"""

import copy
from collections.abc import Mapping
from typing import Any, cast

from llamachat.config.problems import Key, Problem, describe, dotted
from llamachat.config.yaml_files import parse_value

COMMAND_LINE = "command line"


def merged(below: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one mapping with those of another laid over them."""
    layers = Layers("")
    layers.add(copy.deepcopy(dict(below)), "")
    layers.add(copy.deepcopy(dict(over)), "")
    return layers.values


class Layers:
    """Values and, for each, the name of the layer that it came from."""

    def __init__(self, source: str) -> None:
        self.values: dict[str, Any] = {}
        self._sources: dict[Key, str] = {(): source}

    def source(self, key: Key) -> str:
        """The layer that a key came from; of a missing key, that of the section that it is missing from."""
        while key not in self._sources:
            key = key[:-1]
        return self._sources[key]

    def add(self, values: Mapping[str, Any], source: str) -> None:
        """Lay the values of a file over the present ones."""
        self._merge(self.values, values, source, ())
        self._sources[()] = source

    def override(self, text: str) -> Problem | None:
        """Lay one `section.key=value` over the present values; the value is YAML, a number in the key a list index."""
        name, equals, value_text = text.partition("=")
        key: Key = tuple(int(part) if part.isdecimal() else part for part in name.strip().split("."))
        if not equals or not all(part != "" for part in key):
            return Problem(COMMAND_LINE, "", f"'{text}' is no override. Write section.key=value, such as run.seed=1.")
        try:
            value = parse_value(value_text)
        except ValueError as error:
            return Problem(COMMAND_LINE, dotted(key), f"the value is no YAML: {error}. Put it in quotes: '\"...\"'.")
        return self._put(key, value)

    def _put(self, key: Key, value: Any) -> Problem | None:
        holder: Any = self.values
        for depth, part in enumerate(key):
            at = dotted(key[:depth])
            if isinstance(holder, list):
                if not isinstance(part, int) or part >= len(holder):
                    have = f"0 to {len(holder) - 1}" if holder else "none, it is empty"
                    return Problem(
                        COMMAND_LINE, dotted(key), f"'{at}' is a list with the items {have}; '{part}' is none."
                    )
            elif isinstance(holder, dict):
                part = str(part)
                if depth < len(key) - 1 and holder.get(part) is None:
                    self._replace(holder, part, {}, COMMAND_LINE, key[: depth + 1])
            else:
                return Problem(COMMAND_LINE, dotted(key), f"'{at}' is {describe(holder)}, which has no keys under it.")
            if depth == len(key) - 1:
                self._replace(holder, part, value, COMMAND_LINE, key)
            else:
                holder = cast(Any, holder)[part]  # a dict takes the text, a list the number: seen to above
        return None

    def _merge(self, into: dict[str, Any], values: Mapping[str, Any], source: str, at: Key) -> None:
        for name, value in values.items():
            key = (*at, name)
            if isinstance(value, dict) and isinstance(into.get(name), dict):
                self._sources[key] = source
                self._merge(into[name], value, source, key)
            else:
                self._replace(into, name, value, source, key)

    def _replace(self, holder: Any, part: str | int, value: Any, source: str, key: Key) -> None:
        for below in [known for known in self._sources if known[: len(key)] == key]:
            del self._sources[below]
        holder[part] = value
        self._record(value, source, key)

    def _record(self, value: Any, source: str, key: Key) -> None:
        """Every key below has its source, since another layer may later replace its neighbours alone."""
        self._sources[key] = source
        for name, below in value.items() if isinstance(value, dict) else ():
            self._record(below, source, (*key, name))
