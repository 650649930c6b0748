"""GGUF files: the oracles are a folder that acts as llama.cpp is documented to, and, where LLAMA_CPP names it, the real one."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat, load_chat_format
from llamachat.chat_format.proof import proof_prompts
from llamachat.chat_format.tokenizer import FastBackend, Tokenizer
from llamachat.config.sections import RopeScaling
from llamachat.errors import LlamachatError, TokenizerError, UsageError
from llamachat.runs.artifacts import Artifact
from pipelines.cli.main import main
from serving.export import Asked, ExportError, Request, ask_policy, export_policy
from serving.gguf import GgufRequest, export_gguf
from serving.gguf_header import read_header
from serving.sentencepiece_file import sentencepiece_model
from tests.reward.rewarding import trained
from tests.serving.exporting import lora_policy, note_of
from tests.serving.fake_llama_cpp import make_folder

REAL = os.environ.get("LLAMA_CPP", "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_format: ChatFormat) -> tuple[Artifact, Asked, Path]:
    """A LoRA policy, what it said, and its merged folder: made once, since each test goes on from there."""
    folder = tmp_path_factory.mktemp("made")
    artifact = lora_policy(folder, tiny_format)
    (folder / "base/LICENSE.txt").write_text("You may.")
    asked = ask_policy(artifact)
    export_policy(Request(artifact, folder / "merged"), asked)
    return artifact, asked, folder / "merged"


@pytest.fixture
def at_once(made: tuple[Artifact, Asked, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports take the merged folder that is there."""
    monkeypatch.setattr("serving.gguf.ask_policy", lambda artifact: made[1])
    monkeypatch.setattr("serving.gguf.export_policy", lambda request, asked: shutil.copytree(made[2], request.out))


def says(asked: Asked, **behaviour: Any) -> dict[str, Any]:
    """A llama.cpp that says what the policy says."""
    answers = {
        " ".join(map(str, answer.prompt_ids)): list(zip(answer.greedy_ids, answer.logprobs, strict=False))
        for answer in asked.answers
    }
    return {"answers": answers, **behaviour}


