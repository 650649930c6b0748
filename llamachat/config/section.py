"""The base class of every configuration section, and the problems of values that are to become one.

A section is frozen, and an unknown key is an error. An identity key decides what a step makes and is part of
its fingerprint. An operational key (micro-batch sizes, intervals, tracking, folders) only decides how, and may change
between a kill and the next start. A problem names its place and the fix: `file: section.key: problem, and fix`.
"""

import difflib
import json
import os
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, Union, get_args, get_origin, runtime_checkable

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, to_jsonable_python

from llamachat.errors import ConfigError
from llamachat.tables import plural


class Section(BaseModel):
    """A frozen group of settings, each with a description."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=False)

    unknown_keys: ClassVar[Mapping[str, str]] = {}
    """The message for an unknown key where the nearest known key would not help: key -> text."""
    key_word: ClassVar[str] = "key"
    """What a key represents, as the message about an unknown key calls it."""


def operational(default: Any = ..., **field_arguments: Any) -> Any:
    """A field that is not part of a step's fingerprint; takes the arguments of pydantic's `Field`."""
    return Field(default, json_schema_extra={"operational": True}, **field_arguments)


def unless_null(**field_arguments: Any) -> Any:
    """A field that is null if unset, and then not part of a fingerprint: steps finished before it existed stay
    valid."""
    return Field(default=None, json_schema_extra={"unless_null": True}, **field_arguments)


def _is_marked(field: FieldInfo, mark: str) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and extra.get(mark) is True


def identity(section: Section) -> dict[str, Any]:
    """The section as plain JSON values, without operational fields at any depth."""
    plain = section.model_dump(mode="json")
    return {
        name: _identity_of(getattr(section, name), plain[name])
        for name, field in type(section).model_fields.items()
        if not _is_marked(field, "operational") and not (_is_marked(field, "unless_null") and plain[name] is None)
    }


def _identity_of(value: object, plain: Any) -> Any:
    if isinstance(value, Section):
        return identity(value)
    if isinstance(value, (tuple, list)):
        return [_identity_of(item, plain_item) for item, plain_item in zip(value, plain, strict=True)]
    return plain


# -- problems


Key = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One problem of a recipe: its file (or "command line"), the dotted key, and the text."""

    source: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.source}: {self.key}: {self.text}" if self.key else f"{self.source}: {self.text}"


@runtime_checkable
class Check(Protocol):
    """A mark in a field's `Annotated[...]` that checks the raw value before the types do, and even if they fail."""

    def problems(self, value: object) -> Iterable[tuple[Key, str]]:
        """Pairs of a key below the field (often empty) and a text."""
        ...


@dataclass(frozen=True, slots=True)
class TextCheck:
    """A check of text, by a function that returns the problem, or None."""

    fault: Callable[[str], str | None]

    def problems(self, value: object) -> Iterator[tuple[Key, str]]:
        try:
            text = self.fault(from_home(value)) if isinstance(value, str) else None
        except OSError as error:  # a name longer than the file system allows
            text = f"it cannot be opened ({error.strerror or error}). Choose another"
        if text:
            yield (), text


def from_home(text: str) -> str:
    """The path with `~` expanded to the home folder; unchanged if no home folder is known."""
    if not text.startswith("~"):
        return text
    try:
        return str(Path(text).expanduser())
    except RuntimeError:
        return text


NO_TEXT = re.compile("[\0\ud800-\udfff]")  # characters that UTF-8 text and paths cannot contain


def _usable_path(text: str) -> str:
    """A path as written in a recipe, with `~` expanded."""
    path = from_home(text)
    if path.startswith("~") and not os.path.lexists(path):
        raise ValueError(f"no home folder is known for '{path.partition('/')[0]}'. Write the full path")
    if NO_TEXT.search(path):
        raise ValueError("a path must be UTF-8 text without NUL. Rename the file or folder")
    return path


LocalPath = Annotated[str, AfterValidator(_usable_path)]
"""A local path in a recipe; `~` is the home folder."""


def dotted(key: Key) -> str:
    """The key as it is written on the command line."""
    return ".".join(str(part) for part in key)


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The name most similar to another one, if any is similar enough."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)), None)


