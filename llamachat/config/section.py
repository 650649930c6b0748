"""The parent of every configuration section: frozen, unknown keys are errors, each key is identity or operational.

An identity key decides what a step makes and is part of its fingerprint. An operational key (micro-batch sizes,
cadences, tracking, folders) decides only how, and may change between a kill and the next start.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo


class Section(BaseModel):
    """A frozen group of settings with a description for each."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=False)

    unknown_keys: ClassVar[Mapping[str, str]] = {}
    """What to say about a key that is unknown here, where the nearest known key would not help: key -> text."""


def operational(default: Any = ..., **field_arguments: Any) -> Any:
    """A field that is no part of a step's fingerprint; takes what pydantic's `Field` takes."""
    return Field(default, json_schema_extra={"operational": True}, **field_arguments)


def unless_null(**field_arguments: Any) -> Any:
    """A field that is null where it is not set, and then no part of a fingerprint: finished steps stay done without it."""
    return Field(default=None, json_schema_extra={"unless_null": True}, **field_arguments)


def is_operational(field: FieldInfo) -> bool:
    """Whether a field was made by `operational`."""
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and extra.get("operational") is True


def identity(section: Section) -> dict[str, Any]:
    """The section as plain JSON values, without operational fields at any depth."""
    plain = section.model_dump(mode="json")
    return {
        name: _identity_of(getattr(section, name), plain[name])
        for name, field in type(section).model_fields.items()
        if not is_operational(field) and not (_is_unless_null(field) and plain[name] is None)
    }


def _is_unless_null(field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    return isinstance(extra, Mapping) and extra.get("unless_null") is True


def _identity_of(value: object, plain: Any) -> Any:
    if isinstance(value, Section):
        return identity(value)
    if isinstance(value, (tuple, list)):
        return [_identity_of(item, plain_item) for item, plain_item in zip(value, plain, strict=True)]
    return plain