def test_ollama_gets_a_quantized_file_with_the_policys_tokenizer_and_a_modelfile(
    made: tuple[Artifact, Asked, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
):
    artifact, asked, _ = made
    unfinished = asked.answers[0].greedy_ids[:1]
    folder, out = make_folder(tmp_path / "llama.cpp", **says(asked, unfinished=unfinished)), tmp_path / "out"
    words = ["export", str(artifact.path), "--out", str(out), "--llama-cpp", str(folder)]
    assert main([*words, "--format", "ollama", "--quantize", "q4_k_m"]) == 0
    printed = capsys.readouterr().out
    assert "5 of 5 greedy answers are the policy's" in printed
    assert printed.endswith(f"Now: ollama create one-sft -f {out}/Modelfile && ollama run one-sft\n")
    assert "q4_k_m: 3 of 9 tensor(s) required fallback quantization" in caplog.text
    names = {"LICENSE.txt", "Modelfile", "README.md", "export.json", "one-sft-q4_k_m.gguf"}
    assert {path.name for path in out.iterdir()} == names
    note = note_of(out)
    assert (note["format"], note["file"], note["dtype"]) == ("ollama", "one-sft-q4_k_m.gguf", "float32")
    assert note["llama_cpp"].keys() == {"f32", "q4_k_m"}
    held = note["llama_cpp"]["q4_k_m"]
    assert held["max_logprob_difference"] < 1e-3 and held["furthest_behind"] < 1e-3
    assert (held["equal_prompts"], held["equal_greedy_answers"]) == (5, 5)
    assert held["equal_proof_texts"] == held["proof_texts"] > 40
    header = read_header(out / "one-sft-q4_k_m.gguf")
    assert header["general.file_type"] == "f32" and "generation" not in header["tokenizer.chat_template"]
    modelfile = (out / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./one-sft-q4_k_m.gguf\n")
    assert 'SYSTEM """Be brief."""\n' in modelfile and "PARAMETER num_ctx 160\n" in modelfile
    card = (out / "README.md").read_text()
    assert "library_name: gguf" in card and "ollama create one-sft -f Modelfile" in card
    assert "- q4_k_m: 5 of 5 greedy answers are the policy's" in card
    assert "licence files (LICENSE.txt) are copied here" in card


def changed(answers: dict[str, list[Any]], nats: float) -> dict[str, list[Any]]:
    return {prompt: [(token, logprob - nats) for token, logprob in said] for prompt, said in answers.items()}


WRONG = {
    "converter fails": (
        {"converter_says": "boom"},
        r"(?s)convert_hf_to_gguf\.py ended with status 1.*line 19\n.* boom",
    ),
    "converter lacks a package": (
        {"converter_says": "ModuleNotFoundError: No module named 'mistral_common.tokens'"},
        "Install what it lacks: .* -m pip install mistral_common$",
    ),
    "disk is full": ({"converter_says": "OSError: [Errno 28] No space left on device"}, "Free space, or name a folder"),
    "converter writes nothing": ({"writes_nothing": True}, "wrote no file; nothing was written"),
    "no BOS": ({"header": {"tokenizer.ggml.add_bos_token": False}}, "add_bos_token is False"),
    "no stop": ({"header": {"tokenizer.ggml.eos_token_id": 1}}, "eos_token_id is 1"),
    "scores all alike": ({"header": {"tokenizer.ggml.scores": [-1000.0] * 420}}, "scores are other scores"),
    "other pieces": ({"header": {"tokenizer.ggml.tokens": ["a"] * 420}}, "tokens are other pieces"),
    "two BOS": ({"keeps_bos": True}, r"5 of 5 prompts and (\d+) of \1 texts of the tokenizer proof come to other"),
    "other answers": ({"nats": 0.5}, r"served by llama\.cpp as f32, a token's log-probability differs by 0\.5"),
    "server ends": ({"server_says": "error: unknown architecture"}, r"(?s)llama-server: ended with status 1.*unknown"),
    "old server": ({"unknown_paths": ["/apply-template"]}, "did not answer as its documents say .*HTTP 404"),
}


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("case", WRONG)
def test_what_goes_wrong_is_told_and_leaves_nothing(case: str, made: tuple[Artifact, Asked, Path], tmp_path: Path):
    behaviour, words = WRONG[case]
    artifact, asked, _ = made
    told = says(asked, **behaviour)
    told["answers"] = changed(told["answers"], behaviour.get("nats", 0.0))
    folder = make_folder(tmp_path / "llama.cpp", **told)
    with pytest.raises(LlamachatError, match=words):
        export_gguf(GgufRequest(Request(artifact, tmp_path / "out"), folder))
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


@pytest.mark.usefixtures("at_once")
def test_what_differs_is_kept_where_bits_were_dropped_or_the_user_says_so(
    made: tuple[Artifact, Asked, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    artifact, asked, _ = made
    told = says(asked)
    told["answers"] = {prompt: [(7, -1.0), *said[1:]] for prompt, said in told["answers"].items()}
    folder = make_folder(tmp_path / "llama.cpp", **told)
    request = GgufRequest(Request(artifact, tmp_path / "small"), folder, quantize="q8_0")
    served = export_gguf(request).served
    assert served is not None and served.equal_greedy_answers == 0 and served.furthest_behind > 0.1
    own = replace(request.folder, out=tmp_path / "own")
    with pytest.raises(ExportError, match=r"served by llama\.cpp as f32"):
        export_gguf(GgufRequest(own, folder))
    export_gguf(GgufRequest(replace(own, may_differ=True), folder))
    assert "and 0.001 is allowed" in caplog.text


@pytest.mark.usefixtures("at_once")
def test_without_a_server_the_header_alone_is_read_and_that_is_told(
    made: tuple[Artifact, Asked, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = make_folder(tmp_path / "llama.cpp", **says(made[1]))
    (folder / "build/bin/llama-server").unlink()
    done = export_gguf(GgufRequest(Request(made[0], tmp_path / "out"), folder, quantize="f16"))
    assert done.served is None and done.file.name == "one-sft-f16.gguf"
    assert "--config Release --target llama-server" in caplog.text
    assert "The GGUF file itself was not asked." in (tmp_path / "out/README.md").read_text()


def test_a_folder_that_cannot_do_it_is_refused_before_any_work(
    made: tuple[Artifact, Asked, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_sentencepiece: bytes,
    tiny_format: ChatFormat,
):
    request = Request(made[0], tmp_path / "out")
    with pytest.raises(UsageError, match=r"is no folder.*git clone"):
        GgufRequest(request, tmp_path / "none")
    with pytest.raises(UsageError, match=r"has no convert_hf_to_gguf\.py"):
        GgufRequest(request, tmp_path)
    folder = make_folder(tmp_path / "llama.cpp")
    dynamic = lora_policy(tmp_path / "dynamic", tiny_format, rope_scaling=RopeScaling(type="dynamic", factor=2.0))
    with pytest.raises(UsageError, match=r"of the type dynamic, which llama\.cpp does not have.*--allow-difference"):
        GgufRequest(Request(dynamic, tmp_path / "out"), folder)
    (folder / "build/bin/llama-quantize").unlink()
    with pytest.raises(UsageError, match=r"--quantize q4_0: .*cmake --build .*llama-quantize\. Or take .*q8_0"):
        GgufRequest(request, folder, quantize="q4_0")
    (folder / "gguf-py").rmdir()
    monkeypatch.setattr("serving.llama_cpp.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="-m pip install gguf"):
        GgufRequest(request, folder)
    with pytest.raises(UsageError, match="is a reward model"):
        scores, _ = trained(tmp_path, tiny_sentencepiece, "full")
        GgufRequest(Request(scores, tmp_path / "out"), folder)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--format", "gguf"], "--format gguf: no --llama-cpp is given"),
        (["--quantize", "q8_0"], "--quantize q8_0: it is for GGUF files, and this is --format merged"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert main(["export", "anything", "--out", "anywhere", *words]) == 2
    assert told in capsys.readouterr().err


# -- a base without tokenizer.model


def test_a_sentencepiece_model_made_of_tokenizer_json_gives_its_ids(tiny_format: ChatFormat):
    written = tiny_format.tokenizer.fast().to_str()
    fast = load_chat_format("llama2", Tokenizer(FastBackend(written)))
    model = sentencepiece_model(fast, written)
    from sentencepiece import SentencePieceProcessor

    made: Any = SentencePieceProcessor(model_proto=model)
    for text in ("Hello there", "a   b\n\n  c", "na\u00efve \U0001f600", "1234 + 5", "</s> spelled"):
        assert made.encode(text) == tiny_format.tokenizer.encode(text)
    broken = json.loads(written)
    broken["model"]["merges"].reverse()
    with pytest.raises(TokenizerError, match=r"gives other ids in \d+ of \d+ texts"):
        sentencepiece_model(fast, json.dumps(broken))


# -- the real one


@pytest.mark.skipif(not Path(REAL, "convert_hf_to_gguf.py").is_file(), reason="LLAMA_CPP names no llama.cpp")
@pytest.mark.parametrize("has_model", [True, False])  # False: with a lengthened context too
def test_llama_cpp_itself_says_what_the_policy_says(has_model: bool, tmp_path: Path, tiny_format: ChatFormat):
    fast = Tokenizer(FastBackend(tiny_format.tokenizer.fast().to_str()))
    scaled: dict[str, Any] = {} if has_model else {"rope_scaling": RopeScaling(type="linear", factor=2.0)}
    artifact = lora_policy(tmp_path, tiny_format if has_model else load_chat_format("llama2", fast), **scaled)
    assert (artifact.path / "tokenizer.model").exists() == has_model
    done = export_gguf(GgufRequest(Request(artifact, tmp_path / "out"), Path(REAL)))
    assert done.served is not None and done.served.max_logprob_difference < 1e-3
    assert done.served.equal_greedy_answers == done.served.equal_prompts == done.served.questions
    assert done.served.equal_proof_texts == done.served.proof_texts == len(proof_prompts(tiny_format))
    assert read_header(done.file)["llama.context_length"] == (256 if has_model else 512)
