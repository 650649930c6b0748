"""TinyLlama-1.1B and Llama-2-7B as they lie on the hub, cut to one or two layers, through the whole path of a policy.

Weights are random. Widths, heads, names, number formats, shards and the old keys of config.json are those of the real
models; the tokenizer is the bundled one of 4096 pieces, and the 7B shape has its rows alone instead of 32000.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llamachat.chat_format import TrainOn, load_chat_format
from llamachat.chat_format.dialog import Message
from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.config.sections import Tuning
from llamachat.data.packing import collate_padded
from llamachat.models.loading import attach_adapter, load_base, load_policy, trunk_digest
from llamachat.runs.artifacts import read_artifact
from llamachat.training.master_weights import MasterWeightOptimizer
from serving.export import GREEDY, QUESTIONS, Request, export_policy, tolerance
from sft.loss import answer_token_losses
from tests.tiny_llama import base_section, publish_policy

ASSETS = Path(__file__).resolve().parents[3] / "assets" / "base"
RANK = 16


@dataclass(frozen=True)
class Shape:
    """What of a published model the path depends on."""

    config: dict[str, Any]  # of its config.json, beside what all Llama models share
    on_disk: torch.dtype
    is_sharded: bool
    whole_layers: int
    adapter_weights: int  # parameters of an adapter of rank 64 on all seven projections of the whole model

    def write(self, folder: Path) -> dict[str, torch.Size]:
        """The model as a folder, with random weights in one file or in several; the shapes of its weights."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = LlamaForCausalLM._from_config(LlamaConfig(**self.config, rms_norm_eps=1e-5), dtype=self.on_disk)
        model.save_pretrained(folder, max_shard_size="300MB" if self.is_sharded else "5GB")
        shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        config = json.loads((folder / "config.json").read_text())
        for key in ("dtype", "rope_parameters", "transformers_version"):
            config.pop(key)
        old = {"torch_dtype": str(self.on_disk).removeprefix("torch."), "rope_scaling": None, "pretraining_tp": 1}
        (folder / "config.json").write_text(json.dumps(config | old))
        if self.is_sharded:  # an old checkpoint, which also holds what models compute
            name = "model.layers.0.self_attn.rotary_emb.inv_freq"
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            file = index["weight_map"][name] = next(iter(index["weight_map"].values()))
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            weights = load_file(folder / file) | {name: torch.ones(64, dtype=self.on_disk)}
            save_file(weights, folder / file, metadata={"format": "pt"})
        return shapes


TINYLLAMA = Shape(
    {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "max_position_embeddings": 2048,
    },
    torch.float32,
    is_sharded=False,
    whole_layers=22,
    adapter_weights=50_462_720,
)
LLAMA2_7B = Shape(
    {"vocab_size": 4096, "num_hidden_layers": 1, "max_position_embeddings": 4096},  # the rest is Llama 2's by default
    torch.float16,
    is_sharded=True,
    whole_layers=32,
    adapter_weights=159_907_840,
)


def one_step(model: Any, ids: Any) -> tuple[float, float]:
    """The loss on the answer before and after one optimizer step on it, in nats a token."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [{"params": trained}]
    optimizer = MasterWeightOptimizer(groups, lambda masters: [torch.optim.AdamW(masters, lr=1e-3)])
    batch = collate_padded([ids], rows=1, multiple_of=1)
    before = answer_token_losses(model, batch).mean()
    before.backward()
    assert all(weight.grad is not None for weight in trained)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        return float(before), float(answer_token_losses(model, batch).mean())


@pytest.mark.parametrize("shape", [TINYLLAMA, LLAMA2_7B], ids=["tinyllama", "llama-2-7b"])
def test_a_policy_of_this_shape_is_trained_saved_loaded_and_exported(
    shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # One question and a short answer: names, shapes and seconds are the matter here.
    monkeypatch.setattr("serving.export.QUESTIONS", QUESTIONS[:1])
    monkeypatch.setattr("serving.export.GREEDY", replace(GREEDY, max_new_tokens=6))
    folder = tmp_path / "base"
    shapes = shape.write(folder)
    chat_format = load_chat_format("llama2", load_tokenizer(ASSETS))
    dialog = [Message("user", "What is the capital of France?"), Message("assistant", "Paris.")]
    tuning = Tuning(method="lora", rank=RANK, alpha=2 * RANK)
    model = attach_adapter(load_base(base_section(folder, dtype="bfloat16", max_tokens=128)), tuning, seed=0)
    trunk = trunk_digest(model, values_per_weight=4096)
    before, after = one_step(model, chat_format.encode_dialog(dialog, train_on=TrainOn.EVERY_ANSWER))
    assert after < before
    assert trunk_digest(model, values_per_weight=4096) == trunk

    artifact = publish_policy(tmp_path / "runs/one/sft", model, chat_format, base=str(folder), max_tokens=128)
    saved = load_file(artifact.path / "adapter_model.safetensors")
    expected = {}
    for weight, size in shapes.items():
        if "_proj." in weight:
            stem = f"base_model.model.{weight.removesuffix('.weight')}"
            expected |= {f"{stem}.lora_A.weight": (RANK, size[1]), f"{stem}.lora_B.weight": (size[0], RANK)}
    assert {key: tuple(weight.shape) for key, weight in saved.items()} == expected
    at_rank_64 = sum(weight.numel() for weight in saved.values()) * 64 // RANK
    assert at_rank_64 * shape.whole_layers // shape.config["num_hidden_layers"] == shape.adapter_weights

    ids = torch.tensor([chat_format.encode_prompt(dialog[:1])])
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        assert torch.equal(load_policy(artifact.path).model(input_ids=ids).logits, trained)
    del model

    agreement = export_policy(Request(read_artifact(artifact.path), tmp_path / "out", shard_gb=0.2))
    assert agreement.max_logprob_difference <= tolerance(torch.bfloat16)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {key: weight.shape for key, weight in plain.state_dict().items()} == shapes
    assert {weight.dtype for weight in plain.state_dict().values()} == {torch.bfloat16}
    with torch.no_grad():
        difference = (plain(input_ids=ids).logits.float() - trained.float()).abs()
    assert difference.mean() < 0.01 * trained.float().std() + 0.01
