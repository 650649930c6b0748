"""Export of a policy whose base was in 4 bits: the oracles are transformers' own 4-bit layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from llamachat.chat_format import ChatFormat
from llamachat.models import loading
from llamachat.models.loading import SEVEN_PROJECTIONS, Policy
from llamachat.runs.artifacts import Artifact, read_artifact
from serving.export import Request, export_policy, tolerance
from serving.merging import as_exported, read_adapter, through_nf4
from tests.serving.exporting import lora_policy, note_of, plain, weights_of
from tests.tiny_llama import nf4_by_transformers, tiny_llama

QUANTIZED = nf4_by_transformers()


@pytest.mark.parametrize("on_disk", [torch.float32, torch.float16, torch.bfloat16])
def test_dequantized_weights_are_those_of_transformers_4_bit_layers(on_disk: torch.dtype, tmp_path: Path):
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    tiny_llama(dtype=on_disk).save_pretrained(tmp_path)
    quantized = plain(tmp_path, dtype=torch.bfloat16, quantization_config=QUANTIZED)
    weights = load_file(tmp_path / "model.safetensors")
    compared = set()
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            expected = dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(through_nf4(weights[f"{name}.weight"].to(torch.bfloat16)), expected)
            compared.add(name)
    assert len(compared) == 14 and {name.rsplit(".", 1)[1] for name in compared} == set(SEVEN_PROJECTIONS)


def qlora_policy(folder: Path, chat_format: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> Artifact:
    """A LoRA policy whose manifest says that its base was in 4 bits, and whose loading puts it there."""
    artifact = lora_policy(folder, chat_format, dtype=torch.bfloat16)
    manifest = json.loads((artifact.path / "manifest.json").read_text())
    manifest["details"] |= {
        "method": "qlora",
        "quantization": {"type": "nf4", "double": True, "compute": "bfloat16"},
    }
    (artifact.path / "manifest.json").write_text(json.dumps(manifest))

    def load(path: Path, **_: Any) -> Policy:
        base = plain(folder / "base", dtype=torch.bfloat16, quantization_config=QUANTIZED)
        model: Any = PeftModel.from_pretrained(base, str(path), autocast_adapter_dtype=False).eval()
        return Policy(model, chat_format.tokenizer, chat_format, max_tokens=160, system=None, name="one/sft")

    monkeypatch.setattr(loading, "load_policy", load)
    return read_artifact(artifact.path)


def test_a_qlora_policy_is_merged_onto_what_training_saw(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
):
    artifact = qlora_policy(tmp_path, tiny_format, monkeypatch)
    agreement = export_policy(Request(artifact, tmp_path / "out"))
    assert agreement.max_logprob_difference <= tolerance(torch.bfloat16)
    assert note_of(tmp_path / "out")["onto"] == "quantized"
    name = "model.layers.1.mlp.up_proj.weight"
    weight, (a, b) = weights_of(tmp_path / "base")[name], read_adapter(artifact.path).factors[name]
    exact = through_nf4(weight).double() + 2 * b.double() @ a.double()
    torch.testing.assert_close(weights_of(tmp_path / "out")[name], exact.to(torch.bfloat16), rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_chat_answers_from_the_very_weights_that_an_export_writes(
    method: str, tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
):
    if method == "qlora":
        artifact = qlora_policy(tmp_path, tiny_format, monkeypatch)
    else:
        artifact = lora_policy(tmp_path, tiny_format, dtype=torch.bfloat16)
    export_policy(Request(artifact, tmp_path / "out"))
    ids = torch.tensor([[1, 5, 9, 200, 33, 7, 81]])
    served = as_exported(loading.load_policy(artifact.path))
    with torch.no_grad():
        assert torch.equal(served.model(input_ids=ids).logits, plain(tmp_path / "out")(input_ids=ids).logits)
    assert not isinstance(served.model, PeftModel)


def test_an_export_onto_the_original_weights_is_reported_as_another_model(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    artifact = qlora_policy(tmp_path, tiny_format, monkeypatch)
    agreement = export_policy(Request(artifact, tmp_path / "out", onto="original"))
    assert agreement.max_logprob_difference > tolerance(torch.bfloat16), "and yet it is written: it was asked for"
    assert "On the original weights it is another model" in caplog.text
    assert "merged onto the original weights" in (tmp_path / "out" / "README.md").read_text()


def test_a_qlora_adapter_is_loaded_on_its_base_in_4_bits_by_the_lines_of_its_card(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
):
    artifact, out = qlora_policy(tmp_path, tiny_format, monkeypatch), tmp_path / "out"
    agreement = export_policy(Request(artifact, out, format="adapter"))
    assert agreement.max_logprob_difference <= tolerance(torch.bfloat16)
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec((out / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    ids = torch.tensor([[1, 5, 9, 200, 33]])
    with torch.no_grad():
        got, due = (model(input_ids=ids).logits for model in (names["model"], loading.load_policy(artifact.path).model))
    assert names["model"].get_base_model().is_loaded_in_4bit
    torch.testing.assert_close(got.float(), due.float(), rtol=0, atol=0.1)
