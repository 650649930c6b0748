"""GGUF files: the oracles are a folder that acts as llama.cpp is documented to, and, where LLAMA_CPP names it, the real one."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat, load_chat_format
from llamachat.chat_format.tokenizer import FastBackend, Tokenizer
from llamachat.config.sections import RopeScaling
from llamachat.errors import LlamachatError, TokenizerError, UsageError
from llamachat.runs.artifacts import Artifact
from pipelines.cli.main import main
from serving.export import PolicySnapshot, Request, export_policy, take_snapshot
from serving.gguf import GgufRequest, export_gguf, read_header, sentencepiece_model
from tests.reward.rewarding import trained
from tests.serving.exporting import lora_policy, note_of
from tests.serving.fake_llama_cpp import make_folder

pytest.importorskip("gguf")
REAL = os.environ.get("LLAMA_CPP", "")


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory, tiny_format: ChatFormat) -> tuple[Artifact, PolicySnapshot, Path]:
    """A LoRA policy, what it said, and its merged folder: made once for all tests."""
    folder = tmp_path_factory.mktemp("policy")
    artifact = lora_policy(folder, tiny_format)
    (folder / "base/LICENSE.txt").write_text("You may.")
    snapshot = take_snapshot(artifact)
    export_policy(Request(artifact, folder / "merged"), snapshot)
    return artifact, snapshot, folder / "merged"


@pytest.fixture
def at_once(merged: tuple[Artifact, PolicySnapshot, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take the merged folder that is there."""
    monkeypatch.setattr("serving.gguf.take_snapshot", lambda artifact: merged[1])
    monkeypatch.setattr("serving.gguf.export_policy", lambda request, snapshot: shutil.copytree(merged[2], request.out))


