"""Context distillation under kills: the same command continues, samples nothing twice that was written down, and ends with
an uninterrupted step's files."""

import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat
from llamachat.runs.record import MetricsRecord, SamplesRecord
from tests.context_distillation.tiny_distilling import step_of, summary_of, write_recipe, write_roomy_base
from tests.llamachat.models.tiny_roles import FULL, World
from tests.sft.test_resume import ENVIRONMENT, FORKING, ROOT

# Batches of a few prompts, no pictures (they take longer than all else), and a line for each call of the engine.
PREAMBLE = """
import json, os, re, signal, sys
import peft, sklearn.model_selection, sklearn.feature_extraction.text, sklearn.linear_model
import context_distillation.train, sft.train
from llamachat.answers import groups
from llamachat.rollout.decoder import LlamaEngine
groups.ANSWERS_PER_BATCH = 63
context_distillation.train.draw_curves = sft.train.draw_curves = lambda *_: None
context_distillation.train.draw_scores = context_distillation.train.draw_comparison = lambda *_: None
generate = LlamaEngine.generate

def told(self, prompts, **given):
    with open(sys.argv[1], "a") as stream:
        stream.write(json.dumps([given["sampling"].seed, len(prompts), given["samples_per_prompt"]]) + chr(10))
    return generate(self, prompts, **given)

LlamaEngine.generate = told
"""
SCRIPT = FORKING.replace(
    "import json, os, re, signal, sys\nimport peft, sft.train, llamachat.tracking.curves\n", PREAMBLE
)


@dataclass
class Commands:
    """`llamachat distill` in processes of its own."""

    process: "subprocess.Popen[str]"
    calls: Path
    operations: int = 0  # of the last command, in its run folder

    def run(self, recipe: Path, *, kill_at: int = -1, kill_on: str = "$^") -> int:
        """The exit status, or -9 where it was killed."""
        assert self.process.stdin and self.process.stdout
        order = {"arguments": ["distill", "--config", str(recipe)], "kill_at": kill_at, "kill_on": kill_on}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status, self.operations = json.loads(self.process.stdout.readline())
        return status

    def sampled(self) -> Counter[tuple[int, ...]]:
        """The calls of the engine since the last question, by seed, prompts and answers to each."""
        calls = Counter(tuple(json.loads(line)) for line in self.calls.read_text().splitlines())
        self.calls.write_text("")
        return calls


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    folder = tmp_path_factory.mktemp("log")
    assert PREAMBLE in SCRIPT
    with (
        (folder / "stderr").open("a") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(folder / "calls")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
        ) as process,
    ):
        yield Commands(process, folder / "calls")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes, tiny_format: ChatFormat) -> World:
    return World(tmp_path_factory.mktemp("roles"), tiny_format, tiny_sentencepiece, write_roomy_base)


def results(recipe: Path) -> dict[str, Any]:
    """What a step made, without what the clock and the machine put in."""
    step = step_of(recipe)
    volatile = ("time", "throughput/", "memory/")
    answers = {
        path.name: json.loads(path.read_text()) | {"figures": None}
        for path in sorted(step.sampling.glob("batch-*.json"))
    }
    others = {path.name: path.read_bytes() for path in step.sampling.glob("[a-z]*") if path.name not in answers}
    return {
        "weights": {path.name: path.read_bytes() for path in step.artifact.glob("*model.safetensors")},
        "dialogs": {path.name: path.read_bytes() for path in step.dialogs.glob("*.jsonl")},
        "answers": answers | others,
        "record": [
            [(name, row[name]) for name in sorted(row) if not name.startswith(volatile)]
            for row in MetricsRecord(step.metrics).read()
        ],
        "samples": [{k: v for k, v in row.items() if k != "time"} for row in SamplesRecord(step.samples).read()],
        "summary": {name: value for name, value in summary_of(step).items() if not name.startswith(volatile)},
    }


def test_killed_at_many_moments_it_ends_like_an_uninterrupted_step(
    commands: Commands, world: World, tmp_path: Path
) -> None:
    base, safety = Path(world.base.model), world.reward_model("safety", FULL, FULL).path
    whole, killed = (write_recipe(tmp_path / f"{name}.yaml", base, safety) for name in ("whole", "killed"))
    assert commands.run(whole) == 0
    once, operations = commands.sampled(), commands.operations
    step = step_of(killed)
    kills = 0
    moments = (
        r"; os.rename .*test-first",  # before anything of it is there
        r"; os.rename .*batch-00002",  # a batch is sampled, and not yet in its place
        r"; os.rename .*/dialogs$",  # before the dialogs are published
        r"; os.rename .*/\.incoming-step-",  # while the tuning saves a checkpoint
        r"; os.rename .*borderline-final",  # while it is compared
        r"summary\.json$",  # while the final figures are written
        r"; os.rename .*/artifact$",  # before the step ends
    )
    for moment in moments:
        kills += commands.run(killed, kill_on=moment) == -signal.SIGKILL
        assert not step.artifact.exists()
    assert kills == len(moments)
    assert commands.run(killed) == 0
    assert results(killed) == results(whole)
    repeated = commands.sampled() - once
    assert once.keys() == (repeated + once).keys(), "no other answers were ever drawn"
    # A kill costs what was being sampled: at most the three ways of one batch, or one list of test answers.
    seeds = [seed for seed, _, _ in repeated.elements()]
    assert len(seeds) <= 2 * 3 + 4 and operations > 50
