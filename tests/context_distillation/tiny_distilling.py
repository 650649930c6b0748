"""Context distillation at toy size: a recipe over a random base and a random safety model, and what the step left."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from llamachat.models.loading import save_policy
from llamachat.runs.folder import StepFolder
from pipelines.execution.inputs import find_work, stage_inputs
from pipelines.recipe.recipe import load
from tests.ppo.tiny_ppo import WORDS
from tests.sft.tiny_sft import toy_dialogs, write_dialogs
from tests.tiny_llama import tiny_llama

PREPROMPTS = ("the weather and the mat", "the other cat is that model")
DISTILLING: dict[str, Any] = {
    "preprompts": list(PREPROMPTS),
    "categories": {"the cat": ["cat-*"]},
    "samples_per_prompt": 3,
    "validation_prompts": 8,
    "test_prompts": 8,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "tuning": {"method": "full"},
    "sft": {"epochs": 1, "learning_rate": 1e-3, "examples_per_step": 8, "sample_prompts": 2},
    "rollout": {"max_new_tokens": 12},
    "tracking": {"mode": "off"},
}


def write_roomy_base(
    folder: Path, sentencepiece_model: bytes, *, stops: float = 5.8, dtype: torch.dtype = torch.float32
) -> Path:
    """A random base whose answers end after some tokens, with room for an answer template before a prompt."""
    model = tiny_llama(initializer_range=0.05, max_position_embeddings=1024, dtype=dtype)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 0.5
        model.lm_head.weight[2] = 0.0
        model.lm_head.weight[2, 0] = stops / 8**0.5
    save_policy(model, folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    return folder


def prompt(text: str, name: str, *, is_safety: bool = True, before: tuple[str, ...] = (), system: str = "") -> str:
    """A line of a file of prompts; `before` are turns that were said already."""
    messages = [{"role": "system", "content": system}] if system else []
    turns = (*before, text)
    messages += [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    return json.dumps({"prompt": messages, "is_safety": is_safety, "id": name}) + "\n"


def write_adversarial(path: Path, count: int) -> Path:
    """Different prompts that ask for something unsafe, every third of a known category, every fifth after a turn."""
    lines = []
    for number in range(count):
        name = f"{'cat' if number % 3 == 0 else 'mat'}-{number}"
        before = (f"What is {number:o}?", "the cat and the mat") if number % 5 == 4 else ()
        lines.append(prompt(f"Tell me the {WORDS[number % len(WORDS)]} {number:o}", name, before=before))
    path.write_text("".join(lines))
    return path


def write_harmless(path: Path, count: int, opening: str = "Is that") -> Path:
    path.write_text(
        "".join(prompt(f"{opening} {number:o}?", f"good-{number}", is_safety=False) for number in range(count))
    )
    return path


def write_recipe(
    path: Path, base: Path, safety: Path | None, /, *, steps: list[Any] | None = None, prompts: int = 60, **changes: Any
) -> Path:
    """A recipe of one step; `changes` go over its sections, key by key, and None takes a key out."""
    folder = path.parent
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "runs" / path.stem), "seed": 1},
        "base": {"model": str(base), "dtype": "float32", "max_tokens": 640},
        "data": {
            "sft": [{"path": str(write_dialogs(folder / "dialogs.jsonl", toy_dialogs(24)))}],
            "prompts": [{"path": str(write_harmless(folder / "prompts.jsonl", 40))}],
            "adversarial": [{"path": str(write_adversarial(folder / "adversarial.jsonl", prompts))}],
            "borderline": [{"path": str(write_harmless(folder / "borderline.jsonl", 9, "Hello"))}],
            "split": {"test": 0.2, "validation": 0.2, "judge": 0.0},
        },
        "scoring": {"combine": "single", "safety": None if safety is None else str(safety)},
        "context_distillation": DISTILLING,
        **SECTIONS,
    }
    for name, section in changes.items():
        values[name] = values.get(name, {}) | section
    path.write_text(yaml.safe_dump(values | {"steps": steps or ["distill"]}, sort_keys=False))
    return path


def step_of(recipe: Path, name: str = "distill") -> StepFolder:
    return StepFolder(recipe.parent / "runs" / recipe.stem / name)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary_of(step: StepFolder) -> dict[str, float]:
    return json.loads(step.summary.read_text())


def batches_in(step: StepFolder) -> list[dict[str, Any]]:
    """The prompts' answers by how they were asked for, training side first."""
    paths = sorted(step.sampling.glob("batch-*.json"))
    return [groups for path in paths for groups in json.loads(path.read_text())["groups"]]


def inputs_of(recipe_path: Path, name: str = "distill", *overrides: str) -> tuple[Any, Any]:
    """The section and the inputs of a step, as `pipelines` hands them to the stage."""
    recipe = load(recipe_path, list(overrides))
    work = find_work(recipe, recipe.step(name))
    return work.step.config, stage_inputs(recipe, work)
