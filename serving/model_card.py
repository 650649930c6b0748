"""The model card of an exported folder: what the model is, what made it, what was measured, how to load it, licences.

Reads the manifest and, where the run is still around the artifact, the step's `summary.json` and `config.yaml`, the
manifests of the steps before it, and the run's evaluation. No text of the users' data is in it, and of their files only
names. The front matter is in the form that the hub reads.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from llamachat.config.paths import bundled
from llamachat.models.hub import LICENCE_FILES
from llamachat.runs.artifacts import Artifact
from llamachat.runs.reader import step_of
from llamachat.tables import markdown_table
from serving import measured, provenance

# The licence of a base by the beginning of its hub name: the hub's short name for it, and what it asks for.
_LICENCES = {
    "meta-llama/Llama-2": (
        "llama2",
        "The base is under the Llama 2 Community License, which covers this derived model too: whoever passes it on "
        "gives a copy of that agreement with it, keeps the notice 'Llama 2 is licensed under the LLAMA 2 Community "
        "License, Copyright (c) Meta Platforms, Inc. All Rights Reserved.', and holds to Meta's Acceptable Use Policy.",
    ),
    "TinyLlama/": ("apache-2.0", "The base is under the Apache License 2.0, which asks to keep its notices."),
}
_OF_THE_DATA = (
    "other",
    "The base comes with llamachat, whose code is under the Apache License 2.0. Both it and this model learnt from texts"
    " under the licences of `assets/base/README.md` and of the data above; some (CC BY-SA, CDLA-Sharing) ask for the same"
    " licence on what is made from them. Read them before you pass the model on.",
)
# The section of a recipe by command, where it has another name.
_SECTIONS = {"rm": "reward", "rs": "rejection_sampling", "distill": "context_distillation"}
# By format, what loads it.
_LIBRARIES = {"merged": "transformers", "adapter": "peft", "gguf": "gguf", "ollama": "gguf"}
NO_SYSTEM = "none added (`base.system` is null); dialogs and their sources may bring their own"
_TUNED = {"full": "all weights tuned", "lora": "LoRA", "qlora": "QLoRA (LoRA on a base in NF4)"}


@dataclass(frozen=True)
class Facts:
    """What the card tells about."""

    artifact: Artifact
    name: str
    base: Path  # the folder with the weights that are not the adapter's
    note: Mapping[str, Any]  # the content of export.json

    @property
    def details(self) -> Mapping[str, Any]:
        return self.artifact.manifest.details

    @cached_property
    def steps(self) -> list[Artifact]:
        """The policies that led here, and this artifact last."""
        return provenance.chain(self.artifact)

    @property
    def origin(self) -> str:
        """The base that all began with."""
        return provenance.origin(self.steps)


def model_card(facts: Facts) -> str:
    """README.md of the exported folder, with the front matter that the hub reads."""
    parts = (
        front_matter(facts),
        _what(facts),
        _intended_use(),
        _how_to_load(facts),
        made_by(facts),
        data(facts),
        training(facts),
        _evaluation(facts),
        _agreement(facts),
        _limits(facts),
        licence(facts),
    )
    return joined(parts)


def joined(parts: Iterable[str]) -> str:
    """The parts of a card with an empty line between them."""
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def front_matter(facts: Facts, task: str = "text-generation", kinds: Sequence[str] = ("sft",)) -> str:
    """What the hub reads."""
    short_name, _ = _licence_of(facts)
    read = provenance.sources(facts.steps, kinds)
    hub_names = sorted({name for source in read for name in source.hub_names})
    base = provenance.hub_name(facts.steps)
    values = {
        "library_name": _LIBRARIES[facts.note["format"]],
        "pipeline_tag": task,
        "license": short_name,
        # What the hub asks for beside `other`.
        **(
            {"license_name": "licences-of-the-training-data", "license_link": "README.md"}
            if short_name == "other"
            else {}
        ),
        "base_model": base,
        # The language of a user's data is not known; that of the bundled ones is.
        "language": ["en"] if read and all(source.origins is not None for source in read) else None,
        "datasets": hub_names,
        "tags": ["llama", "llamachat", *(["lora"] if facts.note["format"] == "adapter" else [])],
        "model-index": measured.model_index(facts.artifact, facts.name, task),
    }
    return f"---\n{yaml.safe_dump({key: value for key, value in values.items() if value}, sort_keys=False)}---\n"


def _what(facts: Facts) -> str:
    details, note = facts.details, facts.note
    merged = "" if note["onto"] is None else f", merged onto the {note['onto']} weights of its base"
    kind = "The LoRA adapter of a chat model; it needs its base" if note["format"] == "adapter" else "A chat model"
    system = details.get("system")
    text = (
        f"# {facts.name}\n\n{kind}. Made with llamachat by the recipe of Llama 2 (arXiv:2307.09288), step "
        f"`{facts.artifact.manifest.step}`.\n\n"
        f"- base: `{facts.origin}`\n"
        f"- tuning: {_TUNED[note['method']]}{merged}\n"
        f"- weights: {note['dtype'] if 'file' not in note else note['quantization'] + ' in ' + note['file']}\n"
        f"- chat format: {details['chat_format']}, as the tokenizer's chat template has it\n"
        f"- longest dialog in training: {details['max_tokens']} tokens\n"
    )
    if system is None:
        return text + f"- system text: {NO_SYSTEM}\n"
    return text + f"\nTrained with this system text; send it as the first message:\n\n{block(system)}"


def _how_to_load(facts: Facts) -> str:
    if "file" in facts.note:
        return _how_to_serve(facts)
    is_adapter = facts.note["format"] == "adapter"
    system = facts.details.get("system")
    messages = [{"role": "user", "content": "Hello, who are you?"}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    code = ["from transformers import AutoModelForCausalLM, AutoTokenizer", "", 'folder = "."']
    code += (
        _adapter_code(facts)
        if is_adapter
        else ['model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto")']
    )
    code += [
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f"messages = {messages!r}",
        'prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        "output = model.generate(**prompt.to(model.device), max_new_tokens=256, do_sample=True, temperature=0.7, top_p=0.9)",
        'print(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n## Loading\n\n" + block("\n".join(code), "python")


def _how_to_serve(facts: Facts) -> str:
    file, context = facts.note["file"], facts.details["max_tokens"]
    lines = [f"llama-server -m {file} --jinja -c {context}     # then http://127.0.0.1:8080, or any OpenAI client"]
    lines.append(f"llama-cli -m {file} --jinja -c {context}")
    if facts.note["format"] == "ollama":
        name = plain_name(facts.name)
        lines += [f"ollama create {name} -f Modelfile", f"ollama run {name}"]
    return (
        "\n## Serving\n\n"
        + block("\n".join(lines), "sh")
        + "\nThe chat template is in the file; llama.cpp puts one BOS in "
        "front. A prompt that is sent as text must not begin with one.\n"
    )


def plain_name(name: str) -> str:
    """The policy's name in the characters that file names and Ollama take."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")


