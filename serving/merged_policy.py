"""A policy as its export would be: the adapter merged into plain weights, in memory.

Chat answers from it, so that what a person tries is what `llamachat export` writes, to the bit, and each token costs a
third less than with an adapter beside the weights. Training, sampling and scoring keep the adapter apart.
"""

import logging
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from llamachat.models.loading import Policy
from serving.merging import merged

log = logging.getLogger(__name__)


def as_exported(policy: Policy) -> Policy:
    """The policy with its adapter merged and 4-bit weights unpacked; as it is where a GPU has no room for that."""
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(policy.model, PeftModel):
        return policy
    model: Any = policy.model.get_base_model()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, (LoraLayer, Linear4bit))}
    layers = {name: layer for name, layer in layers.items() if not name.endswith(".base_layer")}
    dtype = model.get_input_embeddings().weight.dtype
    if not _has_room(model.device, layers, dtype):
        log.info("%s: the adapter stays beside the 4-bit weights, since the merged ones do not fit", policy.name)
        return policy
    for name, layer in layers.items():
        weight_OI = _plain_weight(layer.get_base_layer() if isinstance(layer, LoraLayer) else layer, dtype)
        if isinstance(layer, LoraLayer):
            (key,) = layer.active_adapters
            a_RI, b_OR = cast(Any, layer.lora_A[key]).weight, cast(Any, layer.lora_B[key]).weight
            weight_OI = merged(weight_OI, a_RI.detach(), b_OR.detach(), scale=layer.scaling[key])
        plain = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight_OI, requires_grad=False)
        model.set_submodule(name, plain)
    return replace(policy, model=model.eval())


def _plain_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return layer.weight.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, state).to(dtype)


def _has_room(device: torch.device, layers: dict[str, Any], dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return True
    needed = sum(layer.in_features * layer.out_features for layer in layers.values()) * dtype.itemsize
    return needed < 0.8 * torch.cuda.mem_get_info(device)[0]
