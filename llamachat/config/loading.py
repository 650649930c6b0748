"""Reads a recipe: YAML files, each of which may extend another, then the command line; reports all problems together.

Mappings merge key by key, any other value is replaced whole; the source file of each value is recorded.
PyYAML follows YAML 1.1, where `2e-4` is text, `off` is false and `010` is eight. Here numbers, true, false and null
follow YAML 1.2's core schema, digits may be grouped (`1_000`), and a key written twice is an error.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llamachat.config.section import (
    NO_TEXT,
    ConfigProblem,
    Key,
    Section,
    describe,
    dotted,
    from_home,
    raise_all,
    section_problems,
)
from llamachat.config.sections import near_path
from llamachat.errors import first_line
from llamachat.pipes import regular_file

S = TypeVar("S", bound=Section)
COMMAND_LINE = "command line"


class Layers:
    """Values and, for each one, the name of the layer that it came from."""

    def __init__(self, source: str) -> None:
        self.values: dict[str, Any] = {}
        self._sources: dict[Key, str] = {(): source}

    def source(self, key: Key) -> str:
        """The layer of a key; for a missing key, the layer of the section that lacks it."""
        while key not in self._sources:
            key = key[:-1]
        return self._sources[key]

    def add(self, values: Mapping[str, Any], source: str) -> None:
        """Merge the values of a file over the present ones."""
        self._lay(self.values, values, source, ())
        self._sources[()] = source

    def override(self, text: str) -> ConfigProblem | None:
        """Apply one override `section.key=value`; the value is YAML, and a number in the key is a list index."""
        name, equals, value_text = text.partition("=")
        key: Key = tuple(int(part) if part.isdecimal() and len(part) < 10 else part for part in name.strip().split("."))
        if not equals or not all(part != "" for part in key):
            return ConfigProblem(
                COMMAND_LINE, "", f"'{text}' is not an override. Write section.key=value, such as run.seed=1."
            )
        try:
            value = parse_value(value_text)
        except ValueError as error:
            return ConfigProblem(
                COMMAND_LINE, dotted(key), f"the value is not valid YAML: {error}. Put it in quotes: '\"...\"'."
            )
        holder: Any = self.values
        for depth, part in enumerate(key):
            at = dotted(key[:depth])
            if isinstance(holder, list) and (not isinstance(part, int) or part >= len(holder)):
                have = f"indices 0 to {len(holder) - 1}" if holder else "no items"
                text = f"'{at}' is a list with {have}; '{part}' is not an index of it."
                return ConfigProblem(COMMAND_LINE, dotted(key), text)
            if not isinstance(holder, dict | list):
                text = f"'{at}' is {describe(holder)}, which has no keys under it."
                return ConfigProblem(COMMAND_LINE, dotted(key), text)
            place: Any = str(part) if isinstance(holder, dict) else part
            if depth == len(key) - 1:
                self._set(holder, place, value, COMMAND_LINE, key)
            elif isinstance(holder, dict) and holder.get(place) is None:
                self._set(holder, place, {}, COMMAND_LINE, key[: depth + 1])
            holder = holder[place]
        return None

    def _lay(self, holder: dict[str, Any], values: Mapping[str, Any], source: str, at: Key) -> None:
        for name, value in values.items():
            key = (*at, name)
            if isinstance(value, dict) and isinstance(holder.get(name), dict):
                self._sources[key] = source
                self._lay(holder[name], value, source, key)
            else:
                self._set(holder, name, value, source, key)

    def _set(self, holder: Any, part: str | int, value: Any, source: str, key: Key) -> None:
        """Replace a value whole and record the source of each key below it, since a later layer may replace only some
        of them."""
        for below in [known for known in self._sources if known[: len(key)] == key]:
            del self._sources[below]
        self._sources[key] = source
        holder[part] = {} if isinstance(value, dict) else value
        if isinstance(value, dict):
            self._lay(holder[part], value, source, key)


def merged(below: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """One mapping merged with another, which takes precedence."""
    layers = Layers("")
    layers.add(below, "")
    layers.add(over, "")
    return layers.values


def load_recipe(
    schema: type[S],
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    prepare: Callable[[Layers], None] | None = None,
    more_checks: Callable[[Layers], Iterable[ConfigProblem]] | None = None,
) -> S:
    """The recipe of a file, fully checked; one ConfigError reports all problems.

    `prepare` may change the raw values first. `more_checks` checks the raw values for what types cannot express; its
    problems join the same report.
    """
    layers, problems = read_layers(Path(path), overrides)
    if prepare is not None:
        prepare(layers)
    values = {name: value for name, value in layers.values.items() if name != "extends"}
    if not any(problem.key == "" and problem.source != COMMAND_LINE for problem in problems):
        problems += section_problems(schema, values, source=layers.source, root=schema)
        problems += more_checks(layers) if more_checks else []
    raise_all(problems)
    return from_plain(schema, values)


def texts_in(value: object) -> Iterator[str]:
    """Every text in plain values: in lists, and in the values of mappings."""
    if isinstance(value, str):
        yield value
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for part in parts:
        yield from texts_in(part)


def from_plain(schema: type[S], values: dict[str, Any]) -> S:
    """A section from values that are known to be free of problems."""
    return schema.model_validate_json(json.dumps(values), strict=True)


def to_yaml(section: Section) -> str:
    """The section with every value, as YAML that loads to the same section."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, width=110, allow_unicode=True)