def _adapter_code(facts: Facts) -> list[str]:
    config = json.loads((facts.base / "config.json").read_text(encoding="utf-8"))
    rope = facts.details["rope_parameters"]
    imports = ["from peft import PeftModel", f"base = {facts.note['adapter_base']!r}"]
    arguments = [f"dtype={facts.note['dtype']!r}", 'device_map="auto"']
    if rope.get("rope_type", "default") != "default" and config.get("rope_parameters") != rope:
        imports += ["from transformers import AutoConfig", "config = AutoConfig.from_pretrained(base)"]
        imports += [f"config.rope_parameters = {rope!r}  # the context was lengthened in training"]
        arguments.append("config=config")
    if facts.note["method"] == "qlora":
        imports += ["import torch", "from transformers import BitsAndBytesConfig"]
        imports += [
            'nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, '
            "bnb_4bit_compute_dtype=torch.bfloat16)"
        ]
        arguments.append("quantization_config=nf4")
    return [
        *imports,
        f"model = AutoModelForCausalLM.from_pretrained(base, {', '.join(arguments)})",
        "model = PeftModel.from_pretrained(model, folder)",
    ]


def made_by(facts: Facts) -> str:
    """The steps that led here."""
    return "\n".join(["\n## How it was made\n", *provenance.step_lines(facts.steps)]) + "\n"


def data(facts: Facts, kinds: Sequence[str] = ("sft",)) -> str:
    """What all these steps read; `kinds` are those of a step that does not say."""
    lines = list(provenance.source_lines(provenance.sources(facts.steps, kinds)))
    if not lines:
        return ""
    head = [
        "\n## Data\n",
        "What these steps read, for learning, for prompts and for measuring. A part was kept from training.",
        "",
    ]
    return "\n".join([*head, *lines])


