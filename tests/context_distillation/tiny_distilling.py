"""Context distillation at toy size: a recipe over a random base and a random safety model, and what the step left."""

import json
from pathlib import Path
from typing import Any

from tests.ppo.tiny_ppo import WORDS, write_stopping_base
from tests.sft.tiny_sft import toy_dialogs, write_dialogs
from tests.tiny_steps import SPLIT, write_values

PREPROMPTS = ("the weather and the mat", "the other cat is that model")
DISTILLING: dict[str, Any] = {
    "preprompts": list(PREPROMPTS),
    "categories": {"the cat": ["cat-*"]},
    "samples_per_prompt": 3,
    "validation_prompts": 8,
    "test_prompts": 8,
}


def write_roomy_base(folder: Path, sentencepiece_model: bytes, **changes: Any) -> Path:
    """A random base whose answers end after some tokens, with room for an answer template before a prompt."""
    return write_stopping_base(folder, sentencepiece_model, max_position_embeddings=1024, **changes)


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
        "base": {"max_tokens": 640},
        "data": {
            "sft": [{"path": str(write_dialogs(folder / "dialogs.jsonl", toy_dialogs(24)))}],
            "prompts": [{"path": str(write_harmless(folder / "prompts.jsonl", 40))}],
            "adversarial": [{"path": str(write_adversarial(folder / "adversarial.jsonl", prompts))}],
            "borderline": [{"path": str(write_harmless(folder / "borderline.jsonl", 9, "Hello"))}],
            "split": SPLIT,
        },
        "scoring": {"combine": "single", "safety": None if safety is None else str(safety)},
        "context_distillation": DISTILLING,
    }
    return write_values(path, base, values, steps=steps or ["distill"], **changes)
