"""A folder that looks like llama.cpp's: a converter that writes GGUF headers, a quantizer that copies, a server.

It shares no code with what it is asked by. Its server tokenises with SentencePiece, renders the file's own template with
jinja2, puts BOS in front as llama.cpp does, and says the answers that the test put into `behaviour.json`.
"""

import json
import re
import shutil
import struct
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def make_folder(folder: Path, **behaviour: Any) -> Path:
    """The folder with its programs built, which behave as they should but for `behaviour`."""
    (folder / "build/bin").mkdir(parents=True)
    (folder / "gguf-py").mkdir()
    for path, function in (
        ("convert_hf_to_gguf.py", "convert"),
        ("build/bin/llama-quantize", "quantize"),
        ("build/bin/llama-server", "serve"),
    ):
        lines = [f"#!{sys.executable}", "import sys", f"sys.path.insert(0, {str(ROOT)!r})"]
        lines += [
            f"from tests.serving.fake_llama_cpp import {function}",
            f"{function}({str(folder)!r}, sys.argv[1:])",
            "",
        ]
        (folder / path).write_text("\n".join(lines))
        (folder / path).chmod(0o755)
    (folder / "behaviour.json").write_text(json.dumps(behaviour))
    return folder


def behaviour_of(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "behaviour.json").read_text())


def convert(folder: str, arguments: list[str]) -> None:
    from sentencepiece import SentencePieceProcessor

    behaviour = behaviour_of(folder)
    for line in range(20):
        print(f"line {line}")
    if said := behaviour.get("converter_says"):
        print(said, file=sys.stderr)
        sys.exit(1)
    if behaviour.get("writes_nothing"):
        return
    model = Path(arguments[0])
    out = Path(arguments[arguments.index("--outfile") + 1])
    shutil.copyfile(model / "tokenizer.model", Path(folder) / "tokenizer.model")
    tokenizer: Any = SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    known = range(tokenizer.vocab_size())
    pairs = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*map(tokenizer.id_to_piece, known), *(f"[PAD{n}]" for n in range(len(known), size))],
        "tokenizer.ggml.scores": [*map(tokenizer.get_score, known), *[-10000.0] * (size - len(known))],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": json.loads((model / "tokenizer_config.json").read_text())["chat_template"],
        "general.file_type": arguments[arguments.index("--outtype") + 1],
    }
    (Path(folder) / "template.jinja").write_text(pairs["tokenizer.chat_template"])
    pairs |= behaviour.get("header", {})
    out.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(pairs)) + b"".join(map(pair, pairs.items())))


def pair(entry: tuple[str, Any]) -> bytes:
    key, value = entry
    return text(key) + typed(value)


def typed(value: Any) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value[0], str):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return struct.pack(f"<IIQ{len(value)}f", 9, 6, len(value), *value)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def quantize(folder: str, arguments: list[str]) -> None:
    source, out, kind = arguments
    assert kind == kind.upper()
    shutil.copyfile(source, out)
    print("llama_model_quantize_impl: WARNING: 3 of 9 tensor(s) required fallback quantization")


def serve(folder: str, arguments: list[str]) -> None:
    behaviour = behaviour_of(folder)
    if said := behaviour.get("server_says"):
        sys.exit(said)
    option = dict(pairwise(arguments))
    assert option["--host"] == "127.0.0.1"
    assert option["-m"].endswith(".gguf") and Path(option["-m"]).is_file()
    Handler.state = State(Path(folder), behaviour)
    HTTPServer(("127.0.0.1", int(option["--port"])), Handler).serve_forever()


class State:
    def __init__(self, folder: Path, behaviour: dict[str, Any]) -> None:
        from jinja2 import Environment
        from sentencepiece import SentencePieceProcessor

        self.tokenizer: Any = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        environment = Environment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = lambda message: 1 / 0
        self.template = environment.from_string((folder / "template.jinja").read_text())
        self.behaviour = behaviour
        self.ready_at = time.monotonic() + 0.2

    def prompt(self, messages: list[dict[str, str]]) -> str:
        rendered = self.template.render(messages=messages, bos_token="<s>", eos_token="</s>")
        return rendered if self.behaviour.get("keeps_bos") else rendered.removeprefix("<s>")

    def ids(self, prompt: str) -> list[int]:
        special = {"<unk>": 0, "<s>": 1, "</s>": 2}
        parts = [part for part in re.split("(<unk>|<s>|</s>)", prompt) if part]
        found = [[special[part]] if part in special else self.tokenizer.encode(part) for part in parts]
        return [1, *(token for ids in found for token in ids)]

    def answer(self, prompt: str, length: int) -> dict[str, Any]:
        ids = self.ids(prompt)
        said = self.behaviour["answers"].get(" ".join(map(str, ids)), [[5, -1.0]])
        tokens = [{"id": token, "logprob": logprob} for token, logprob in said[:length]]
        # As the real one leaves out the probability of a token that leaves a character unfinished.
        told = [token for token in tokens if token["id"] not in self.behaviour.get("unfinished", ())]
        return {
            "tokens": [token["id"] for token in tokens],
            "completion_probabilities": told,
            "tokens_evaluated": len(ids),
        }


class Handler(BaseHTTPRequestHandler):
    state: State

    def do_GET(self) -> None:
        self.send(200 if time.monotonic() > self.state.ready_at else 503, {"status": "ok"})

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path in self.state.behaviour.get("unknown_paths", ()):
            self.send(404, {"error": {"message": "File Not Found"}})
        elif self.path == "/apply-template":
            self.send(200, {"prompt": self.state.prompt(content["messages"])})
        elif self.path == "/tokenize":
            assert content["add_special"] and content["parse_special"]
            self.send(200, {"tokens": self.state.ids(content["content"])})
        else:
            assert self.path == "/completion" and content["temperature"] == 0.0 and content["return_tokens"]
            self.send(200, self.state.answer(content["prompt"], content["n_predict"]))

    def send(self, status: int, content: Any) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
