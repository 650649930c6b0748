"""A recipe of toy files, for the tests of configuration, pipelines and command line: no model is ever loaded."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from llamachat.runs.artifacts import Artifact, Kind, Manifest, publish
from llamachat.runs.inputs import StepInputs
from pipelines.execution.run import run_chosen
from pipelines.recipe.recipe import Recipe, choose_steps
from reward.config import Config as RewardConfig
from sft.config import Config

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def write_yaml(path: Path, values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def write_base(folder: Path) -> Path:
    """What a recipe needs to see of a base: a shape and some bytes as weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def write_lines(path: Path, lines: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_dialogs(path: Path, count: int = 40) -> Path:
    return write_lines(path, ({"messages": [*user_messages(n), said(f"Answer {n}.")]} for n in range(count)))


def write_pairs(path: Path, count: int = 40) -> Path:
    pairs = ((said(f"Answer {n}."), said(f"No answer {n}.")) for n in range(count))
    return write_lines(
        path,
        ({"prompt": user_messages(n), "chosen": [one], "rejected": [other]} for n, (one, other) in enumerate(pairs)),
    )


def user_messages(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Question {number}?"}]


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def recipe_values(folder: Path, **sections: Any) -> dict[str, Any]:
    """A recipe whose base, data and run lie in `folder`; `sections` replace whole sections."""
    base, dialogs = write_base(folder / "base"), write_dialogs(folder / "dialogs.jsonl")
    values: dict[str, Any] = {
        "run": {"dir": str(folder / "runs" / "one")},
        "base": {"model": str(base)},
        "data": {"sft": [{"path": str(dialogs)}]},
    }
    return {**values, **sections}


def write_recipe(folder: Path, **sections: Any) -> Path:
    return write_yaml(folder / "recipe.yaml", recipe_values(folder, **sections))


def preference_data(folder: Path) -> dict[str, Any]:
    """Sources for `data`: dialogs, and pairs of both kinds."""
    helpful, safe = write_pairs(folder / "helpfulness.jsonl"), write_pairs(folder / "safety.jsonl", 30)
    return {
        "sft": [{"path": str(write_dialogs(folder / "dialogs.jsonl"))}],
        "helpfulness": [{"path": str(helpful)}],
        "safety": [{"path": str(safe)}],
    }


def publish_toy_policy(config: Config, inputs: StepInputs) -> Artifact:
    """In place of `sft.run`: publishes at once, with the learning rate as its weights."""
    return _publish("policy", inputs, f"{config.learning_rate} {inputs.policy.digest if inputs.policy else ''}")


def publish_toy_reward_model(config: RewardConfig, inputs: StepInputs) -> Artifact:
    """In place of `reward.run`: publishes at once; its figures depend on the margin, the auxiliary loss and the seed."""
    margin = {"none": 0.50, "small": 0.60, "large": 0.65}[config.margin]
    figures = {
        f"rm/{inputs.which}/test/{inputs.which}/accuracy": margin + inputs.run.seed / 100,
        f"rm/{inputs.which}/test/{inputs.which}/pairs": 100,
        f"rm/{inputs.which}/auroc": 0.7 + 0.1 * config.safety_auxiliary_weight,
    }
    folder = inputs.folder
    folder.summary.write_text(json.dumps(figures))
    return _publish("reward_model", inputs, f"{config.margin} {inputs.policy.digest if inputs.policy else ''}")


def run_command(
    recipe: Recipe, command: str, *, only: Sequence[str] = (), should_overwrite: bool = False
) -> list[Artifact]:
    """Run the steps of one command, or all, as the command line does; the artifacts of those that are done."""
    chosen = choose_steps(recipe.steps, command, only)
    return run_chosen(recipe, chosen, should_overwrite=should_overwrite).artifacts


def _publish(kind: Kind, inputs: StepInputs, weights: str) -> Artifact:
    manifest = Manifest(
        kind=kind,
        step=inputs.step,
        fingerprint=inputs.fingerprint,
        identity=inputs.identity,
        seed=inputs.run.seed,
    )

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text(weights)

    return publish(inputs.folder, manifest, write)
