"""Rounds of rejection sampling at toy size: a recipe over a random base, a reward function in a file, and what they left."""

import json
from pathlib import Path
from typing import Any

import yaml

from llamachat.answers.groups import Group
from llamachat.chat_format import TrainOn, load_chat_format
from llamachat.chat_format.dialog import Message
from llamachat.chat_format.tokenizer import SentencePieceBackend, Tokenizer
from llamachat.runs.artifacts import Artifact
from llamachat.runs.folder import StepFolder
from pipelines.execution.inputs import find_work, stage_inputs
from pipelines.recipe.recipe import load
from tests.fakes import train_sentencepiece
from tests.ppo.tiny_ppo import write_function, write_prompts
from tests.sft.tiny_sft import toy_dialogs, write_dialogs
from tests.tiny_llama import publish_policy, scripted_llama

ROUND: dict[str, Any] = {
    "samples_per_prompt": 6,
    "sweep_temperatures": [0.8, 1.2],
    "sweep_prompts": 4,
    "sweep_samples": 4,
    "validation_prompts": 6,
    "test_prompts": 8,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "tuning": {"method": "full"},
    "sft": {"epochs": 1, "learning_rate": 1e-3, "examples_per_step": 8, "sample_prompts": 2},
    "rollout": {"max_new_tokens": 12},
    "tracking": {"mode": "off"},
}


def write_recipe(
    path: Path, base: Path, /, *, steps: list[Any] | None = None, prompts: int = 60, **changes: Any
) -> Path:
    """A recipe of one round whose reward counts the letter t; `changes` go over its sections, key by key."""
    folder = path.parent
    if not (folder / "prompts.jsonl").exists():
        write_prompts(folder / "prompts.jsonl", prompts)
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "runs" / path.stem), "seed": 1},
        "base": {"model": str(base), "dtype": "float32", "max_tokens": 96},
        "data": {
            "sft": [{"path": str(write_dialogs(folder / "dialogs.jsonl", toy_dialogs(24)))}],
            "prompts": [{"path": str(folder / "prompts.jsonl")}],
            "split": {"test": 0.2, "validation": 0.2, "judge": 0.0},
        },
        "scoring": {"combine": write_function(folder / "letter.py")},
        "rejection_sampling": ROUND,
        **SECTIONS,
    }
    for name, section in changes.items():
        values[name] = values.get(name, {}) | section
    path.write_text(yaml.safe_dump(values | {"steps": steps or ["rs"]}, sort_keys=False))
    return path


def paris(folder: Path, vocabulary: int = 420) -> Artifact:
    """A policy that says Paris, whatever it is asked."""
    chat_format = load_chat_format(
        "llama2", Tokenizer(SentencePieceBackend(train_sentencepiece(vocab_size=vocabulary)))
    )
    example = chat_format.encode_dialog(
        (Message("user", "What?"), Message("assistant", "Paris")), train_on=TrainOn.EVERY_ANSWER
    )
    first = example.loss_mask.index(True)
    model = scripted_llama(list(dict.fromkeys(example.input_ids[first - 1 :])))  # it has a space on both sides
    return publish_policy(folder, model, chat_format, base="large")


def step_of(recipe: Path, name: str = "rs") -> StepFolder:
    return StepFolder(recipe.parent / "runs" / recipe.stem / name)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def groups_of(step: StepFolder) -> list[Group]:
    """All groups that the round sampled, training side first."""
    return [
        Group(**values)
        for path in sorted(step.sampling.glob("batch-*.json"))
        for values in json.loads(path.read_text())["groups"]
    ]


def summary_of(step: StepFolder) -> dict[str, float]:
    return json.loads(step.summary.read_text())


def inputs_of(recipe_path: Path, name: str = "rs", *overrides: str) -> tuple[Any, Any]:
    """The section and the inputs of a round, as `pipelines` hands them to the stage."""
    recipe = load(recipe_path, list(overrides))
    work = find_work(recipe, recipe.step(name))
    return work.step.config, stage_inputs(recipe, work)
