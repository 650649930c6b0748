"""Steps under kills: commands that are forked from one process with the libraries loaded, die at a chosen file operation
in their run folder, and write down each call of their engine. Importing the libraries takes longer than the steps.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat.runs.artifacts import StepFolder
from llamachat.runs.record import MetricsRecord, SamplesRecord

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# Reads {"arguments": [...], "kill_at": n, "kill_on": pattern} a line; is killed at its n-th file operation in the run
# folder, or where "the last one; this one" fits the pattern; answers with the exit status and the number of such operations.
# A line for each call of the engine is written when its answers are there.
FORKING = """
import json, os, re, signal, sys
import peft, sklearn.model_selection, sklearn.feature_extraction.text, sklearn.linear_model
from importlib import import_module
from llamachat.rollout.decoder import LlamaEngine
from pipelines.cli.main import main

for module, names in json.loads(sys.argv[2]).items():
    for name, value in names.items():
        setattr(import_module(module), name, (lambda *_: None) if value is None else value)
generate = LlamaEngine.generate

def counted_generate(self, prompts, **settings):
    groups = generate(self, prompts, **settings)
    with open(sys.argv[1], "a") as stream:
        stream.write(json.dumps([settings["sampling"].seed, len(prompts), settings["samples_per_prompt"]]) + chr(10))
    return groups

LlamaEngine.generate = counted_generate

def child(order, counted):
    os.dup2(2, 1)
    count, before = 0, ""
    def hook(event, arguments):
        nonlocal count, before
        if event == "open" or event.startswith(("os.", "shutil.")):
            paths = [str(a) for a in arguments if isinstance(a, (str, os.PathLike)) and "/runs/" in str(a)]
            count += bool(paths)
            now = " ".join([event, *paths])
            if paths and (count == order["kill_at"] or re.search(order["kill_on"], f"{before}; {now}")):
                os.kill(os.getpid(), signal.SIGKILL)
            before = now if paths else before
    sys.addaudithook(hook)
    status = main(order["arguments"])
    os.write(counted, str(count).encode())
    return status

for line in sys.stdin:
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = child(json.loads(line), writing)
        finally:
            os._exit(status)
    os.close(writing)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([status, int(os.read(reading, 20) or 0)]), flush=True)
    os.close(reading)
"""

Call = tuple[int, int, int]  # of the engine: seed, prompts, answers to each


@dataclass
class Commands:
    """One command of `llamachat` in processes of its own."""

    command: str
    process: "subprocess.Popen[str]"
    calls: Path
    log: Path
    operations: int = 0  # of the last command, in its run folder

    def run(self, recipe: Path, *overrides: str, kill_at: int = -1, kill_on: str = "$^") -> int:
        """The exit status, or -9 where it was killed: at an operation by number, or where two in a row fit the pattern."""
        assert self.process.stdin and self.process.stdout
        self.log.write_text("")
        arguments = [self.command, "--config", str(recipe), *overrides]
        self.process.stdin.write(json.dumps({"arguments": arguments, "kill_at": kill_at, "kill_on": kill_on}) + "\n")
        self.process.stdin.flush()
        status, self.operations = json.loads(self.process.stdout.readline())
        return status

    def sampled(self) -> Counter[Call]:
        """The calls of the engine since this was asked last."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.write_text("")
        return Counter((seed, prompts, answers) for seed, prompts, answers in map(json.loads, lines))

    def words(self) -> str:
        """What the last command printed."""
        return self.log.read_text()


@contextmanager
def open_commands(folder: Path, command: str, modules: Mapping[str, Mapping[str, Any]]) -> Iterator[Commands]:
    """Processes of a command with these modules loaded, in which some names have other values; None: does nothing."""
    calls, log = folder / "calls", folder / "stderr"
    with (
        log.open("a") as stderr,
        subprocess.Popen(
            [sys.executable, "-c", FORKING, str(calls), json.dumps(modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
        ) as process,
    ):
        yield Commands(command, process, calls, log)


def lasting(values: dict[str, Any]) -> dict[str, Any]:
    """Figures without what the clock and the machine put in."""
    return {name: value for name, value in values.items() if not name.startswith(("time", "throughput/", "memory/"))}


def lasting_rows(step: StepFolder) -> list[dict[str, Any]]:
    return [lasting(row) for row in MetricsRecord(step.metrics).read()]


def results(step: StepFolder) -> dict[str, Any]:
    """What a step made, without what the clock and the machine put in."""
    stored = {path.name: json.loads(path.read_text()) for path in sorted(step.sampling.glob("[a-z]*.json"))}
    for values in stored.values():
        if "figures" in values:
            values["figures"] = lasting(values["figures"])
    return {
        "weights": {path.name: path.read_bytes() for path in step.artifact.glob("*.safetensors")},
        "dialogs": {path.name: path.read_bytes() for path in step.dialogs.glob("*.jsonl")},
        "stored": stored,
        "record": lasting_rows(step),
        "samples": [lasting(row) for row in SamplesRecord(step.samples).read()],
        "summary": lasting(json.loads(step.summary.read_text())),
    }
