"""Merge a LoRA adapter into the weights of a model folder, with one shard in memory at a time.

Reads `model.safetensors` or the shards named in its index, and an adapter's `adapter_model.safetensors`; writes the
same names in the training dtype. An adapter trained on a 4-bit base is merged into the dequantized weights, not the
original ones.
"""

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llamachat.errors import ArtifactError
from llamachat.models.loading import ADAPTER_WEIGHTS, SEVEN_PROJECTIONS, Policy, free_bytes
from llamachat.models.reward_model import HEAD, HEAD_WEIGHT
from llamachat.models.weights import COMPUTED, file_weights, weight_files
from llamachat.rollout.weights import base_layer, plain_weight
from llamachat.runs.atomic import StorageError

log = logging.getLogger(__name__)

LANGUAGE_HEAD = "lm_head.weight"
NF4_BLOCK = 64  # values per scale in transformers' 4-bit layers
_FORMS_NOT_MERGED = ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter, which adds `scale` times B A to each adapted weight (Hu et al., arXiv:2106.09685)."""

    factors: Mapping[str, tuple[Tensor, Tensor]]  # weight's name -> A [rank, in], B [out, rank]
    scale: float
    head: Mapping[str, Tensor] = field(default_factory=dict)  # of a reward model; it is not in the base


@dataclass(frozen=True, slots=True)
class _Source:
    """The location of a weight, and its size in the output."""

    name: str
    file: Path
    num_bytes: int


def read_adapter(folder: Path) -> Adapter:
    """Read the adapter of a PEFT folder; raises for variants of LoRA other than plain B A."""
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    weights = dict(file_weights(folder / ADAPTER_WEIGHTS))
    names = [key.removesuffix(".lora_A.weight") for key in weights if key.endswith(".lora_A.weight")]
    pairs = {name: (weights.get(f"{name}.lora_A.weight"), weights.get(f"{name}.lora_B.weight")) for name in names}
    factors = {
        f"{name.removeprefix('base_model.model.')}.weight": (a_RI, b_OR)
        for name, (a_RI, b_OR) in pairs.items()
        if a_RI is not None and b_OR is not None
    }
    is_scoring = config.get("task_type") == "SEQ_CLS" and config.get("modules_to_save") == [HEAD]
    key = f"base_model.model.{HEAD_WEIGHT}"
    head = {HEAD_WEIGHT: weights[key]} if is_scoring and key in weights else {}
    unusual = [key for key in _FORMS_NOT_MERGED if config.get(key) and not (head and key == "modules_to_save")]
    if unusual or 2 * len(factors) + len(head) != len(weights):
        raise ArtifactError(
            f"{folder}: the adapter is more than plain LoRA ({', '.join(unusual) or 'other weights than A and B'}). "
            "Merging adds alpha / rank * B A to a weight, and this one needs more. Export it with --format adapter."
        )
    return Adapter(factors, config["lora_alpha"] / config["r"], head)


def merged(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, *, scale: float) -> Tensor:
    """The weight with its adapter added in fp32 and rounded once to the weight's dtype."""
    return (weight_OI.float() + scale * (b_OR.float() @ a_RI.float())).to(weight_OI.dtype)


def through_nf4(weight_OI: Tensor, *, device: str = "cpu") -> Tensor:
    """A weight quantized to NF4 with double quantization and dequantized again, in the weight's dtype.

    Dettmers et al., arXiv:2305.14314, section 3; assumes that the layer's compute dtype is the weight's.
    """
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight_OI.contiguous().to(device), quant_type="nf4", compress_statistics=True, blocksize=NF4_BLOCK
    )
    return dequantize_4bit(packed, state).to(device="cpu", dtype=weight_OI.dtype)


