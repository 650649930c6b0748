"""Adapters of several roles on one trunk: PEFT's layers, but not its switches.

`set_adapter` makes the named adapter trainable and freezes all others, and leaving `disable_adapter()` does it again
(https://github.com/huggingface/peft/issues/3447). So a layer is told here which of its adapters takes part, by the two
fields that PEFT's own switches write, and `requires_grad` is left as it is.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn

from llamachat.models import nf4
from llamachat.models.loading import ADAPTER_WEIGHTS, ONLY_ADAPTER
from llamachat.models.placement import gpus
from llamachat.models.weights import file_weights

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import LlamaModel

FILE_PREFIX = "base_model.model."  # of every name in PEFT's files
TRUNK_PREFIX = f"{FILE_PREFIX}model."


def adapter_layers(trunk: "LlamaModel") -> list[Any]:
    """The projections of a trunk that hold adapters."""
    from peft.tuners.lora import LoraLayer

    layers = [module for module in trunk.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        assert hasattr(layer, "_active_adapter") and hasattr(layer, "_disable_adapters"), "PEFT has other switches now"
    return layers


def switch(layers: Sequence[Any], adapter: str | None) -> None:
    """Make this adapter the one that takes part in the forward pass; None: none does."""
    for layer in layers:
        layer._disable_adapters = adapter is None
        if adapter is not None:
            layer._active_adapter = [adapter]


def add_adapter(root: nn.Module, name: str, config: "LoraConfig", *, seed: int) -> None:
    """A new adapter of this shape on the projections of a model, which adds nothing yet."""
    from peft import inject_adapter_in_model

    config = deepcopy(config)
    config.modules_to_save = None  # heads are kept by the bank
    with torch.random.fork_rng(devices=gpus()), catch_warnings():
        simplefilter("ignore", UserWarning)  # that there is another adapter: that is what is wanted
        torch.manual_seed(seed)
        inject_adapter_in_model(config, root, adapter_name=name)
    if nf4.compute_dtype(root):
        nf4.cast_adapter(root)


def shape_in(folder: Path) -> "LoraConfig":
    """The shape of the adapter in a folder."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    assert isinstance(config, LoraConfig)
    return config


def shape_of(model: "PeftModel") -> "LoraConfig":
    """The shape of the policy's adapter."""
    from peft import LoraConfig

    config = model.peft_config[ONLY_ADAPTER]
    assert isinstance(config, LoraConfig)
    return config


def adapter_weights(trunk: "LlamaModel", adapter: str) -> dict[str, nn.Parameter]:
    """An adapter's weights by their names without the adapter's own: two adapters of one shape have the same."""
    mark = f".{adapter}."
    named = trunk.named_parameters()
    return {name.replace(mark, "."): weight for name, weight in named if ".lora_" in name and mark in name}


def weights_in(folder: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The adapter's weights in a folder by the names of `adapter_weights`, and what was trained beside it."""
    adapter: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, weight in file_weights(folder / ADAPTER_WEIGHTS):
        if ".lora_" in name:
            adapter[name.removeprefix(TRUNK_PREFIX)] = weight
        else:
            others[name.removeprefix(FILE_PREFIX)] = weight
    return adapter, others


@torch.no_grad()
def fill(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Put these values into weights of the same names, in place and in the weights' dtype."""
    assert weights.keys() == values.keys(), "an adapter's shape is read from where its values are"
    for name, weight in weights.items():
        weight.copy_(values[name])
