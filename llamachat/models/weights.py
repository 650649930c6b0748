"""The weights of a model or model folder under the same names, for digests and dtypes."""

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from llamachat.errors import ArtifactError
from llamachat.models.files import check_safetensors, weight_files

COMPUTED = "rotary_emb.inv_freq"  # stored in old checkpoints; models compute it


def trunk_digest(
    trunk: nn.Module | Path, *, values_per_weight: int | None = None, dtype: torch.dtype | None = None
) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all weights except adapters; equal digests mean equal trunks.

    A model, with or without adapters, and its folder have equal digests. With `values_per_weight`, only that number of
    evenly spaced values of each weight is hashed: fast, and enough to distinguish two models. With `dtype`, the weights
    are hashed as loaded in it.
    """
    weights = folder_weights(trunk) if isinstance(trunk, Path) else module_weights(trunk)
    digest = sha256()
    for name, weight in sorted(weights, key=lambda item: item[0]):
        digest.update(f"{name} {dtype or weight.dtype} {tuple(weight.shape)}\n".encode())
        values = weight.detach().flatten()
        if values_per_weight is not None:
            values = values[:: max(1, values.numel() // values_per_weight)]
        digest.update(values.to(dtype or weight.dtype).cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def module_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights of the trunk by their names in a model folder, without adapters."""
    is_tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    for name, weight in model.state_dict().items():
        if ".lora_" in name or (is_tied and name.endswith("lm_head.weight")):
            continue
        yield name.removeprefix("base_model.model.").replace(".base_layer.", "."), weight


def folder_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights of a model folder, from one file or shards."""
    for file in weight_files(folder):
        for key, weight in file_weights(file):
            if not key.endswith(COMPUTED):
                yield key, weight


def file_weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Weights of one safetensors file, read one at a time."""
    from safetensors import safe_open

    if not file.is_file():
        raise ArtifactError(
            f"{file}: does not exist. The folder's weights are read from it. Make the artifact again, or give another."
        )
    check_safetensors(file)
    with safe_open(file, framework="pt") as weights:
        for key in weights.keys():  # noqa: SIM118  # not a mapping
            yield key, weights.get_tensor(key)


def language_head(folder: Path) -> Tensor:
    """The language-model head [V, D] of a model folder; the embedding if the head is tied."""
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            names = {"lm_head.weight", "model.embed_tokens.weight"} & set(weights.keys())
            tensors |= {name: weights.get_tensor(name) for name in names}
    return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
