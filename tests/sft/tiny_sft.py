"""SFT at toy size: a random base with the tiny tokenizer as a model folder, short dialogs, and what a stage is handed."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llamachat.config.sections import Data, DataSource, Rollout, Split, Tuning
from llamachat.models.loading import save_policy
from llamachat.runs.artifacts import Artifact
from llamachat.runs.inputs import StepInputs
from llamachat.training.policy import load_start
from llamachat.training.session import Session, resume
from sft.config import Config
from sft.train import load_dialogs
from sft.tuning import Tuning as Dialogs
from sft.tuning import plan_training
from tests.tiny_llama import tiny_llama
from tests.tiny_steps import toy_inputs, write_values

FULL = Tuning()
SPLIT = Split(test=0, validation=0.2, judge=0)
SELDOM = {"sample_every": 1000, "eval_every": 1000, "save_every": 1000}
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
    tuning: Tuning = FULL,
    split: Split = SPLIT,
    tracking: dict[str, Any] | None = None,
    policy: Artifact | None = None,
    **base_changes: Any,
) -> StepInputs:
    """What `pipelines` would hand to the stage for a run in `folder`."""
    source = DataSource(path=str(write_dialogs(folder / "dialogs.jsonl", dialogs)))
    return toy_inputs(
        "sft",
        folder,
        base,
        base_changes=base_changes,
        tracking=SELDOM | (tracking or {}),
        tuning=tuning,
        data=Data(sft=(source,), split=split),
        rollout=Rollout(),
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
    values: dict[str, dict[str, Any]] = {
        "base": {"dtype": "bfloat16", "max_tokens": 96},
        "data": {"sft": [{"path": str(dialogs)}], "split": {"test": 0.0, "validation": 0.15, "judge": 0.0}},
        "sft": {"epochs": 2},
        "tracking": {"sample_every": 4, "eval_every": 3, "save_every": 2},
    }
    return write_values(path, base, values, steps=["sft"], **(sections or {}))
