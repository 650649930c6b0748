"""A folder that looks like llama.cpp's: a converter that writes small GGUF files, and a quantizer that copies them.

It shares no code with the export: the names of the tensors and the order of a rotated pair are written out here. What a
test puts into `behaviour.json` changes what the programs do.
"""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}


def make_folder(folder: Path, **behaviour: Any) -> Path:
    """The folder with its programs, which behave as they should but for `behaviour`."""
    (folder / "build/bin").mkdir(parents=True)
    for path, function in (("convert_hf_to_gguf.py", "convert"), ("build/bin/llama-quantize", "quantize")):
        lines = [f"#!{sys.executable}", "import sys", f"sys.path.insert(0, {str(ROOT)!r})"]
        lines += [f"from tests.serving.fake_llama_cpp import {function}", f"{function}({str(folder)!r}, sys.argv[1:])"]
        (folder / path).write_text("\n".join(lines) + "\n")
        (folder / path).chmod(0o755)
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    return folder


def convert(folder: str, arguments: list[str]) -> None:
    from safetensors.torch import load_file
    from sentencepiece import SentencePieceProcessor

    gguf: Any = import_module("gguf")
    behaviour = json.loads((Path(folder) / "behaviour.json").read_text())
    print(*(f"line {line}" for line in range(20)), sep="\n")
    if said := behaviour.get("converter_says"):
        sys.exit(said)
    if behaviour.get("writes_nothing"):
        return
    model, out = Path(arguments[0]), arguments[arguments.index("--outfile") + 1]
    config = json.loads((model / "config.json").read_text())
    tokenizer: Any = SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    known, size = range(tokenizer.vocab_size()), config["vocab_size"]
    writer = gguf.GGUFWriter(out, "llama")
    values = {
        "tokens": [*map(tokenizer.id_to_piece, known), *(f"[PAD{n}]" for n in range(len(known), size))],
        "scores": [*map(tokenizer.get_score, known), *[-10000.0] * (size - len(known))],
        "bos": 1,
        "eos": 2,
        "adds_bos": True,
        **behaviour.get("header", {}),
    }
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(values["tokens"])
    writer.add_token_scores(values["scores"])
    writer.add_bos_token_id(values["bos"])
    writer.add_eos_token_id(values["eos"])
    writer.add_add_bos_token(values["adds_bos"])
    writer.add_chat_template(json.loads((model / "tokenizer_config.json").read_text())["chat_template"])
    for file in model.glob("*.safetensors"):
        for name, weight in load_file(file).items():
            place, _, kind = name.removesuffix(".weight").removeprefix("model.").rpartition("layers.")[2].partition(".")
            head = config["hidden_size"] // config["num_attention_heads"]
            if kind.endswith(("q_proj", "k_proj")) and not behaviour.get("keeps_order"):
                halves = [list(range(first, first + head // 2)) for first in range(0, len(weight), head)]
                weight = weight[[row + step for half in halves for row in half for step in (0, head // 2)]]
            weight = weight.float().numpy() * behaviour.get("scale", 1.0)
            writer.add_tensor(f"blk.{place}.{NAMES[kind]}.weight" if kind else f"{NAMES[place]}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(folder: str, arguments: list[str]) -> None:
    source, out, kind = arguments
    assert kind == kind.upper()
    shutil.copyfile(source, out)
    print("llama_model_quantize_impl: WARNING: 3 of 9 tensor(s) required fallback quantization")