def training(facts: Facts) -> str:
    """Settings, figures and versions of the last step."""
    manifest = facts.artifact.manifest
    lines = [f"\n## Training of step `{manifest.step}`\n"]
    command = str(manifest.identity.get("command", ""))
    section = manifest.identity.get(_SECTIONS.get(command, command), {})
    settings = {**manifest.identity.get("tuning", {}), **(section if isinstance(section, dict) else {})}
    shown = {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
    end = step_of(facts.artifact).ending
    if end is not None and end.key in shown:
        shown[end.key] = end.count
    if shown:
        lines += [*markdown_table([("setting", "value"), *((key, str(value)) for key, value in shown.items())]), ""]
    figures = measured.own_figures(facts.artifact)
    if figures:
        lines += [*measured.table(figures), "What each figure is: docs/metrics.md of llamachat.", ""]
    dropped = provenance.dropped_lines(facts.steps)
    lines += (
        ["Records left out or shortened, by step:", "", *dropped, ""]
        if dropped
        else ["These steps left no record out and shortened none.", ""]
    )
    versions = {
        key: value for key, value in manifest.versions.items() if key in ("torch", "transformers", "trl", "peft")
    }
    lines.append(f"Seed {manifest.seed}; " + ", ".join(f"{key} {value}" for key, value in versions.items()) + ".")
    return "\n".join(lines) + "\n"


def _evaluation(facts: Facts) -> str:
    found = measured.evaluated(facts.artifact)
    if not found:
        return ""
    head = [
        "\n## Evaluation\n",
        "On held-out prompts, as the run's step `eval` measured them; differences and win rates are against the run's first"
        " policy, prompt by prompt.",
        "",
    ]
    return "\n".join([*head, *measured.table(found)])


def _limits(facts: Facts) -> str:
    lines = measured.limits(facts.artifact, is_tiny=is_tiny(facts))
    return "\n".join(["\n## Limits\n", *lines]) + "\n"


def is_tiny(facts: Facts) -> bool:
    """Whether all began with the tiny base that comes with this code."""
    return Path(facts.origin).resolve() == bundled("assets/base") or facts.origin == "assets/base"


def _intended_use() -> str:
    return (
        "\n## Intended use\n\nFor studying how chat models are made, and as a start for an assistant of your own that"
        " answers questions like those of its data. Not for advice on health, law or money, not for decisions about people,"
        " and not in front of the public before you have tested it for your own use, harmful requests included.\n"
    )


def _agreement(facts: Facts) -> str:
    note = facts.note
    return (
        "\n## Held against the policy\n\n"
        f"On {note['tokens']} tokens of answers to {note['questions']} built-in questions, log-probabilities differ from "
        f"those of the trained policy by at most {note['max_logprob_difference']:.4f} nats (mean "
        f"{note['mean_logprob_difference']:.4f}); {note['equal_greedy_answers']} of {note['questions']} greedy answers are "
        f"the same.\n{_file(note)}"
    )


def _file(note: Mapping[str, Any]) -> str:
    if "file" not in note:
        return ""
    return (
        "\nThis is the merged model that the GGUF file was made of. Weights of the file differ from its weights by at most "
        f"{note['weight_difference']:.2%} of a tensor's size (root mean square).\n"
    )


def licence(facts: Facts) -> str:
    """Under what the exported folder may be passed on."""
    files = sorted(file.name for pattern in LICENCE_FILES for file in facts.base.glob(pattern))
    _, text = _licence_of(facts)
    copied = f" Its licence files ({', '.join(files)}) are copied here." if files else ""
    is_copied = facts.note["format"] != "adapter" and facts.note["method"] != "full"
    return f"\n## Licence\n\n{text}{copied if is_copied else ''} The licences of the data, told above, apply as well.\n"


def _licence_of(facts: Facts) -> tuple[str | None, str]:
    base = facts.origin
    if is_tiny(facts):
        return _OF_THE_DATA
    for beginning, found in _LICENCES.items():
        if base.startswith(beginning):
            return found
    return None, f"This model derives from `{base}` and is under the licence of that base; see its own card."


def block(text: str, language: str = "") -> str:
    """Fenced, with a fence that the text itself does not hold."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}\n"
