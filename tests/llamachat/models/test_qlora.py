"""Adapters on a 4-bit base: the oracles are plain transformers and peft with the same quantisation, and the weights."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import sft
from llamachat.chat_format import ChatFormat
from llamachat.config.sections import Tuning
from llamachat.errors import ArtifactError, ConfigError
from llamachat.models import nf4
from llamachat.models.loading import attach_adapter, load_base, load_policy, trunk_digest
from llamachat.runs.reader import read_summary
from llamachat.training.policy import load_start
from llamachat.training.policy import publish_policy as publish
from sft.config import Config
from tests.sft.tiny_sft import inputs_of, toy_dialogs, write_base
from tests.tiny_llama import LORA, base_section, nf4_by_transformers, publish_policy, tiny_llama

QLORA = Tuning(method="qlora", rank=4, alpha=8)
IDS = torch.tensor([[1, 270, 279, 383, 357, 331, 262, 289]])
SHORT = Config(epochs=2, examples_per_step=8, learning_rate=1e-2, sample_prompts=1)
BF16: dict[str, Any] = {"dtype": "bfloat16"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece, dtype=torch.bfloat16)


def load_nf4(base: Path) -> Any:
    return load_base(base_section(base, **BF16), is_nf4=True)


def layers_of(model: nn.Module) -> dict[str, Any]:  # of Linear4bit, whose weight is more than its types say
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def plain_base(folder: Path) -> Any:
    """As a user of transformers would load it; only bitsandbytes' repacking is kept off."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=nf4_by_transformers()
    )
    for layer in layers_of(model).values():
        layer.support_avx512bf16_for_cpu = False
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


# --- loading


def test_projections_are_nf4_twice_quantised_and_the_rest_is_not(base: Path):
    model = load_nf4(base)
    layers = layers_of(model)
    assert len(layers) == 2 * 7 and not any("lm_head" in name for name in layers)
    for layer in layers.values():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.bfloat16)
        assert layer.weight.dtype == torch.uint8 and not layer.weight.requires_grad
        assert layer.support_avx512bf16_for_cpu is False
    others = {name: weight for name, weight in model.named_parameters() if weight.dtype != torch.uint8}
    assert {"model.embed_tokens.weight", "lm_head.weight"} < others.keys()
    assert {weight.dtype for weight in others.values()} == {torch.bfloat16}
    # The widest gap of NF4's levels lies between -1 and -0.6962 (Dettmers et al. 2023, appendix E).
    source = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for name, layer in layers.items():
        weight = source.get_parameter(f"{name}.weight")
        back = dequantize_4bit(layer.weight, layer.weight.quant_state).float()
        largest = weight.reshape(-1, 64).abs().amax(dim=1, keepdim=True)
        error = (back - weight).reshape(-1, 64).abs() / largest
        assert error.mean() > 0.01 and error.max() < 0.17


def test_the_adapter_is_bf16_and_adds_nothing_yet(base: Path):
    trunk = load_nf4(base)
    before = logits(trunk)
    model = attach_adapter(trunk, QLORA, seed=0)
    assert torch.equal(logits(model), before)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 2 * 7
    assert {weight.dtype for weight in trained.values()} == {torch.bfloat16}


def test_the_trunk_has_one_digest_until_a_packed_byte_or_a_scale_moves(base: Path):
    model = load_nf4(base)
    digest = trunk_digest(model)
    assert trunk_digest(attach_adapter(load_nf4(base), QLORA, seed=1)) == digest
    layer = layers_of(model)["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.weight.data[-1, 0] ^= 1
        assert trunk_digest(model) != digest
        layer.weight.data[-1, 0] ^= 1
        assert trunk_digest(model) == digest
        layer.weight.quant_state.state2.absmax[-1] *= 1.5
    assert trunk_digest(model) != digest


def test_a_shape_without_whole_blocks_is_refused(tmp_path: Path):
    tiny_llama(hidden_size=48, intermediate_size=72).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"hidden_size 48, intermediate_size 72, .* cannot be divided by 32"):
        load_nf4(tmp_path)


def test_a_base_named_by_its_hub_name_lies_where_transformers_cached_it(monkeypatch: pytest.MonkeyPatch, base: Path):
    monkeypatch.setattr("transformers.utils.cached_file", lambda name, file: str(base / file))
    assert nf4.model_folder("owner/model") == base == nf4.model_folder(str(base))


# --- the stage