def write_weights(
    source: Path,
    out: Path,
    *,
    adapter: Adapter | None,
    dtype: torch.dtype,
    is_nf4: bool,
    shard_bytes: int,
    device: str = "cpu",
) -> int:
    """Write the weights of the folder `source` to `out` with the adapter merged; return the number of bytes written.

    `is_nf4`: the adapter was trained on the seven projections in NF4. Only multiple files get an index. The head of a
    reward model replaces the base's language-model head.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    head = adapter.head if adapter is not None else {}
    left_out = (LANGUAGE_HEAD,) if head else ()
    shards = _plan(source, dtype=dtype, shard_bytes=shard_bytes, left_out=left_out)
    total = sum(weight.num_bytes for shard in shards for weight in shard)
    _check_adapter(adapter, shards, source)
    free = shutil.disk_usage(out).free
    if total > free:
        raise StorageError(
            f"{out.parent}: the merged weights take {total / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on this "
            "disk. They are written whole or not at all. Free space, or name a folder on another disk with --out."
        )
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for entry in shard:
            with safe_open(entry.file, framework="pt") as weights:
                weight: Tensor = weights.get_tensor(entry.name).to(dtype)
            if is_nf4 and entry.name.split(".")[-2] in SEVEN_PROJECTIONS:
                weight = through_nf4(weight, device=device)
            if adapter is not None and entry.name in adapter.factors:
                weight = merged(weight, *adapter.factors[entry.name], scale=adapter.scale)
            tensors[entry.name] = weight.contiguous()
        if number == len(shards):
            tensors |= {name: weight.to(dtype) for name, weight in head.items()}
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        if len(shards) > 1:
            log.info("wrote %s", file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _plan(source: Path, *, dtype: torch.dtype, shard_bytes: int, left_out: Collection[str]) -> list[list[_Source]]:
    """Assign weights, in stored order, to output shards, from the headers of the input files."""
    from safetensors import safe_open

    shards: list[list[_Source]] = [[]]
    filled = 0
    for file in weight_files(source):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  # not a mapping
                if name.endswith(COMPUTED) or name in left_out:
                    continue
                num_bytes = torch.Size(weights.get_slice(name).get_shape()).numel() * dtype.itemsize
                if shards[-1] and filled + num_bytes > shard_bytes:
                    shards.append([])
                    filled = 0
                shards[-1].append(_Source(name, file, num_bytes))
                filled += num_bytes
    return shards


def _check_adapter(adapter: Adapter | None, shards: list[list[_Source]], source: Path) -> None:
    names = {weight.name for shard in shards for weight in shard}
    lacking = sorted(adapter.factors.keys() - names) if adapter is not None else []
    if lacking:
        raise ArtifactError(
            f"{source}: the adapter sits on {len(lacking)} weights that are not there ({lacking[0]}, ...). It would be "
            "left out of the merged model in part. Put the base back that the adapter was trained on."
        )


def as_exported(policy: Policy) -> Policy:
    """The policy with its adapter merged and 4-bit weights dequantized; unchanged if a GPU has no room for that."""
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if not isinstance(policy.model, PeftModel):
        return policy
    model: Any = policy.model.get_base_model()
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (LoraLayer, Linear4bit)) and not name.endswith(".base_layer")
    }
    dtype = model.get_input_embeddings().weight.dtype
    needed = sum(layer.in_features * layer.out_features for layer in layers.values()) * dtype.itemsize
    if model.device.type == "cuda" and needed >= 0.8 * free_bytes(model.device):
        log.info("%s: the adapter stays separate from the 4-bit weights, since the merged ones do not fit", policy.name)
        return policy
    for name, layer in layers.items():
        weight_OI = plain_weight(base_layer(cast(nn.Module, layer))).to(dtype)
        if isinstance(layer, LoraLayer):
            (key,) = layer.active_adapters
            a_RI, b_OR = cast(Any, layer.lora_A[key]).weight, cast(Any, layer.lora_B[key]).weight
            weight_OI = merged(weight_OI, a_RI.detach(), b_OR.detach(), scale=layer.scaling[key])
        plain = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device="meta")
        plain.weight = nn.Parameter(weight_OI, requires_grad=False)
        model.set_submodule(name, plain)
    return replace(policy, model=model.eval())
