"""YAML text to plain values by the rules people expect.

PyYAML follows YAML 1.1, where `2e-4` is text, `off` is false and `010` is eight. Here numbers, true, false and null
are those of YAML 1.2's core schema, digits may be grouped (`1_000`), and a key written twice is a problem, not a choice.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from llamachat.config.problems import Key, Problem, dotted
from llamachat.errors import first_line


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without any of YAML 1.1's readings of plain text."""


_Loader.yaml_implicit_resolvers = {}


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(node.value)


_DIGITS = "[0-9]+(?:_[0-9]+)*"
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"^[-+]?{_DIGITS}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(rf"^[-+]?(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_value(text: str) -> Any:
    """The value of one override; raises ValueError with the reason when it is no YAML."""
    try:
        return _with_text_keys(yaml.load(text, _Loader))
    except yaml.YAMLError as error:
        raise ValueError(_reason(error)) from error


def parse_mapping(text: str, source: str) -> tuple[dict[str, Any], list[Problem]]:
    """The values of a whole file, and what is wrong with it as YAML."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, []
        problems = [Problem(source, dotted(key), text) for key, text in _duplicates(node)]
        values = loader.construct_document(node)
    except (yaml.YAMLError, ValueError) as error:
        return {}, [Problem(source, "", f"this is no YAML: {_reason(error)}. Mend the line.")]
    finally:
        loader.dispose()
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        return {}, [Problem(source, "", f"the file holds {kind}, but a recipe is a mapping: write 'section: ...'.")]
    return _with_text_keys(values), problems


def _reason(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} in line {mark.line + 1}, column {mark.column + 1}"
    return first_line(error)


def _duplicates(node: yaml.Node, at: Key = (), seen: frozenset[int] = frozenset()) -> Iterator[tuple[Key, str]]:
    if id(node) in seen:
        return
    seen = seen | {id(node)}
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, (*at, index), seen)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            name, line = str(key_node.value), key_node.start_mark.line + 1
            if name in lines:
                yield (*at, name), f"written twice, in lines {lines[name]} and {line}. A key has one value: keep one."
            lines[name] = line
            yield from _duplicates(value_node, (*at, name), seen)


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value
