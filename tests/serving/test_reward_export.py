"""Export of reward models: the oracles are plain transformers on what was written, and sums in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llamachat.chat_format import ChatFormat
from llamachat.errors import ArtifactError, UsageError
from llamachat.models.reward_model import load_reward_model
from llamachat.runs.artifacts import read_artifact
from pipelines.cli.main import main
from serving import reward_export
from serving.export import ExportError, Request
from serving.reward_export import export_reward_model
from tests.reward.rewarding import DIALOGS, trained
from tests.serving.exporting import full_policy, note_of, weights_of


def plain_scores(folder: Path) -> list[float]:
    """As a user of transformers has them: template, tokenizer, model."""
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for messages in DIALOGS:
        plain = [{"role": message.role, "content": message.content.strip()} for message in messages]
        ids: Any = tokenizer.apply_chat_template(plain, return_dict=True, return_tensors="pt")
        with torch.no_grad():
            scores.append(model(ids["input_ids"]).logits.item())
    return scores


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_an_exported_model_gives_the_scores_of_the_artifact(
    method: str, tmp_path: Path, tiny_sentencepiece: bytes, capsys: pytest.CaptureFixture[str]
):
    artifact, _ = trained(tmp_path, tiny_sentencepiece, method)
    out = tmp_path / "out"
    assert main(["export", str(artifact.path.parent), "--out", str(out)]) == 0
    assert "largest difference in a score" in capsys.readouterr().out
    expected = load_reward_model(artifact.path, dtype="float32").score(DIALOGS)
    assert plain_scores(out) == pytest.approx(expected, abs=1e-5)
    assert load_reward_model(out).score(DIALOGS) == pytest.approx(expected, abs=1e-5), "llamachat score reads it too"
    weights = weights_of(out)
    assert "lm_head.weight" not in weights and {weight.dtype for weight in weights.values()} == {torch.float32}
    assert note_of(out)["max_score_difference"] <= 1e-5
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    card = (out / "README.md").read_text()
    assert "- system text in training: none added (`base.system` is null); dialogs and their sources may" in card
    assert "pipeline_tag: text-classification" in card and "Checked against the artifact" in card


def test_merged_weights_and_the_head_are_those_of_the_adapter(tmp_path: Path, tiny_sentencepiece: bytes):
    artifact, _ = trained(tmp_path, tiny_sentencepiece, "lora")
    export_reward_model(Request(artifact, tmp_path / "out", shard_gb=1e-4))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    got, base = weights_of(tmp_path / "out"), weights_of(tmp_path / "base")
    adapter = load_file(artifact.path / "adapter_model.safetensors")
    assert got.keys() - base.keys() == {"score.weight"}
    assert torch.equal(got["score.weight"], adapter["base_model.model.score.weight"])
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    exact = base[f"{name}.weight"].double() + 8 / 4 * b @ a
    torch.testing.assert_close(got[f"{name}.weight"], exact.float(), rtol=1e-6, atol=1e-6)


def test_the_code_of_an_exported_adapters_card_runs(
    tmp_path: Path, tiny_sentencepiece: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    artifact, _ = trained(tmp_path, tiny_sentencepiece, "lora")
    export_reward_model(Request(artifact, tmp_path / "out", format="adapter"))
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path / "out")
    capsys.readouterr()
    exec(code, {})
    from tests.reward.rewarding import dialog

    expected = load_reward_model(artifact.path).score([dialog("Hello?", "Hello! How can I help?")])
    assert float(capsys.readouterr().out) == pytest.approx(expected[0], abs=1e-5)


def test_a_format_of_16_bits_is_written_on_request(tmp_path: Path, tiny_sentencepiece: bytes):
    artifact, _ = trained(tmp_path, tiny_sentencepiece, "lora")
    agreement = export_reward_model(Request(artifact, tmp_path / "out", dtype="bfloat16"))
    assert {weight.dtype for weight in weights_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert 1e-5 < agreement.max_score_difference < 0.25 * max(1.0, agreement.largest_score)


def test_a_result_that_differs_is_not_kept_unless_allowed(
    tmp_path: Path, tiny_sentencepiece: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    artifact, _ = trained(tmp_path, tiny_sentencepiece, "lora")
    monkeypatch.setitem(reward_export.TOLERANCE, "bfloat16", 1e-9)
    with pytest.raises(ExportError, match=r"a score differs by .* nothing was written"):
        export_reward_model(Request(artifact, tmp_path / "out", dtype="bfloat16"))
    assert not (tmp_path / "out").exists()
    export_reward_model(Request(artifact, tmp_path / "out", dtype="bfloat16", may_differ=True))
    assert "a score differs by" in caplog.text


def test_what_cannot_be_exported_is_refused(tmp_path: Path, tiny_sentencepiece: bytes, tiny_format: ChatFormat):
    policy = full_policy(tmp_path / "policy", tiny_format)
    with pytest.raises(UsageError, match="--dtype bfloat16: it is for merged reward models"):
        Request(policy, tmp_path / "out", dtype="bfloat16")
    artifact, _ = trained(tmp_path, tiny_sentencepiece, "full", max_tokens=16)
    with pytest.raises(ArtifactError, match="none of the built-in answers fits into the 16 tokens"):
        export_reward_model(Request(read_artifact(artifact.path), tmp_path / "out"))


def test_the_original_weights_are_the_users_choice(
    tmp_path: Path, tiny_sentencepiece: bytes, caplog: pytest.LogCaptureFixture
):
    artifact, _ = trained(tmp_path, tiny_sentencepiece, "qlora")
    agreement = export_reward_model(Request(artifact, tmp_path / "out", onto="original"))
    assert agreement.max_score_difference > 1e-4, "4 bits move scores"
    assert "it is another model" in caplog.text.replace("\n", " ")
