"""Model folders of any size that take no disk: safetensors files whose weights are holes, read as zeros."""

import json
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.memory import write_tokenizer_model
from llamachat.memory.estimates import Shape

LARGEST_FILE = 4 * 2**30  # one mapping may not be larger than the machine's memory


def write_sparse_models(folder: Path, shape: Shape, *, positions: int = 4096) -> Path:
    """A base and a reward model of the shape in bf16, each with a tokenizer of as many ids."""
    config = {
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.is_tied,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    heads = {
        "base": ("lm_head.weight", shape.vocabulary, {"architectures": ["LlamaForCausalLM"]}),
        "reward": ("score.weight", 1, {"architectures": ["LlamaForSequenceClassification"], **labels}),
    }
    for name, (head, outputs, more) in heads.items():
        place = folder / name
        place.mkdir(parents=True)
        weights = dict(_trunk(shape))
        if name == "reward" or not shape.is_tied:
            weights[head] = (outputs, shape.hidden_size)
        _write_weights(place, weights)
        (place / "config.json").write_text(json.dumps(config | more))
        write_tokenizer_model(place / "tokenizer.model", shape.vocabulary)
    return folder


def _trunk(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and sizes of the weights below the head."""
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden_size)
    for layer in range(shape.layers):
        for name, (inputs, outputs) in shape.projections.items():
            part = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            yield f"model.layers.{layer}.{part}.{name}.weight", (outputs, inputs)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (shape.hidden_size,)
    yield "model.norm.weight", (shape.hidden_size,)


def _write_weights(folder: Path, weights: dict[str, tuple[int, ...]]) -> None:
    files: list[dict[str, Any]] = [{}]
    end = 0
    for name, sizes in weights.items():
        size = 2 * prod(sizes)
        if end + size > LARGEST_FILE:
            files.append({})
            end = 0
        files[-1][name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [end, end + size]}
        end += size
    names = [f"model-{number:05}-of-{len(files):05}.safetensors" for number in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    for file_name, header in zip(names, files, strict=True):
        text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file_name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + max(weight["data_offsets"][1] for weight in header.values()))
    if len(files) > 1:
        places = {name: file_name for file_name, header in zip(names, files, strict=True) for name in header}
        total = sum(2 * prod(sizes) for sizes in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