def raise_all(problems: Sequence[ConfigProblem]) -> None:
    """Raise one ConfigError that reports every problem; do nothing if there is none."""
    if not problems:
        return
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    count = plural(len(lines), "problem")
    raise ConfigError("\n".join([f"The configuration has {count}:", *(f"  {line}" for line in lines)]))


def section_problems(
    schema: type[Section],
    values: Mapping[str, Any],
    *,
    source: Callable[[Key], str],
    at: Key = (),
    root: type[Section] | None = None,
) -> list[ConfigProblem]:
    """Everything that prevents the values from being the section: types, ranges, unknown and missing keys, missing
    files.

    `at` is the section's place in the recipe, `source` gives the file that a key came from, and `root` is the whole
    recipe's schema, whose other sections are searched for a misplaced key.
    """
    problems = [
        ConfigProblem(source(at + key), dotted(at + key), text) for key, text in _type_problems(schema, values, root)
    ]
    for key, field, value in _fields(schema, values):
        for check in (mark for mark in field.metadata if isinstance(mark, Check)):
            for below, text in check.problems(value):
                full = at + key + below
                problems.append(ConfigProblem(source(full), dotted(full), text))
    return problems


def _type_problems(
    schema: type[Section], values: Mapping[str, Any], root: type[Section] | None
) -> Iterator[tuple[Key, str]]:
    try:
        # Strict, through JSON: a list may become a tuple, but "5" never becomes 5, nor 1 true.
        schema.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        grouped: dict[Key, list[ErrorDetails]] = {}
        for details in error.errors(include_url=False):
            if details["type"] == "too_short" and len(details["input"]) >= details.get("ctx", {})["min_length"]:
                continue  # invalid items are not counted, and have their own problems
            key = tuple(part for part, *_ in _path(schema, details["loc"]))
            grouped.setdefault(key, []).append(details)
        for key, group in grouped.items():
            yield from _explain(schema, key, group, values, root)


def _explain(
    schema: type[Section], key: Key, group: list[ErrorDetails], values: Mapping[str, Any], root: type[Section] | None
) -> Iterator[tuple[Key, str]]:
    kinds = {details["type"] for details in group}
    if kinds == {"missing"}:
        for missing, field in _required_leaves(schema, key):
            where = f"Write it in the recipe, or pass {dotted(missing)}=VALUE on the command line"
            yield missing, f"missing, but required. {_meaning(field)} {where}."
    elif kinds == {"extra_forbidden"}:
        yield key, _unknown_key(schema, key, root or schema)
    elif "value_error" in kinds:
        reason = next(str(d["ctx"]["error"]) for d in group if d["type"] == "value_error" and "ctx" in d)
        yield key, f"{reason}. {_meaning(_owner_and_field(schema, key)[1])}".rstrip()
    else:
        value = _value(values, key)
        forms = [_REQUIRED.get(d["type"], "").format(**d.get("ctx", {})) or d["msg"] for d in group]
        required = " or ".join(dict.fromkeys(forms))
        choices = [
            c for d in group if d["type"] == "literal_error" for c in d.get("ctx", {})["expected"].split("'")[1::2]
        ]
        near = nearest(value, choices) if isinstance(value, str) else None
        hint = f" Did you mean '{near}'?" if near else ""
        yield (
            key,
            f"found {describe(value)}, but {required} is required.{hint} {_meaning(_owner_and_field(schema, key)[1])}".rstrip(),
        )


