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
from transformers import AutoModelForCausalLM

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

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    on_disk: torch.dtype
    is_sharded: bool
    config: dict[str, Any]  # of its config.json, what differs from the other

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Output and input width of the seven."""
        kv = self.hidden // self.heads * self.kv_heads
        square, wide = (self.hidden, self.hidden), (self.intermediate, self.hidden)
        return {
            "self_attn.q_proj": square,
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": square,
            "mlp.gate_proj": wide,
            "mlp.up_proj": wide,
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    @property
    def weights(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, as the files on the hub have them."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            inside = f"model.layers.{layer}"
            shapes |= {f"{inside}.{name}.weight": shape for name, shape in self.projections.items()}
            shapes |= {f"{inside}.{name}_layernorm.weight": (self.hidden,) for name in ("input", "post_attention")}
        return shapes | {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocab, self.hidden)}

    def write(self, folder: Path) -> Path:
        """The model as a folder, its random weights in one file or in three."""
        folder.mkdir()
        generator = torch.Generator().manual_seed(0)
        weights = {}
        for name, shape in self.weights.items():
            weight = torch.empty(shape, dtype=self.on_disk)
            weights[name] = weight.fill_(1.0) if "norm" in name else weight.normal_(0.0, 0.02, generator=generator)
        names = list(weights)
        parts = [names[0::3], names[1::3], names[2::3]] if self.is_sharded else [names]
        if self.is_sharded:  # an old checkpoint, which also holds what models compute
            weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(64, dtype=self.on_disk)
            parts[0].append("model.layers.0.self_attn.rotary_emb.inv_freq")
        weight_map = {}
        for number, part in enumerate(parts, start=1):
            file = f"model-{number:05d}-of-00003.safetensors" if self.is_sharded else "model.safetensors"
            save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        if self.is_sharded:
            index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "config.json").write_text(json.dumps(self._config()))
        return folder

    def _config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": str(self.on_disk).removeprefix("torch."),
            "use_cache": True,
            "vocab_size": self.vocab,
            **self.config,
        }


TINYLLAMA = Shape(2048, 5632, 32, 4, 2, 32000, torch.float32, False, {"max_position_embeddings": 2048})
LLAMA2_7B = Shape(4096, 11008, 32, 32, 1, 4096, torch.float16, True, {"max_position_embeddings": 4096})
# Parameters of adapters of rank 64 on all seven projections of the whole models, as PEFT's users report them.
KNOWN_AT_RANK_64 = {"tinyllama": (22, 50_462_720), "llama-2-7b": (32, 159_907_840)}


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


@pytest.mark.parametrize(("name", "shape"), [("tinyllama", TINYLLAMA), ("llama-2-7b", LLAMA2_7B)])
def test_a_policy_of_this_shape_is_trained_saved_loaded_and_exported(
    name: str, shape: Shape, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # One question and a short answer: names, shapes and seconds are the matter here.
    monkeypatch.setattr("serving.export.QUESTIONS", QUESTIONS[:1])
    monkeypatch.setattr("serving.export.GREEDY", replace(GREEDY, max_new_tokens=6))
    folder = shape.write(tmp_path / "base")
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
    for layer in range(shape.layers):
        for projection, (width, depth) in shape.projections.items():
            stem = f"base_model.model.model.layers.{layer}.{projection}"
            expected |= {f"{stem}.lora_A.weight": (RANK, depth), f"{stem}.lora_B.weight": (width, RANK)}
    assert {key: tuple(weight.shape) for key, weight in saved.items()} == expected
    layers, known = KNOWN_AT_RANK_64[name]
    assert sum(weight.numel() for weight in saved.values()) * layers // shape.layers * 64 // RANK == known

    ids = torch.tensor([chat_format.encode_prompt(dialog[:1])])
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        assert torch.equal(load_policy(artifact.path).model(input_ids=ids).logits, trained)
    del model

    found = export_policy(Request(read_artifact(artifact.path), tmp_path / "out", shard_gb=0.2))
    assert found.max_logprob_difference <= tolerance(torch.bfloat16)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {key: tuple(weight.shape) for key, weight in plain.state_dict().items()} == shape.weights
    assert {weight.dtype for weight in plain.state_dict().values()} == {torch.bfloat16}
    with torch.no_grad():
        difference = (plain(input_ids=ids).logits.float() - trained.float()).abs()
    assert difference.mean() < 0.01 * trained.float().std() + 0.01
