"""The planner's arithmetic against real models on the meta device, which hold shapes and no numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from llamachat.config.gpus import Gpu, parse_gpu
from llamachat.config.sections import Tuning
from llamachat.memory.estimates import KNOWN_BASES, NF4_BYTES, Setup, Shape, read_shape, shape_of, training_memory
from llamachat.models.loading import SEVEN_PROJECTIONS
from tests.tiny_llama import base_section

# hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
SHAPES = {
    "tiny": Shape(64, 128, 2, 4, 2, 420),
    "tied, one key-value head": Shape(96, 200, 3, 6, 1, 500, is_tied=True),
    "wide heads": Shape(96, 200, 3, 6, 2, 500, head_size=32),
    **{name: known.shape for name, known in KNOWN_BASES.items()},
}
TINYLLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
# As their publishers count them: embeddings and head included.
PUBLISHED = {"Llama-2-7b-": 6_738_415_616, "Llama-2-13b-": 13_015_864_320, "Llama-2-70b-": 68_976_648_192}
PUBLISHED["TinyLlama-1.1B"] = 1_100_048_384
TINY = SHAPES["tiny"]


def config_of(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.is_tied,
        head_dim=shape.head_size or None,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_real_model(name: str):
    shape = SHAPES[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(shape))
    assert shape.weights == sum(p.numel() for p in model.parameters())
    assert shape.layer_weights == sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("name", ["tiny", "tied, one key-value head", "wide heads", TINYLLAMA])
@pytest.mark.parametrize("targets", [SEVEN_PROJECTIONS, ("q_proj", "down_proj")])
def test_adapter_weights_are_those_of_peft(name: str, targets: tuple[str, ...]):
    shape = SHAPES[name]
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config_of(shape))
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules=list(targets)))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape.trained_weights(Tuning(method="lora", rank=8, targets=targets)) == trained


def test_a_shape_is_read_from_a_model_folder(tmp_path: Path):
    assert read_shape(tmp_path) is None
    for shape in (SHAPES["wide heads"], TINY):
        config_of(shape).save_pretrained(tmp_path)
        assert read_shape(tmp_path) == shape
    values = json.loads((tmp_path / "config.json").read_text())
    del values["num_key_value_heads"]  # older configs have none: as many as heads
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_key_value_heads": None}))
    assert read_shape(tmp_path) == Shape(64, 128, 2, 4, 4, 420)


@pytest.mark.parametrize("name", KNOWN_BASES)
def test_known_bases_have_the_published_number_of_weights(name: str):
    assert [count for part, count in PUBLISHED.items() if part in name] == [KNOWN_BASES[name].shape.weights]
    assert shape_of(name) == KNOWN_BASES[name].shape and shape_of("owner/unknown") is None


def test_a_4_bit_base_has_its_projections_alone_in_4_bits():
    shape = KNOWN_BASES["meta-llama/Llama-2-7b-hf"].shape
    with torch.device("meta"):
        model = LlamaForCausalLM(config_of(shape))
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    linear = sum(size for name, size in sizes.items() if name.endswith("_proj.weight"))
    assert shape.linear_weights == linear
    # 64 weights: 32 bytes, one of the block's constant, and a 256th of the 4 of the group's: 0.516 bytes a weight.
    assert NF4_BYTES * 64 == 32 + 1 + 4 / 256 and round(NF4_BYTES, 3) == 0.516
    rest = sum(sizes.values()) - linear
    assert shape.trunk_bytes(2, is_4bit=True) == round(linear * NF4_BYTES) + 2 * rest


def kept_bytes(shape: Shape, tokens: int, *, rank: int | None, dropout: float, attention: str) -> int:
    """What autograd really keeps of a forward pass through the blocks, weights aside."""
    config = config_of(shape)
    config._attn_implementation = attention
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16)
    decoder: Any = model.model
    if rank is not None:
        lora = LoraConfig(r=rank, lora_dropout=dropout, target_modules=list(SEVEN_PROJECTIONS))
        decoder = get_peft_model(model, lora, autocast_adapter_dtype=False).get_base_model().model
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # held, so that no storage's place is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        decoder.train()(input_ids=torch.zeros((1, tokens), dtype=torch.long), use_cache=False)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("rank", "dropout"), [(None, 0.0), (16, 0.0), (16, 0.1)])
@pytest.mark.parametrize("head_size", [0, 64])
def test_activations_are_what_autograd_keeps(rank: int | None, dropout: float, attention: str, head_size: int):
    shapes = [replace(Shape(128, 352, 0, 4, 2, 64, head_size=head_size), layers=layers) for layers in (1, 3)]
    tokens = 64
    less, more = (kept_bytes(s, tokens, rank=rank, dropout=dropout, attention=attention) for s in shapes)
    tuning = Tuning() if rank is None else Tuning(method="lora", rank=rank, dropout=dropout)
    base = base_section("x", dtype="bfloat16", attention=attention, max_tokens=tokens)
    sizes: dict[str, Any] = {"tokens": tokens, "optimizer": "adamw", "gradient_checkpointing": False, "logits": 0}
    counted = [training_memory(Setup(shape, base, tuning), **sizes)["activations"] for shape in shapes]
    assert counted[1] - counted[0] == pytest.approx(more - less, rel=0.05)


def test_a_card_of_which_only_the_memory_is_known_is_as_fast_as_the_slowest_that_has_it():
    slowest = {gib: Gpu("card", gib, None).timed[0] for gib in (8, 48, 80, 1000)}
    assert slowest == {8: 25, 48: 155, 80: 312, 1000: 989}


def test_cards_by_name_memory_and_number():
    assert (str(parse_gpu("8 x A100-80GB")), parse_gpu("8x a100-80gb").gib) == ("8 x a100-80gb", 80.0)
    assert parse_gpu("24GB") == parse_gpu("24 GiB") == Gpu("24 GiB", 24.0, None)
    assert parse_gpu("rtx-4090").usable_bytes == pytest.approx(21.6 * 2**30)
    for text in ("", "GiB", "0GiB", "0x24GiB", "4090"):
        with pytest.raises(ValueError, match="is not a known card"):
            parse_gpu(text)
