"""Reads a recipe: YAML with one level of `extends`, dotted overrides over it, and one report of everything wrong."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from llamachat.config.layers import COMMAND_LINE, Layers
from llamachat.config.paths import near_path
from llamachat.config.problems import Problem, describe, raise_all, section_problems
from llamachat.config.section import Section
from llamachat.config.yaml_files import parse_mapping

S = TypeVar("S", bound=Section)
MoreChecks = Callable[[Layers], Iterable[Problem]]


def load_recipe(
    schema: type[S],
    path: Path | str,
    overrides: Sequence[str] = (),
    *,
    prepare: Callable[[Layers], None] | None = None,
    more_checks: MoreChecks | None = None,
) -> S:
    """The recipe of a file, checked whole; every problem is told in one ConfigError.

    `prepare` may change the raw values first. `more_checks` looks at them for what the types cannot say; what it finds
    joins the same report.
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


def from_plain(schema: type[S], values: dict[str, Any]) -> S:
    """A section of values that were found free of problems."""
    return schema.model_validate_json(json.dumps(values), strict=True)


def to_yaml(section: Section) -> str:
    """The section with every value, as a recipe that loads to the same."""
    return yaml.safe_dump(section.model_dump(mode="json"), sort_keys=False, width=110, allow_unicode=True)


def read_layers(path: Path, overrides: Sequence[str]) -> tuple[Layers, list[Problem]]:
    """The values of a file, of the file that it extends, and of the command line, with the problems of reading them.

    A file that cannot be read leaves no values, and a problem without a key.
    """
    layers = Layers(str(path))
    values, problems = _read(path, mentioned_by=None)
    parent = values.get("extends")
    if isinstance(parent, str):
        parent_path = path.parent / parent
        parent_values, parent_problems = _read(parent_path, mentioned_by=path)
        problems += parent_problems
        if parent_values.get("extends") is not None:
            text = f"'{path}' extends this file, so it cannot extend another. Only one level is followed: write it out."
            problems.append(Problem(str(parent_path), "extends", text))
        layers.add(parent_values, str(parent_path))
    elif parent is not None:
        text = f"found {describe(parent)}, but the name of a recipe file, seen from this file, is required."
        problems.append(Problem(str(path), "extends", text))
    layers.add(values, str(path))
    for override in overrides:
        if override.partition("=")[0].strip() == "extends":
            text = "a file says what it extends. Give that file with --config, or write a small recipe that extends it."
            problems.append(Problem(COMMAND_LINE, "extends", text))
        elif problem := layers.override(override):
            problems.append(problem)
    return layers, problems


def _read(path: Path, *, mentioned_by: Path | None) -> tuple[dict[str, Any], list[Problem]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = _unreadable(path, error)
        return {}, [Problem(str(mentioned_by), "extends", reason) if mentioned_by else Problem(str(path), "", reason)]
    return parse_mapping(text, str(path))


def _unreadable(path: Path, error: OSError | UnicodeDecodeError) -> str:
    if isinstance(error, FileNotFoundError):
        hint = near_path(str(path))
        advice = f"Did you mean '{hint}'?" if hint else "Recipes lie in configs/."
        return f"the recipe '{path}' does not exist. {advice}"
    reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else (error.strerror or str(error))
    return f"the recipe '{path}' cannot be read: {reason}. Give a YAML file."
