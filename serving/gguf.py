"""Export a policy as a GGUF file for llama.cpp, LM Studio or Ollama.

The adapter is merged as with `--format merged`; llama.cpp's converter writes the file and its quantizer shrinks it. The
file is read back with the package `gguf`: tokenizer, chat template and shape must be the policy's, and the weights the
merged model's, up to rounding. llama.cpp adds one BOS to a prompt and removes the chat template's for it, so
`add_bos_token` must be true although the template writes BOS.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
from sentencepiece import SentencePieceProcessor
from transformers import LlamaConfig

from llamachat.chat_format import ChatFormat, load_chat_format
from llamachat.chat_format.proof import proof_prompts
from llamachat.chat_format.tokenizer import LLAMA2_IDS, FastBackend, SentencePieceBackend, Tokenizer, load_tokenizer
from llamachat.errors import TokenizerError, UsageError
from llamachat.models.hub import LICENCE_FILES
from llamachat.models.loading import context_length, rope_parameters
from llamachat.models.weights import folder_weights
from llamachat.runs.atomic import incoming_folder, write_json
from serving.export import (
    CHAT_TEMPLATE,
    NOTE,
    ExportError,
    PolicySnapshot,
    Request,
    base_folder,
    export_policy,
    take_snapshot,
    write_notes,
)
from serving.model_card import model_card, plain_name

log = logging.getLogger(__name__)

CONVERTER, QUANTIZER = "convert_hf_to_gguf.py", "llama-quantize"
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # formats the converter writes directly
LAST_LINES = 12
NEWER = "Nothing was written. Take a newer llama.cpp."
_KINDS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}  # the converter's names of dtypes
# Sampling parameters of `llamachat chat`; Ollama's defaults include top-k, min-p and penalties.
PARAMETERS = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "min_p": 0, "repeat_penalty": 1}
QUOTE = '"""'
MOST_DIFFERENCE = 0.6  # relative to a tensor's RMS: two bits give 0.3, different weights more than 1


@dataclass(frozen=True, slots=True)
class GgufRequest:
    """An export: what to write, and where."""

    folder: Request  # for the merged folder read by the converter, and the output path
    llama_cpp: Path
    form: Literal["gguf", "ollama"] = "gguf"
    quantize: str | None = None  # None keeps the dtype of the weights

    def __post_init__(self) -> None:
        manifest = self.folder.artifact.manifest
        if manifest.kind != "policy":
            raise UsageError(
                f"--format {self.form}: {self.folder.artifact.path} is a reward model. llama.cpp and Ollama write answers, "
                "and it scores them. Export it with --format merged."
            )
        _package()
        _require_llama_cpp(self.llama_cpp, self.quantize or "f32")
        rope = manifest.details.get("rope_parameters", {})
        if rope.get("rope_type") == "dynamic" and not self.folder.may_differ:
            raise UsageError(
                f"--format {self.form}: the policy's context was lengthened by base.rope_scaling of the type dynamic, "
                "which llama.cpp does not have. In dialogs longer than the base's own context it would answer otherwise, "
                "and no short question shows that. Train with the type linear, or write it with --allow-difference."
            )
        if self.form == "ollama":
            check_system(manifest.details.get("system") or "")