def describe(value: object) -> str:
    """A description of a value, for "found ..."."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        shown = value if len(value) <= 60 else value[:57] + "..."
        return f"the text {shown!r}"
    if isinstance(value, (int, float)):
        return f"the number {value!r}"
    if isinstance(value, Mapping):
        return f"a mapping with the keys {', '.join(map(str, value))}" if value else "an empty mapping"
    if isinstance(value, Sequence):
        return f"a list of length {len(value)}" if value else "an empty list"
    return repr(value)


_REQUIRED = {
    "float_type": "a number",
    "float_parsing": "a number",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "too_short": "a list with at least {min_length} items",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping of keys",
    "finite_number": "a finite number",
    "greater_than": "a number above {gt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than": "a number below {lt:g}",
    "less_than_equal": "a number of at most {le:g}",
    "multiple_of": "a multiple of {multiple_of}",
    "string_too_short": "text of at least {min_length} characters",
    "literal_error": "{expected}",
}


def _meaning(field: FieldInfo | None) -> str:
    if field is None or not field.description:
        return ""
    text = field.description if field.description.endswith(".") else field.description + "."
    if field.is_required() or field.default_factory is not None or isinstance(field.default, Section):
        return text
    return f"{text} Default: {json.dumps(to_jsonable_python(field.default, fallback=str))}."


def _unknown_key(schema: type[Section], key: Key, root: type[Section]) -> str:
    name = str(key[-1])
    owner, _ = _owner_and_field(schema, key)
    if name in owner.unknown_keys:
        return owner.unknown_keys[name]
    near = nearest(name, owner.model_fields)
    if near:
        return f"unknown {owner.key_word}. Did you mean '{near}'?"
    elsewhere = [path for path in all_keys(root) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"unknown {owner.key_word}. Did you mean '{elsewhere[0]}'?"
    return f"unknown {owner.key_word}. Known here: {', '.join(owner.model_fields)}."


def all_keys(schema: type[Section], at: str = "") -> Iterator[str]:
    """Dotted key of every field that is not itself a section, without lists of sections."""
    for name, field in schema.model_fields.items():
        below = _section_of(field.annotation)
        if below is not None and get_origin(field.annotation) is not tuple:
            yield from all_keys(below, f"{at}{name}.")
        else:
            yield f"{at}{name}"


def _fields(schema: type[Section], values: object, at: Key = ()) -> Iterator[tuple[Key, FieldInfo, Any]]:
    """Every known field in the values, at any depth, whatever their types."""
    if not isinstance(values, Mapping):
        return
    for name, field in schema.model_fields.items():
        if name not in values:
            continue
        value, key = values[name], (*at, name)
        yield key, field, value
        below = _section_of(field.annotation)
        if below is not None:
            for index, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
                yield from _fields(below, item, key if index is None else (*key, index))


def _path(schema: type[Section], loc: Sequence[int | str]) -> Iterator[tuple[int | str, Any, FieldInfo | None]]:
    """Each part of a pydantic location that names a field or an item, with its section and field; union tags are
    skipped."""
    annotation: Any = schema
    owner, field = schema, None
    for part in loc:
        annotation = _form(annotation)
        origin = get_origin(annotation)
        if isinstance(annotation, type) and issubclass(annotation, Section):
            owner, field = annotation, annotation.model_fields.get(str(part))
            annotation = field and _without_none(field.annotation)
        elif origin is dict or (origin in (tuple, list) and isinstance(part, int)):
            field = None if origin is dict else field
            annotation = _without_none(get_args(annotation)[1 if origin is dict else 0])
        else:
            return
        yield part, owner, field


def _without_none(annotation: Any) -> Any:
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return members[0] if len(members) == 1 else annotation
    return annotation


def _section_of(annotation: Any) -> type[Section] | None:
    """The section that a field is, or that a field is a list of."""
    annotation = _without_none(annotation)
    if get_origin(annotation) in (tuple, list):
        annotation = get_args(annotation)[0]
    if get_origin(annotation) is Literal or not isinstance(annotation, type):
        return None
    form = _form(annotation)
    return form if issubclass(form, Section) else None


def _form(annotation: Any) -> Any:
    """The type against which a model's values are checked; a model whose values have several spellings defines it in
    `form`."""
    return getattr(annotation, "form", annotation)


def _owner_and_field(schema: type[Section], key: Key) -> tuple[type[Section], FieldInfo | None]:
    _, owner, field = list(_path(schema, key))[-1] if key else ((), schema, None)
    return owner, field


def _required_leaves(schema: type[Section], key: Key) -> Iterator[tuple[Key, FieldInfo | None]]:
    """The missing key, or if a whole section is missing, the required keys in it."""
    _, field = _owner_and_field(schema, key)
    below = _section_of(field.annotation) if field else None
    if below is None or field is None or get_origin(field.annotation) in (tuple, list):
        yield key, field
        return
    for name, inner in below.model_fields.items():
        if inner.is_required():
            yield from _required_leaves(schema, (*key, name))


def _value(values: Any, key: Key) -> object:
    for part in key:
        values = values[part]
    return values
