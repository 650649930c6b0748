"""Which models our decoder computes exactly as transformers does; all others go through transformers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from llamachat.models.rope import rope_parameters
from llamachat.rollout.rotation import SUPPORTED
from llamachat.rollout.weights import base_layer, without_wrapper

if TYPE_CHECKING:
    from llamachat.models.loading import LanguageModel

PROJECTIONS = ("Linear", "Linear4bit")


def unsupported(model: "LanguageModel") -> str | None:
    """What the model has that our decoder does not compute; None where there is nothing."""
    return next(_reasons(model), None)


def _reasons(model: "LanguageModel") -> Iterator[str]:
    trunk = without_wrapper(model)
    config = trunk.config
    if config.model_type != "llama" or config.hidden_act != "silu":
        yield f"the architecture '{config.model_type}' with '{config.hidden_act}'"
        return
    rope = rope_parameters(config)
    if rope["rope_type"] not in SUPPORTED or rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"rotary positions of type '{rope['rope_type']}'"
    for name, adapter in getattr(model, "peft_config", {}).items():
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        if kind != "LORA":
            yield f"the adapter '{name}' of type {kind}"
    places = {str(weight.device) for weight in trunk.parameters()}
    if len(places) > 1:
        yield f"weights on {len(places)} devices"
    for name, module in _linear_parts(trunk):
        yield from (f"{reason} at {name}" for reason in _odd(module))


def _linear_parts(trunk: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What multiplies a weight: the projections, embeddings and head, with what is wrapped around them."""
    for name, module in trunk.named_modules():
        if name.endswith(("_proj", "embed_tokens", "lm_head")):
            yield name, module


def _odd(module: Any) -> Iterator[str]:
    layer = base_layer(module)
    if type(layer).__name__ not in (*PROJECTIONS, "Embedding"):
        yield f"a {type(layer).__name__}"
    if layer is module:
        return
    if not hasattr(module, "lora_A") or len(getattr(module, "lora_embedding_A", ())):
        yield f"a {type(module).__name__} with an adapter"
        return
    for name in module.active_adapters:
        if name in module.lora_A and (module.use_dora.get(name) or module.lora_B[name].bias is not None):
            yield "an adapter with DoRA or a bias"