def export_gguf(request: GgufRequest) -> tuple[Path, float]:
    """Write the folder with the GGUF file and check it; return the file and its `weight_difference`."""
    snapshot = take_snapshot(request.folder.artifact)
    own = _KINDS[str(snapshot.dtype).removeprefix("torch.")]
    quantization = request.quantize or own
    with incoming_folder(request.folder.out) as side:
        merged = side / "merged"
        export_policy(replace(request.folder, out=merged), snapshot)
        _prepare(merged, snapshot)
        exact = quantization if quantization in CONVERTED else own
        file = side / f"{plain_name(snapshot.name)}-{exact}.gguf"
        log.info("converting it with %s", request.llama_cpp)
        converter = [sys.executable, str(request.llama_cpp / CONVERTER), str(merged)]
        _run([*converter, "--outfile", str(file), "--outtype", exact, "--model-name", snapshot.name], file)
        check_header(read_header(file), merged, snapshot.chat_format)
        if quantization != exact:
            larger, file = file, side / f"{plain_name(snapshot.name)}-{quantization}.gguf"
            quantizer = _program(request.llama_cpp, QUANTIZER)
            output = _run([str(quantizer), str(larger), str(file), quantization.upper()], file)
            for line in re.findall(r"\d+ of \d+ tensor\(s\) required fallback quantization", output):
                log.warning("%s: %s, since their rows do not divide into its blocks", quantization, line)
            larger.unlink()
        difference = weight_difference(file, merged)
        _finish(request, side, file, snapshot, {"quantization": quantization, "weight_difference": difference})
    return request.folder.out / file.name, difference


def _prepare(merged: Path, snapshot: PolicySnapshot) -> None:
    """Prepare the folder for the converter: tokenizer.model, chat template without markers, lengthened context."""
    plain = snapshot.chat_format.plain_chat_template
    (merged / CHAT_TEMPLATE).write_text(plain, encoding="utf-8")
    _change(merged / "tokenizer_config.json", chat_template=plain)
    config = LlamaConfig.from_pretrained(str(merged))
    if rope_parameters(config)["rope_type"] == "linear":  # llama.cpp supports no more positions, whatever the factor
        _change(merged / "config.json", max_position_embeddings=context_length(config))
    tokenizer = snapshot.chat_format.tokenizer
    if tokenizer.sentencepiece_model is None and not _is_byte_level(tokenizer):
        tokenizer_json = (merged / "tokenizer.json").read_text(encoding="utf-8")
        (merged / "tokenizer.model").write_bytes(sentencepiece_model(snapshot.chat_format, tokenizer_json))


def _change(file: Path, **values: Any) -> None:
    write_json(file, json.loads(file.read_text(encoding="utf-8")) | values)


def _finish(request: GgufRequest, side: Path, file: Path, snapshot: PolicySnapshot, figures: Mapping[str, Any]) -> None:
    """Replace the merged folder with card, note and licences; add Ollama's Modelfile."""
    merged = side / "merged"
    note = json.loads((merged / NOTE).read_text(encoding="utf-8"))
    note |= {"format": request.form, "file": file.name, **figures}
    if request.form == "ollama":
        text = modelfile(file.name, snapshot.chat_format, system=snapshot.system, max_tokens=snapshot.max_tokens)
        (side / "Modelfile").write_text(text, encoding="utf-8")
    write_notes(request.folder, side, base_folder(request.folder), note, model_card, name=snapshot.name)
    for licence in (path for pattern in LICENCE_FILES for path in merged.glob(pattern)):
        shutil.copyfile(licence, side / licence.name)
    shutil.rmtree(merged)


def modelfile(file: str, chat_format: ChatFormat, *, system: str | None, max_tokens: int) -> str:
    """The Modelfile for serving this GGUF file with Ollama (https://docs.ollama.com/modelfile)."""
    lines = [f"FROM ./{file}", "", f"TEMPLATE {QUOTE}{chat_format.go_template}{QUOTE}", ""]
    if system:
        check_system(system)
        lines += [f"SYSTEM {QUOTE}{system}{QUOTE}", ""]
    lines += [f"PARAMETER {name} {value}" for name, value in {"num_ctx": max_tokens, **PARAMETERS}.items()]
    # Besides the stop token, stop at the format's tags, which would be read as the next turn.
    lines += [f'PARAMETER stop "{tag}"' for tag in chat_format.forbidden]
    return "\n".join(lines) + "\n"


