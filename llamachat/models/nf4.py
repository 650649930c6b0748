"""The 4-bit trunk of QLoRA (Dettmers et al. 2023, arXiv:2305.14314): NF4 with double quantization, by bitsandbytes.

The layers' projections are quantized while loading; embeddings, norms and the output head keep their dtype.
On a CPU with AVX512-bf16, bitsandbytes repacks the weights in place in the first evaluation forward pass, and all later
gradients are silently wrong; `close_cpu_trap` prevents that. GPUs and CPUs pack the same weights differently (the
order of summation differs), so a policy is matched to its base by the original weights, not the packed ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from llamachat.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, LlamaConfig

BLOCK = 32  # the row multiple required by bitsandbytes' CPU kernels
_SOURCE = "llamachat_source_digest"


def quantization_config(compute: torch.dtype) -> "BitsAndBytesConfig":
    """The quantization config for transformers; `compute` is the dtype of the products."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        # Listed explicitly: otherwise transformers would find the heads with an extra forward pass.
        llm_int8_skip_modules=["lm_head", "score"],
    )


def check_shape(config: "LlamaConfig", *, where: str) -> None:
    """Reject a model whose projections are not divisible into whole blocks."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "the width of all heads": config.num_attention_heads * head,
        "the width of all key-value heads": (config.num_key_value_heads or config.num_attention_heads) * head,
    }
    odd = [f"{name} {size}" for name, size in sizes.items() if size % BLOCK]
    if odd:
        raise ConfigError(
            f"{where}: {', '.join(odd)} cannot be divided by {BLOCK}. A 4-bit base (qlora) is computed in blocks of "
            "that many weights. Set tuning.method to lora, or take another base."
        )


def close_cpu_trap(model: nn.Module) -> None:
    """Keep every 4-bit layer from repacking its weights in place in evaluation mode."""
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers, "the model was loaded with a quantisation"
    for layer in layers:
        assert hasattr(layer, "support_avx512bf16_for_cpu"), "bitsandbytes has another switch for this now"
        layer.support_avx512bf16_for_cpu = False


def compute_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype of a 4-bit model's products; None for a model that is not quantized."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return getattr(config, "bnb_4bit_compute_dtype", None)


def cast_adapter(model: nn.Module) -> None:
    """Cast an adapter on a 4-bit model to the compute dtype: on packed weights, PEFT always creates it in fp32."""
    dtype = compute_dtype(model)
    if dtype is None:
        return
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.to(dtype)


def quantization_details(compute: torch.dtype) -> dict[str, Any]:
    """The manifest's details about the trunk's quantization."""
    return {"type": "nf4", "double": True, "compute": str(compute).removeprefix("torch.")}


def check_details(details: Mapping[str, Any], *, where: str) -> None:
    """Reject a manifest whose trunk was quantized differently."""
    quantization = details.get("quantization")
    known = (
        isinstance(quantization, Mapping) and quantization.get("type") == "nf4" and quantization.get("double") is True
    )
    if not known:
        raise ArtifactError(
            f"{where}: details.quantization is {quantization!r}. A qlora policy answers on the base as it was trained: "
            "{type: nf4, double: true}. Make the artifact again with this version."
        )


def model_folder(location: str) -> Path:
    """The folder of a loaded model, whether it was given as a folder or a Hub name."""
    if Path(location).is_dir():
        return Path(location)
    from transformers.utils import cached_file

    config = cached_file(location, "config.json")
    assert config is not None, "it has been loaded from there"
    return Path(config).parent


def remember_source(model: nn.Module, digest: str) -> None:
    """Store on the model the digest of the weights that it was quantized from."""
    cast(Any, model).__dict__[_SOURCE] = digest


def source_digest(model: nn.Module) -> str | None:
    """The digest stored by `remember_source`; None for a model that is not quantized."""
    return model.__dict__.get(_SOURCE)
