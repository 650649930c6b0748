"""PPO at toy size: a random policy, a reward function in a file, and what the stage is handed."""

import json
from pathlib import Path
from typing import Any

import torch

from llamachat.config.sections import Data, DataSource, Rollout, Scoring, Split, Tuning
from llamachat.models.loading import save_policy
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from ppo.config import Config
from tests.tiny_llama import LORA, tiny_llama
from tests.tiny_steps import toy_inputs

SHORT: dict[str, Any] = {"max_new_tokens": 12}
WORDS = ("cat", "mat", "model", "weather", "capital", "sentence", "Paris", "France")

# What the policy is paid for: each letter t that it writes, less a little for length.
LETTER = """
def score(prompts, completions, scores, **columns):
    return [{sign} * text.count("t") / (1 + len(text)) for text in completions]
"""
PAYS = LETTER.replace(" / (1 + len(text))", "")


def write_stopping_base(
    folder: Path, sentencepiece_model: bytes, *, stops: float = 5.8, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """A random base whose answers end after some tokens: all its states share a direction, and EOS lies along it."""
    model = tiny_llama(initializer_range=0.05, dtype=dtype, **changes)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] += 0.5
        model.lm_head.weight[2] = 0.0
        model.lm_head.weight[2, 0] = stops / 8**0.5
    save_policy(model, folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    return folder


def write_prompts(path: Path, count: int) -> Path:
    """Different questions in the words and digits that the tiny tokenizer knows; every third asks for something unsafe."""
    lines = []
    for number in range(count):
        text = f"What is the {WORDS[number % len(WORDS)]} {number:o}?"
        lines.append({"prompt": [{"role": "user", "content": text}], "is_safety": number % 3 == 0, "id": f"q{number}"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_function(path: Path, text: str = LETTER, *, sign: int = 1) -> str:
    """A file with a reward function, by the name that a recipe gives it."""
    path.write_text(text.format(sign=sign))
    return f"{path}:score"


def config_of(**changes: Any) -> Config:
    """A few small iterations."""
    values: dict[str, Any] = {
        "iterations": 3,
        "responses_per_iteration": 16,
        "responses_per_minibatch": 8,
        "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "validation_every": 2,
        "validation_prompts": 8,
        "test_prompts": 8,
        "save_every": 2,
    }
    return Config(**(values | changes))


def inputs_of(
    folder: Path,
    base: Path,
    *,
    prompts: int = 60,
    run: str = "one",
    policy: Artifact | None = None,
    reward_models: dict[str, Artifact] | None = None,
    scoring: dict[str, Any] | None = None,
    tuning: Tuning = LORA,
    rollout: dict[str, Any] | None = None,
    **base_changes: Any,
) -> StepInputs:
    """What `pipelines` would hand to the stage; without `scoring` a function pays for the letter t."""
    file = folder / "prompts.jsonl"
    if not file.exists():
        write_prompts(file, prompts)
    if scoring is None:
        scoring = {"combine": write_function(folder / "letter.py")}
    return toy_inputs(
        "ppo",
        folder,
        base,
        run=run,
        base_changes=base_changes,
        tracking={},
        tuning=tuning,
        data=Data(sft=(), prompts=(DataSource(path=str(file)),), split=Split(test=0.2, validation=0.2, judge=0)),
        rollout=Rollout(**(SHORT | (rollout or {}))),
        scoring=Scoring(**scoring),
        policy=policy,
        reward_models=reward_models or {},
    )
