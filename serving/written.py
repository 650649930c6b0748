"""A record of a data file as a command writes it back."""

from collections.abc import Mapping
from typing import Any

from llamachat.chat_format.dialog import Dialog, as_dicts
from llamachat.data.records import Preference, Record, kind_of


def as_written(value: Any, record: Record) -> dict[str, Any]:
    """The record as it came where it is one of ours; of a foreign form, what was read of it."""
    if kind_of(value) is not None and any(isinstance(value.get(key), list) for key in ("prompt", "messages")):
        return dict(value)
    if isinstance(record, Dialog):
        return {"messages": as_dicts(record.messages), **_known({"is_safe": record.is_safe})}
    if isinstance(record, Preference):
        told = {name: getattr(record, name) for name in ("rating", "chosen_is_safe", "rejected_is_safe")}
        answers = {"chosen": as_dicts([record.chosen]), "rejected": as_dicts([record.rejected])}
        return {"prompt": as_dicts(record.prompt), **answers, **_known(told)}
    return {"prompt": as_dicts(record.messages)}


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
