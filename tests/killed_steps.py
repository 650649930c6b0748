"""Steps that sample, under kills: commands that are forked from one process with the libraries loaded, die at a chosen
file operation in their run folder, and write down each call of their engine."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat.runs.folder import StepFolder
from llamachat.runs.record import MetricsRecord, SamplesRecord
from tests.sft.test_resume import ENVIRONMENT, FORKING, ROOT

# Batches of a few prompts, no pictures (they take longer than all else), and a line for each call of the engine when its
# answers are there. `{modules}` are those that draw, with what they draw by.
PREAMBLE = """
import json, os, re, signal, sys
import peft, sft.train
from importlib import import_module
from llamachat.rollout.decoder import LlamaEngine
for module, names in {patched}.items():
    for name, value in names.items():
        setattr(import_module(module), name, (lambda *_: None) if value is None else value)
generate = LlamaEngine.generate

def told(self, prompts, **given):
    found = generate(self, prompts, **given)
    with open(sys.argv[1], "a") as stream:
        stream.write(json.dumps([given["sampling"].seed, len(prompts), given["samples_per_prompt"]]) + chr(10))
    return found

LlamaEngine.generate = told
"""
_FIRST_LINES = "import json, os, re, signal, sys\nimport peft, sft.train, llamachat.tracking.curves\n"

Call = tuple[int, int, int]  # seed, prompts, answers to each


@dataclass
class Commands:
    """One command of `llamachat` in processes of its own."""

    command: str
    process: "subprocess.Popen[str]"
    calls: Path
    log: Path

    def run(self, recipe: Path, *, kill_on: str = "$^") -> int:
        """The exit status, or -9 where it was killed: where "the last file operation; this one" fits the pattern."""
        assert self.process.stdin and self.process.stdout
        order = {"arguments": [self.command, "--config", str(recipe)], "kill_at": -1, "kill_on": kill_on}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status, _ = json.loads(self.process.stdout.readline())
        return status

    def sampled(self) -> list[Call]:
        """The calls of the engine since the last question."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.write_text("")
        return [(seed, prompts, answers) for seed, prompts, answers in map(json.loads, lines)]

    def words(self) -> str:
        return self.log.read_text()


@contextmanager
def open_commands(folder: Path, command: str, patched: dict[str, dict[str, Any]]) -> Iterator[Commands]:
    """Processes of a command in which names of modules have other values; None stands for a function that does nothing."""
    assert FORKING.strip().startswith(_FIRST_LINES)
    script = FORKING.replace(_FIRST_LINES, PREAMBLE.replace("{patched}", repr(patched)))
    log = folder / "stderr"
    with (
        log.open("a") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", script, str(folder / "calls")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
        ) as process,
    ):
        yield Commands(command, process, folder / "calls", log)


def results(step: StepFolder) -> dict[str, Any]:
    """What a step made, without what the clock and the machine put in."""
    volatile = ("time", "throughput/", "memory/")

    def lasting(values: dict[str, Any]) -> list[tuple[str, Any]]:
        return [(name, values[name]) for name in sorted(values) if not name.startswith(volatile)]

    stored = {path.name: json.loads(path.read_text()) for path in sorted(step.sampling.glob("[a-z]*.json"))}
    for values in stored.values():
        if "figures" in values:
            values["figures"] = lasting(values["figures"])
    return {
        "weights": {path.name: path.read_bytes() for path in step.artifact.glob("*.safetensors")},
        "dialogs": {path.name: path.read_bytes() for path in step.dialogs.glob("*.jsonl")},
        "stored": stored,
        "record": [lasting(row) for row in MetricsRecord(step.metrics).read()],
        "samples": [lasting(row) for row in SamplesRecord(step.samples).read()],
        "summary": lasting(json.loads(step.summary.read_text())),
    }