def test_only_the_adapter_is_trained_and_plain_peft_on_the_same_nf4_gives_its_logits(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Tensor] = []

    def spy(start: Any, *args: Any, **kwargs: Any) -> Any:
        start.model.get_base_model().set_attn_implementation("sdpa")  # training on a CPU attends by sequence
        seen.append(logits(start.model))
        assert trunk_digest(start.model) == trunk_digest(load_nf4(base))
        grown = [weight for name, weight in start.model.named_parameters() if ".lora_B." in name]
        assert len(grown) == 14 and all(bool(weight.any()) for weight in grown)
        return publish(start, *args, **kwargs)

    monkeypatch.setattr("sft.train.publish_policy", spy)
    artifact = sft.run(SHORT, inputs_of(tmp_path, base, toy_dialogs(20), tuning=QLORA, **BF16))
    details = artifact.manifest.details
    assert (details["method"], details["rank"]) == ("qlora", 4)
    assert details["quantization"] == {"type": "nf4", "double": True, "compute": "bfloat16"}
    assert sorted(path.name for path in artifact.path.glob("*.safetensors")) == ["adapter_model.safetensors"]
    trained = seen[0]
    assert not torch.equal(logits(load_nf4(base)), trained)
    plain = PeftModel.from_pretrained(plain_base(base), str(artifact.path))
    for name, weight in plain.named_parameters():  # on packed weights PEFT has no way to be asked for bf16
        if ".lora_" in name:
            weight.data = weight.data.to(torch.bfloat16)
    assert torch.equal(logits(plain), trained)
    policy = load_policy(artifact.path)
    assert torch.equal(logits(policy.model), trained)
    assert not policy.model.training
    assert not any(weight.requires_grad for weight in policy.model.parameters())
    assert len(layers_of(load_policy(artifact.path, dtype="float32").model)) == 14


def test_it_learns_as_well_as_adapters_on_the_bf16_base(base: Path, tmp_path: Path):
    reached, begun = {}, {}
    config = SHORT.model_copy(update={"epochs": 6.0, "sample_prompts": 0})
    for tuning in (LORA, QLORA):
        folder = tmp_path / tuning.method
        folder.mkdir()
        inputs = inputs_of(folder, base, toy_dialogs(40), tuning=tuning, **BF16)
        sft.run(config, inputs)
        summary = read_summary(inputs.folder)
        reached[tuning.method], begun[tuning.method] = summary["sft/eval_loss"], summary["sft/eval_loss_base"]
    assert reached["qlora"] < begun["qlora"] - 1.0
    assert reached["qlora"] == pytest.approx(reached["lora"], rel=0.05)


def test_an_adapter_is_continued_on_a_4_bit_base_in_a_copy(base: Path, tmp_path: Path):
    inputs = inputs_of(tmp_path, base, toy_dialogs(20), tuning=QLORA, **BF16)
    first = sft.run(SHORT, inputs)
    (tmp_path / "second").mkdir()
    second = inputs_of(tmp_path / "second", base, toy_dialogs(20), tuning=QLORA, policy=first, **BF16)
    assert sft.run(SHORT, second).manifest.details["trunk"] == first.manifest.details["trunk"]
    start = read_summary(second.folder)["sft/eval_loss_base"]
    assert start == pytest.approx(read_summary(inputs.folder)["sft/eval_loss"], abs=1e-6)


@pytest.mark.parametrize(
    ("policy_tuning", "tuning", "named"),
    [
        (QLORA, LORA, r"tuning\.method: 'lora', but .* was trained by qlora, on the base in 4 bits"),
        (LORA, QLORA, r"tuning\.method: 'qlora', but .* was trained by lora, on the base in 16"),
        (QLORA, Tuning(), r"tuning\.method: 'full', but .* Set tuning\.method to qlora"),
        (QLORA, QLORA.model_copy(update={"rank": 8}), r"tuning\.rank: 8"),
    ],
)
def test_an_adapter_stays_on_the_kind_of_base_it_was_trained_on(
    policy_tuning: Tuning, tuning: Tuning, named: str, base: Path, tmp_path: Path
):
    inputs = inputs_of(tmp_path, base, toy_dialogs(12), tuning=policy_tuning, **BF16)
    artifact = publish(load_start(inputs), inputs, dropped={}, notes={})
    (tmp_path / "second").mkdir()
    with pytest.raises(ConfigError, match=named):
        sft.run(SHORT, inputs_of(tmp_path / "second", base, toy_dialogs(12), tuning=tuning, policy=artifact, **BF16))


def test_another_dtype_than_bf16_is_refused(base: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"base\.dtype: float32, but tuning\.method is qlora"):
        sft.run(SHORT, inputs_of(tmp_path, base, toy_dialogs(12), tuning=QLORA))


# --- loading a policy that does not fit


def test_a_policy_with_another_quantisation_is_refused(tmp_path: Path, tiny_format: ChatFormat):
    folder = tmp_path / "base"
    tiny_llama(dtype=torch.bfloat16).save_pretrained(folder)
    model = attach_adapter(load_nf4(folder), QLORA, seed=0)
    published = publish_policy(tmp_path / "runs/one/sft", model, tiny_format, base=str(folder))
    assert load_policy(published.path).name == "one/sft"
    manifest = published.path / "manifest.json"
    content = json.loads(manifest.read_text())
    content["details"]["quantization"]["type"] = "fp4"
    manifest.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"details\.quantization is .*fp4.* \{type: nf4, double: true\}"):
        load_policy(published.path)