def read_layers(path: Path, overrides: Sequence[str]) -> tuple[Layers, list[ConfigProblem]]:
    """The values of a file and the files that it extends, then of the command line; and the problems in reading them.

    A file that cannot be read gives no values, and a problem without a key.
    """
    files, problems = _read_chain(path)
    layers = Layers(str(path))
    for name, values in reversed(files):
        layers.add(values, str(name))
    for override in overrides:
        if override.partition("=")[0].strip() == "extends":
            text = "a file says what it extends. Give that file with --config, or write a small recipe that extends it."
            problems.append(ConfigProblem(COMMAND_LINE, "extends", text))
        elif problem := layers.override(override):
            problems.append(problem)
    return layers, problems


def _read_chain(path: Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[ConfigProblem]]:
    """A file and the files that it extends, directly or indirectly, in that order, with their values."""
    files: list[tuple[Path, dict[str, Any]]] = []
    problems: list[ConfigProblem] = []
    child, following = None, path
    while True:
        values, file_problems = _read(following, mentioned_by=child)
        files.append((following, values))
        problems += file_problems
        parent = values.get("extends")
        if parent is not None and not isinstance(parent, str):
            text = f"found {describe(parent)}, but 'extends' must be the path of a recipe, relative to this file."
            problems.append(ConfigProblem(str(following), "extends", text))
        if not isinstance(parent, str):
            return files, problems
        child, following = following, following.parent / from_home(parent)
        names = [name.resolve() for name, _ in files]
        if following.resolve() in names:
            cycle = [str(name) for name, _ in files[names.index(following.resolve()) :]]
            text = (
                f"these files extend each other in a circle: {' -> '.join([*cycle, cycle[0]])}. Remove one 'extends'."
            )
            problems.append(ConfigProblem(str(child), "extends", text))
            return files, problems


def read_text(path: Path) -> str:
    """The text of a recipe, which may come through a pipe."""
    return regular_file(path).read_text(encoding="utf-8")


def _read(path: Path, *, mentioned_by: Path | None) -> tuple[dict[str, Any], list[ConfigProblem]]:
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError):
            hint = near_path(str(path))
            advice = f"Did you mean '{hint}'?" if hint else "Recipes are in configs/."
            reason = f"the recipe '{path}' does not exist. {advice}"
        else:
            what = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
            reason = f"the recipe '{path}' cannot be read: {what}. Pass a YAML file."
        return {}, [
            ConfigProblem(str(mentioned_by), "extends", reason)
            if mentioned_by
            else ConfigProblem(str(path), "", reason)
        ]
    return parse_mapping(text, str(path))


# -- YAML


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without YAML 1.1's interpretations of plain text."""


_Loader.yaml_implicit_resolvers = {}


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


def _scalar(loader: yaml.SafeLoader, node: yaml.Node) -> str:
    return loader.construct_scalar(node)  # pyright: ignore[reportArgumentType]  # it rejects other nodes itself


def _int(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    return int(_scalar(loader, node))


def _float(loader: yaml.SafeLoader, node: yaml.Node) -> float:
    return float(_scalar(loader, node))


def _bool(loader: yaml.SafeLoader, node: yaml.Node) -> bool:
    text = _scalar(loader, node).lower()
    if text not in ("true", "false"):  # only where a tag names the type
        reason = f"found '{text}', which is neither true nor false"
        raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
    return text == "true"


_Loader.add_constructor("tag:yaml.org,2002:int", _int)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)
_Loader.add_constructor("tag:yaml.org,2002:bool", _bool)


# Counted with aliases expanded: a document with more was made to exhaust a reader, or refers to itself.
_MOST_VALUES, _DEEPEST = 100_000, 50
_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))


def parse_value(text: str) -> Any:
    """The value of one override; raises a ValueError with the reason if it is not YAML."""
    _, value = _loaded(text)
    return value


def _loaded(text: str) -> tuple[yaml.Node | None, Any]:
    """A document's node (None if it is empty) and its value; raises a ValueError with the reason if it is not YAML."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, None
            _check_nodes(node)
            return node, _with_text_keys(loader.construct_document(node))
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(_reason(error, text)) from error
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error


_TOO_DEEP = f"it is nested deeper than {_DEEPEST} levels, or an alias is inside the value that it refers to"


def _check_nodes(root: yaml.Node) -> None:
    waiting, count = [(root, 0)], 0
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST:
            raise ValueError(_TOO_DEEP)
        if count > _MOST_VALUES:
            raise ValueError(f"it has more than {_MOST_VALUES} values, including those of its aliases")
        if node.tag not in _TAGS:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"found the tag '{node.tag.rpartition(':')[2]}', but only plain values are allowed",
                node.start_mark,
            )
        if isinstance(node, yaml.ScalarNode) and (match := NO_TEXT.search(node.value)):
            reason = f"found U+{ord(match[0]):04X}, which is not a valid character,"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        below = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        waiting += [(part, depth + 1) for part in below] if isinstance(node, yaml.CollectionNode) else []


def parse_mapping(text: str, source: str) -> tuple[dict[str, Any], list[ConfigProblem]]:
    """The values of a whole file, and its YAML errors."""
    try:
        node, values = _loaded(text)
    except ValueError as error:
        return {}, [ConfigProblem(source, "", f"invalid YAML: {error}. Fix the line.")]
    if node is None:
        return {}, []
    problems = [ConfigProblem(source, dotted(key), text) for key, text in _duplicates(node)]
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else "a single value"
        return {}, [
            ConfigProblem(source, "", f"the file contains {kind}, but a recipe is a mapping: write 'section: ...'.")
        ]
    return values, problems


def _reason(error: Exception, text: str) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return f"a control character (U+{error.character:04X}) in line {line}"
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
                yield (*at, name), f"written twice, in lines {lines[name]} and {line}. Keep one of them."
            lines[name] = line
            yield from _duplicates(value_node, (*at, name), seen)


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list) else value
