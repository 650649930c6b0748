"""Policies to export, for the tests of exporting and of the model card."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llamachat.chat_format import ChatFormat
from llamachat.models.loading import attach_adapter, load_base
from llamachat.runs.artifacts import Artifact
from tests.tiny_llama import LORA, base_section, move_adapter, publish_policy, tiny_llama


def lora_policy(folder: Path, chat_format: ChatFormat, *, dtype: torch.dtype = torch.float32, **base: Any) -> Artifact:
    """A published LoRA policy whose adapter matters, on a base in shards."""
    if not (folder / "base").exists():
        tiny_llama(dtype=dtype, initializer_range=0.1, max_position_embeddings=256).save_pretrained(
            folder / "base", max_shard_size="100KB"
        )
    section = base_section(folder / "base", **{"dtype": str(dtype).removeprefix("torch."), **base})
    model = attach_adapter(load_base(section), LORA, seed=0)
    move_adapter(model)
    with torch.no_grad():  # as large as training makes it: with more, rounding alone changes a token by a nat in bf16
        for name, weight in model.named_parameters():
            if ".lora_B" in name:
                weight.mul_(0.2)
    step = folder / "runs/one/sft"
    return publish_policy(step, model, chat_format, base=str(folder / "base"), max_tokens=160, system="Be brief.")


def full_policy(folder: Path, chat_format: ChatFormat, **details: Any) -> Artifact:
    model = tiny_llama(max_position_embeddings=256)
    return publish_policy(folder / "runs/one/sft", model, chat_format, base="assets/base", **details)


def plain(folder: Path | str, **settings: Any) -> Any:
    """The model as transformers alone loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def note_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "export.json").read_text())