def check_system(system: str) -> None:
    """Raise if Ollama's parser would drop a character of the system text, one not printable according to Go."""
    lost = sorted({c for c in system if c not in " \t\n\r" and unicodedata.category(c)[0] in "CZ"})
    if QUOTE in system or lost:
        culprit = "three quotes in a row" if QUOTE in system else f"the character {lost[0]!a}"
        raise UsageError(
            f"--format ollama: the policy's system text holds {culprit}, which a Modelfile cannot quote. The policy was "
            "trained with exactly that text. Export with --format gguf, and send the system text yourself."
        )


def _require_llama_cpp(folder: Path, quantization: str) -> None:
    """Raise if the llama.cpp folder lacks what this quantization needs."""
    if not (folder / CONVERTER).is_file():
        raise UsageError(
            f"--llama-cpp: '{folder}' has no {CONVERTER}, which writes the file. It is in llama.cpp's source code, not "
            "in its binary packages. Get it with `git clone https://github.com/ggml-org/llama.cpp` and name its folder."
        )
    if quantization not in CONVERTED and _program(folder, QUANTIZER) is None:
        raise UsageError(
            f"--quantize {quantization}: {folder} has no compiled {QUANTIZER}, which is required. Build it: cmake -B "
            f"{folder}/build -S {folder} && cmake --build {folder}/build --config Release --target {QUANTIZER}. Or use "
            f"a type that does not need it: {', '.join(CONVERTED)}."
        )


def _program(folder: Path, name: str) -> Path | None:
    places = [folder / place / name for place in ("build/bin", "bin", ".")]
    return next((place.resolve() for place in places if place.is_file() and os.access(place, os.X_OK)), None)


def _run(command: list[str], out: Path) -> str:
    """Run a program that writes `out` and return its output; raise an error with its last lines if it fails."""
    # Nothing is downloaded, and nothing is written to the user's folders.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, **pipes, env=environment, text=True, errors="replace")
    if done.returncode == 0 and out.is_file():
        return done.stdout
    state = f"ended with status {done.returncode}" if done.returncode else "wrote no file"
    last = "\n".join(f"    {line}" for line in done.stdout.strip().splitlines()[-LAST_LINES:])
    raise ExportError(f"{' '.join(command)} {state}. Its last lines:\n{last}\nFix what they name. {NEWER}")


def _package() -> Any:
    try:
        return import_module("gguf")
    except ImportError as error:
        raise UsageError(
            f"--format gguf, ollama: the package gguf, which reads the file back, cannot be imported ({error}). Install "
            f"llamachat with its extra 'gguf', or: {sys.executable} -m pip install gguf"
        ) from error


def read_header(file: Path) -> dict[str, Any]:
    """The GGUF file's key-value metadata."""
    return {key: field.contents() for key, field in _package().GGUFReader(file).fields.items()}


