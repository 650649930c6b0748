"""The 4-bit trunk of QLoRA (Dettmers et al. 2023, arXiv:2305.14314): NF4 with double quantisation, by bitsandbytes.

The projections of the layers are quantised while they load; embeddings, norms and the output head keep their dtype.
On a CPU with AVX512-bf16, bitsandbytes repacks the weights in place on the first evaluation
forward, and gradients after it are silently wrong: `close_cpu_trap` prevents that. A GPU packs the same weights
into other bytes than a CPU (its sums run in another order), so a policy is matched to its base by the weights that were
read, not by the packed ones.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from llamachat.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, LlamaConfig

BLOCK = 32  # what bitsandbytes' CPU kernels take rows in
_SOURCE = "llamachat_source_digest"


def quantization_config(compute: torch.dtype) -> "BitsAndBytesConfig":
    """What transformers quantises by when it loads; `compute` is the dtype of the products."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        # Named, since transformers would find the heads by a forward of its own.
        llm_int8_skip_modules=["lm_head", "score"],
    )


def check_shape(config: "LlamaConfig", *, where: str) -> None:
    """Refuses a model whose projections do not fall into whole blocks."""
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
    """Keeps every 4-bit layer from repacking its weights in place on an evaluation forward."""
    from bitsandbytes.nn import Linear4bit

    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert layers, "the model was loaded with a quantisation"
    for layer in layers:
        assert hasattr(layer, "support_avx512bf16_for_cpu"), "bitsandbytes has another switch for this now"
        layer.support_avx512bf16_for_cpu = False


def compute_dtype(model: nn.Module) -> torch.dtype | None:
    """The dtype that the products of a 4-bit model are computed in; None for a model that is not quantised."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return getattr(config, "bnb_4bit_compute_dtype", None)


def cast_adapter(model: nn.Module) -> None:
    """Gives an adapter on a 4-bit model the compute dtype: on packed weights PEFT makes it fp32, whatever it is asked for."""
    dtype = compute_dtype(model)
    if dtype is None:
        return
    for name, weight in model.named_parameters():
        if ".lora_" in name:
            weight.data = weight.data.to(dtype)


def quantization_details(compute: torch.dtype) -> dict[str, Any]:
    """What a manifest says of the trunk's quantisation."""
    return {"type": "nf4", "double": True, "compute": str(compute).removeprefix("torch.")}


def check_details(details: Mapping[str, Any], *, where: str) -> None:
    """Refuses a manifest whose trunk was quantised otherwise than here."""
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
    """The folder of a model that has been loaded, also where it was named by its hub name."""
    if Path(location).is_dir():
        return Path(location)
    from transformers.utils import cached_file

    config = cached_file(location, "config.json")
    assert config is not None, "it has been loaded from there"
    return Path(config).parent


def remember_source(model: nn.Module, digest: str) -> None:
    """Keeps, with the model, the digest of the weights that it was quantised from."""
    cast(Any, model).__dict__[_SOURCE] = digest


def source_digest(model: nn.Module) -> str | None:
    """What `remember_source` kept; None for a model that is not quantised."""
    return model.__dict__.get(_SOURCE)
