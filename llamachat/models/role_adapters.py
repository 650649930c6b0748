"""Adapters of several roles on one trunk, by PEFT's layers but not by its switches."""

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import LlamaModel


def adapter_layers(trunk: "LlamaModel") -> list[Any]:
    """The projections of a trunk that hold adapters."""
    raise NotImplementedError


def switch(layers: list[Any], adapter: str | None) -> None:
    """Make this adapter the one that takes part in the forward pass; None: none does."""
    raise NotImplementedError
