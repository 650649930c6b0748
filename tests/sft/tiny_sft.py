"""SFT at toy size: a random base with the tiny tokenizer as a model folder, short dialogs, and what a stage is handed."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from llamachat.config.sections import Base, Data, DataSource, Rollout, Run, Split, Tracking, Tuning
from llamachat.models.loading import save_policy
from llamachat.runs.artifacts import Artifact, StepFolder
from llamachat.runs.inputs import StepInputs
from llamachat.training.session import Session, resume
from sft.config import Config
from sft.train import load_dialogs, load_start
from sft.tuning import Tuning as Dialogs
from sft.tuning import plan_training
from tests.tiny_llama import base_section, tiny_llama

LORA = Tuning(method="lora", rank=4, alpha=8)
QUIET = {"mode": "off", "sample_every": 1000, "eval_every": 1000, "save_every": 1000}
PLACES = ("the mat", "the weather", "Paris", "France", "a model", "one sentence", "the other cat", "the capital")


def write_base(folder: Path, sentencepiece_model: bytes, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model folder as a user would have one: weights, config.json and tokenizer.model."""
    save_policy(tiny_llama(dtype=dtype, initializer_range=0.05, **changes), folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model)
    return folder


def pair(question: str, answer: str, **marks: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **marks}]


def toy_dialogs(count: int) -> list[list[dict[str, Any]]]:
    """Different first questions, answers of different lengths, every third one with a second turn."""
    dialogs = []
    for number in range(count):
        name = f"{number:o}"  # the digits that the tiny tokenizer knows are 0 to 7
        messages = pair(f"What is {name}?", " and ".join(PLACES[number % 5 :][: 1 + number % 3]) + f" {name}.")
        if number % 3 == 2:
            messages += pair("Thanks!", "You are welcome.")
        dialogs.append(messages)
    return dialogs


def write_dialogs(path: Path, dialogs: Sequence[list[dict[str, Any]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in dialogs))
    return path


def inputs_of(
    folder: Path,
    base: Path,
    dialogs: Sequence[list[dict[str, Any]]],
    *,
    tuning: Tuning | None = None,
    split: Split | None = None,
    tracking: dict[str, Any] | None = None,
    policy: Artifact | None = None,
    **base_changes: Any,
) -> StepInputs:
    """What `pipelines` would hand to the stage for a run in `folder`."""
    source = DataSource(path=str(write_dialogs(folder / "dialogs.jsonl", dialogs)))
    return StepInputs(
        step="sft",
        folder=StepFolder(folder / "runs" / "one" / "sft"),
        identity={"step": "sft"},
        fingerprint="0" * 64,
        run=Run(dir=str(folder / "runs" / "one"), seed=3),
        base=base_section(base, **base_changes),
        tuning=tuning or Tuning(),
        data=Data(sft=(source,), split=split or Split(test=0, validation=0.2, judge=0)),
        rollout=Rollout(),
        tracking=Tracking(**(QUIET | (tracking or {}))),
        policy=policy,
    )


@contextmanager
def open_session(config: Config, inputs: StepInputs) -> Iterator[tuple[Session, Dialogs]]:
    """The stage up to where it begins to train, as `sft.train.run` builds it."""
    resumed = resume(inputs, "sft", config)
    start = load_start(inputs)
    examples = load_dialogs(config, inputs, start.chat_format)
    plan = plan_training(config, inputs, examples, device=start.device)
    tuning = Dialogs(config, inputs, start.model, start.chat_format, examples, plan)
    with resumed.session(tuning, prefix="sft", unit="dialog") as session:
        yield session, tuning


def write_recipe(path: Path, base: Path, dialogs: Path, sections: dict[str, dict[str, Any]] | None = None) -> Path:
    """A recipe of one SFT step for the command line; `sections` are merged into its sections."""
    values: dict[str, Any] = {
        "run": {"dir": str(path.parent / "runs" / path.stem), "seed": 1},
        "base": {"model": str(base), "dtype": "bfloat16", "max_tokens": 96},
        "tuning": {"method": "full"},
        "data": {"sft": [{"path": str(dialogs)}], "split": {"test": 0.0, "validation": 0.15, "judge": 0.0}},
        "steps": ["sft"],
        "sft": {"epochs": 2, "learning_rate": 1e-3, "examples_per_step": 8, "sample_prompts": 2},
        "tracking": {"mode": "off", "sample_every": 4, "eval_every": 3, "save_every": 2},
    }
    for name, section in (sections or {}).items():
        values[name] = values[name] | section
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


__all__ = ["LORA", "Base", "inputs_of", "open_session", "pair", "toy_dialogs", "write_base", "write_recipe"]