def test_ollama_gets_a_quantized_file_with_the_policys_tokenizer_and_a_modelfile(
    merged: tuple[Artifact, PolicySnapshot, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    folder, out = make_folder(tmp_path / "llama.cpp"), tmp_path / "out"
    words = ["export", str(merged[0].path), "--out", str(out), "--llama-cpp", str(folder)]
    assert main([*words, "--format", "ollama", "--quantize", "q4_k_m"]) == 0
    printed = capsys.readouterr().out
    assert "by at most 0.00% of a tensor's size" in printed
    assert printed.endswith(f"Now: ollama create one-sft -f {out}/Modelfile && ollama run one-sft\n")
    assert "q4_k_m: 3 of 9 tensor(s) required fallback quantization" in caplog.text
    names = {"LICENSE.txt", "Modelfile", "README.md", "export.json", "one-sft-q4_k_m.gguf"}
    assert {path.name for path in out.iterdir()} == names
    note = note_of(out)
    assert (note["format"], note["file"], note["dtype"]) == ("ollama", "one-sft-q4_k_m.gguf", "float32")
    assert note["quantization"] == "q4_k_m" and note["weight_difference"] == 0.0
    assert "generation" not in read_header(out / "one-sft-q4_k_m.gguf")["tokenizer.chat_template"]
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./one-sft-q4_k_m.gguf\n")
    assert 'SYSTEM """Be brief."""\n' in modelfile and "PARAMETER num_ctx 160\n" in modelfile
    card = (out / "README.md").read_text()
    assert "library_name: gguf" in card and "ollama create one-sft -f Modelfile" in card
    assert "differ from its weights by at most 0.00% of a tensor's size" in card
    assert "licence files (LICENSE.txt) are copied here" in card


WRONG = {
    "converter fails": ({"converter_says": "boom"}, r"(?s)convert_hf_to_gguf\.py .*with status 1.*line 19\n.* boom"),
    "converter writes nothing": ({"writes_nothing": True}, r"(?s)wrote no file.*Nothing was written"),
    "no BOS": ({"header": {"adds_bos": False}}, "add_bos_token is False"),
    "no stop": ({"header": {"eos": 1}}, "eos_token_id is 1"),
    "scores all alike": ({"header": {"scores": [-1000.0] * 420}}, "scores are other scores"),
    "other pieces": ({"header": {"tokens": ["a"] * 420}}, "tokens are other pieces"),
    "other order of rotated pairs": (
        {"keeps_order": True},
        r"'model\.layers\.0\.self_attn\.[qk]_proj\.weight' differs",
    ),
    "other weights": ({"scale": 2.0}, r"differs from the policy's by 1\.00 of its size"),
}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_leaves_nothing(case: str, merged: tuple[Artifact, PolicySnapshot, Path], tmp_path: Path):
    behaviour, words = WRONG[case]
    folder = make_folder(tmp_path / "llama.cpp", **behaviour)
    with pytest.raises(LlamachatError, match=words):
        export_gguf(GgufRequest(Request(merged[0], tmp_path / "out"), folder))
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


@pytest.mark.usefixtures("at_once")
def test_a_small_difference_of_the_weights_is_reported(merged: tuple[Artifact, PolicySnapshot, Path], tmp_path: Path):
    folder = make_folder(tmp_path / "llama.cpp", scale=1.25)
    file, difference = export_gguf(GgufRequest(Request(merged[0], tmp_path / "out"), folder, quantize="q8_0"))
    assert file.name == "one-sft-q8_0.gguf" and difference == pytest.approx(0.25)


def test_a_folder_that_cannot_do_it_is_refused_before_any_work(
    merged: tuple[Artifact, PolicySnapshot, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_sentencepiece: bytes,
    tiny_format: ChatFormat,
):
    request = Request(merged[0], tmp_path / "out")
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UsageError, match=r"has no convert_hf_to_gguf\.py.*git clone"):
            GgufRequest(request, folder)
    folder = make_folder(tmp_path / "llama.cpp")
    dynamic = lora_policy(tmp_path / "dynamic", tiny_format, rope_scaling=RopeScaling(type="dynamic", factor=2.0))
    with pytest.raises(UsageError, match=r"of the type dynamic, which llama\.cpp does not have.*--allow-difference"):
        GgufRequest(Request(dynamic, tmp_path / "out"), folder)
    (folder / "build/bin/llama-quantize").unlink()
    with pytest.raises(UsageError, match=r"--quantize q4_0: .*cmake --build .*llama-quantize\. Or use .*q8_0"):
        GgufRequest(request, folder, quantize="q4_0")
    with pytest.raises(UsageError, match="is a reward model"):
        scores, _ = trained(tmp_path, tiny_sentencepiece, "full")
        GgufRequest(Request(scores, tmp_path / "out"), folder)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match=r"extra 'gguf'.*-m pip install gguf"):
        GgufRequest(request, folder)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--format", "gguf"], "--format gguf: --llama-cpp is missing"),
        (["--quantize", "q8_0"], "--quantize q8_0: only GGUF files are quantized, and the format is merged"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    words: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert main(["export", "anything", "--out", "anywhere", *words]) == 2
    assert text in capsys.readouterr().err


# -- a base without tokenizer.model


def test_a_sentencepiece_model_built_from_tokenizer_json_gives_its_ids(tiny_format: ChatFormat):
    written = tiny_format.tokenizer.fast().to_str()
    fast = load_chat_format("llama2", Tokenizer(FastBackend(written)))
    model = sentencepiece_model(fast, written)
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor(model_proto=model)
    for text in ("Hello there", "a   b\n\n  c", "na\u00efve \U0001f600", "1234 + 5", "</s> spelled"):
        assert processor.encode(text) == tiny_format.tokenizer.encode(text)
    broken = json.loads(written)
    broken["model"]["merges"].reverse()
    with pytest.raises(TokenizerError, match=r"gives other ids in \d+ of \d+ texts"):
        sentencepiece_model(fast, json.dumps(broken))


# -- the real one


@pytest.mark.skipif(not Path(REAL, "convert_hf_to_gguf.py").is_file(), reason="LLAMA_CPP names no llama.cpp")
@pytest.mark.parametrize("has_model", [True, False])  # False: with a lengthened context too
def test_llama_cpp_itself_writes_the_policy(has_model: bool, tmp_path: Path, tiny_format: ChatFormat):
    fast = Tokenizer(FastBackend(tiny_format.tokenizer.fast().to_str()))
    scaled: dict[str, Any] = {} if has_model else {"rope_scaling": RopeScaling(type="linear", factor=2.0)}
    artifact = lora_policy(tmp_path, tiny_format if has_model else load_chat_format("llama2", fast), **scaled)
    assert (artifact.path / "tokenizer.model").exists() == has_model
    file, difference = export_gguf(GgufRequest(Request(artifact, tmp_path / "out"), Path(REAL)))
    assert difference < 1e-6
    assert read_header(file)["llama.context_length"] == (256 if has_model else 512)
