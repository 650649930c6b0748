"""The model card of an exported folder: what the model is, what made it, how to load it, and under which licence.

Reads the manifest and, where the step's folder is still around the artifact, its `summary.json` and `config.yaml`.
Figures are those of the training; no text of the users' data is in it, and of their files only names.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llamachat.models.hub import LICENCE_FILES
from llamachat.runs.artifacts import Artifact
from llamachat.runs.folder import StepFolder

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
_TUNED = {"full": "all weights tuned", "lora": "LoRA", "qlora": "QLoRA (LoRA on a base in NF4)"}


@dataclass(frozen=True, slots=True)
class Facts:
    """What the card tells about."""

    artifact: Artifact
    name: str
    base: Path  # the folder with the weights that are not the adapter's
    note: Mapping[str, Any]  # the content of export.json

    @property
    def details(self) -> Mapping[str, Any]:
        return self.artifact.manifest.details

    @property
    def step(self) -> StepFolder:
        return StepFolder(self.artifact.path.parent)


def model_card(facts: Facts) -> str:
    """README.md of the exported folder, with the front matter that the hub reads."""
    parts = (
        front_matter(facts),
        _what(facts),
        _how_to_load(facts),
        training(facts),
        _agreement(facts),
        licence(facts),
    )
    return "\n".join(parts)


def front_matter(facts: Facts, task: str = "text-generation") -> str:
    """What the hub reads."""
    short_name, _ = _licence_of(facts)
    is_adapter = facts.note["format"] == "adapter"
    values: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": task,
    }
    if short_name:
        values["license"] = short_name
    if _hub_name(facts):
        values["base_model"] = _hub_name(facts)
    values["tags"] = ["llama", "llamachat", *(["lora"] if is_adapter else [])]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _what(facts: Facts) -> str:
    details, note = facts.details, facts.note
    merged = "" if note["onto"] is None else f", merged onto the {note['onto']} weights of its base"
    kind = "The LoRA adapter of a chat model; it needs its base" if note["format"] == "adapter" else "A chat model"
    system = details.get("system")
    text = (
        f"# {facts.name}\n\n{kind}. Made with llamachat by the recipe of Llama 2 (arXiv:2307.09288), step "
        f"`{facts.artifact.manifest.step}`.\n\n"
        f"- base: `{details['base']}`\n"
        f"- tuning: {_TUNED[note['method']]}{merged}\n"
        f"- weights: {note['dtype']}\n"
        f"- chat format: {details['chat_format']}, as the tokenizer's chat template has it\n"
        f"- longest dialog in training: {details['max_tokens']} tokens\n"
    )
    if system is None:
        return text + "- system text: none in training\n"
    return text + f"\nTrained with this system text; send it as the first message:\n\n{block(system)}"


def _how_to_load(facts: Facts) -> str:
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


def training(facts: Facts, kinds: Sequence[str] = ("sft",)) -> str:
    """Settings, figures, files (of these kinds of data) and versions of the training."""
    manifest = facts.artifact.manifest
    lines = ["\n## Training\n"]
    figures = _read_json(facts.step.summary)
    command = manifest.identity.get("command", "")
    section = manifest.identity.get("reward" if command == "rm" else command, {})
    settings = {**manifest.identity.get("tuning", {}), **(section if isinstance(section, dict) else {})}
    if settings:
        shown = {key: value for key, value in settings.items() if isinstance(value, str | int | float)}
        lines += ["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in shown.items()), ""]
    if figures:
        lines += [
            "| figure | value |",
            "|---|---|",
            *(f"| {key} | {value:.6g} |" for key, value in figures.items()),
            "",
        ]
    lines += _data_lines(facts, kinds)
    dropped = manifest.dropped_records
    lines.append(f"Records left out: {sum(dropped.values())}" + ("." if not dropped else f" ({_counts(dropped)})."))
    versions = {
        key: value for key, value in manifest.versions.items() if key in ("torch", "transformers", "trl", "peft")
    }
    lines.append(f"Seed {manifest.seed}; " + ", ".join(f"{key} {value}" for key, value in versions.items()) + ".")
    return "\n".join(lines) + "\n"


def _data_lines(facts: Facts, kinds: Sequence[str]) -> list[str]:
    """The files by name; nothing where the step's configuration is not around the artifact any more."""
    try:
        recipe = yaml.safe_load(facts.step.config.read_text(encoding="utf-8"))
        lines = [_source_line(source) for kind in kinds for source in recipe["data"].get(kind, ())]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return []
    return [f"{'Dialogs' if tuple(kinds) == ('sft',) else 'Records'} were read from", "", *lines, ""]


def _source_line(source: Mapping[str, Any]) -> str:
    path = Path(source["path"])
    limit = f", at most {source['limit']} of them" if source.get("limit") else ""
    weight = f", weight {source['weight']:g}" if source.get("weight", 1.0) != 1.0 else ""
    # Where a file lay on somebody's disk is nobody's business.
    return f"- `{path.name if path.is_absolute() else path}`{limit}{weight}"


def _agreement(facts: Facts) -> str:
    note = facts.note
    return (
        "\n## Held against the policy\n\n"
        f"On {note['tokens']} tokens of answers to {note['questions']} built-in questions, log-probabilities differ from "
        f"those of the trained policy by at most {note['max_logprob_difference']:.4f} nats (mean "
        f"{note['mean_logprob_difference']:.4f}); {note['equal_greedy_answers']} of {note['questions']} greedy answers are "
        "the same.\n"
    )


def licence(facts: Facts) -> str:
    """Under what the exported folder may be passed on."""
    files = sorted(file.name for pattern in LICENCE_FILES for file in facts.base.glob(pattern))
    _, text = _licence_of(facts)
    copied = f" Its licence files ({', '.join(files)}) are copied here." if files else ""
    is_copied = facts.note["format"] == "merged" and facts.note["method"] != "full"
    return f"\n## Licence\n\n{text}{copied if is_copied else ''} The licences of the training data apply as well.\n"


def _licence_of(facts: Facts) -> tuple[str | None, str]:
    base = str(facts.details["base"])
    for beginning, found in _LICENCES.items():
        if base.startswith(beginning):
            return found
    return None, f"This model derives from `{base}` and is under the licence of that base; see its own card."


def _hub_name(facts: Facts) -> str | None:
    """The base as the hub knows it; None for a folder."""
    is_folder = facts.details.get("base_is_folder", Path(str(facts.details["base"])).is_dir())
    return None if is_folder else str(facts.details["base"])


def _read_json(path: Path) -> dict[str, float]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: value for key, value in values.items() if isinstance(value, int | float)}


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in dropped.items())


def block(text: str, language: str = "") -> str:
    """Fenced, with a fence that the text itself does not hold."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}\n"