def check_header(header: Mapping[str, Any], merged: Path, chat_format: ChatFormat) -> None:
    """Raise if the file's tokenizer, chat template or shape differs from the merged folder's."""
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(merged)
    expected: dict[str, tuple[Any, Any]] = {  # key -> required value, value if absent
        "llama.block_count": (config["num_hidden_layers"], None),
        "llama.context_length": (config["max_position_embeddings"], None),
        "tokenizer.ggml.model": ("gpt2" if _is_byte_level(tokenizer) else "llama", None),
        "tokenizer.ggml.bos_token_id": (tokenizer.bos_id, None),
        "tokenizer.ggml.eos_token_id": (tokenizer.eos_id, None),
        "tokenizer.ggml.add_eos_token": (False, False),
        "tokenizer.chat_template": (chat_format.plain_chat_template, None),
    }
    if not _is_byte_level(tokenizer):  # if no BOS is added, llama.cpp keeps the chat template's
        expected |= {"tokenizer.ggml.add_bos_token": (True, True), "tokenizer.ggml.add_space_prefix": (True, True)}
    values = {key: header.get(key, default) for key, (_, default) in expected.items()}
    faults = [f"{key} is {values[key]!r:.40}" for key, (right, _) in expected.items() if values[key] != right]
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    if list(header.get("tokenizer.ggml.tokens", ()))[: len(pieces)] != pieces:
        faults.append("tokenizer.ggml.tokens are other pieces")
    if _is_byte_level(tokenizer):
        merges = json.loads((merged / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
        written = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        if list(header.get("tokenizer.ggml.merges", ())) != written:
            faults.append("tokenizer.ggml.merges are other merges")
        _refuse(faults)
        return
    processor = SentencePieceProcessor(model_file=str(merged / "tokenizer.model"))
    # Only the scores decide which pieces are merged first.
    scores = [processor.get_score(token) for token in range(len(pieces))]
    if list(header.get("tokenizer.ggml.scores", ()))[: len(pieces)] != scores:
        faults.append("tokenizer.ggml.scores are other scores")
    _refuse(faults)


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    return isinstance(tokenizer.backend, FastBackend) and tokenizer.backend.is_byte_level


def _refuse(faults: list[str]) -> None:
    if faults:
        raise ExportError(f"the GGUF file: {'; '.join(faults)}. It has to hold the policy's own. {NEWER}")


def weight_difference(file: Path, merged: Path) -> float:
    """Maximum relative RMS difference of a tensor from the merged model's; raises if the weights do not match."""
    gguf = _package()
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    largest = 0.0
    for name, weight in folder_weights(merged):
        own = weight.float().numpy()
        if (projection := name.split(".")[-2]) in heads:  # llama.cpp interleaves the two halves of a rotated pair
            own = own.reshape(heads[projection], 2, -1, own.shape[-1]).swapaxes(1, 2).reshape(own.shape)
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",)) or name]
        error = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(own.shape) - own
        difference = float(np.sqrt(np.mean(np.square(error)) / np.mean(np.square(own))))
        if not difference <= MOST_DIFFERENCE:
            raise ExportError(
                f"{file.name}: '{name}' differs from the policy's by {difference:.2f} of its size. {NEWER}"
            )
        largest = max(largest, difference)
    return largest


def sentencepiece_model(chat_format: ChatFormat, tokenizer_json: str) -> bytes:
    """A tokenizer.model with the ids of `chat_format`, for a base published with only `tokenizer.json`.

    llama.cpp's converter reads pieces and scores from it; without it, every piece gets the same score, and text is
    tokenized differently. A piece's score is the rank of the first merge that creates it, as SentencePiece merges in
    that order.
    """
    model = _model(json.loads(tokenizer_json)["model"])
    rebuilt = load_chat_format(chat_format.name, Tokenizer(SentencePieceBackend(model)))
    prompts = proof_prompts(chat_format)
    wrong = sum(rebuilt.encode_prompt(messages) != chat_format.encode_prompt(messages) for messages in prompts)
    if wrong:
        raise TokenizerError(
            f"tokenizer.json: a SentencePiece model built from it, which llama.cpp needs, gives other ids in {wrong} of "
            f"{len(prompts)} texts. Put the tokenizer.model of the original base into the artifact, and export again."
        )
    return model


def _model(bpe: Mapping[str, Any]) -> bytes:
    scores: dict[str, float] = {}
    for rank, merge in enumerate(bpe["merges"]):
        scores.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), -float(rank))
    proto: Any = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    kinds = proto.SentencePiece
    special = {0: kinds.UNKNOWN, LLAMA2_IDS.bos: kinds.CONTROL, LLAMA2_IDS.eos: kinds.CONTROL}
    pieces = sorted(bpe["vocab"], key=bpe["vocab"].get)
    for token, piece in enumerate(pieces):
        is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
        kind = special.get(token, kinds.BYTE if is_byte else kinds.NORMAL)
        score = scores.get(piece, -len(scores) - 1.0 if kind == kinds.NORMAL else 0.0)
        proto.pieces.add(piece=piece, score=score, type=kind)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size, trainer.byte_fallback = trainer.BPE, len(pieces), True
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, LLAMA2_IDS.bos, LLAMA2_IDS.eos, -1
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = normalizer.escape_whitespaces = True
    normalizer.remove_extra_whitespaces = False
    return proto.SerializeToString()
