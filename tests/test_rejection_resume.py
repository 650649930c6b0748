"""A round under kills: the same command continues, samples nothing twice, and ends with an uninterrupted round's files."""

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

from llamachat.tracking.record import MetricsRecord, SamplesRecord
from tests.test_sft_resume import ENVIRONMENT, FORKING, ROOT
from tests.tiny_ppo import write_stopping_base
from tests.tiny_rounds import read_lines, step_of, summary_of, write_recipe

# Batches of a few prompts, no curves (they take longer than all else), and a line for each call of the engine.
PREAMBLE = """
import json, sys
from llamachat.answers import groups
from llamachat.rollout.decoder import LlamaEngine
import rejection_sampling.round, sft.train
groups.ANSWERS_PER_BATCH = 60
rejection_sampling.round.draw_curves = sft.train.draw_curves = lambda *_: None
generate = LlamaEngine.generate

def told(self, prompts, *, samples_per_prompt, sampling, advance=None):
    found = generate(self, prompts, samples_per_prompt=samples_per_prompt, sampling=sampling, advance=advance)
    with open(RECIPE[0] + ".calls", "a") as stream:
        stream.write(json.dumps([sampling.seed, sampling.temperature, samples_per_prompt, prompts, len(self_of(self))]) + "\\n")
    return found

def self_of(engine):
    return ""

RECIPE = [""]
LlamaEngine.generate = told
"""


@dataclass
class Commands:
    """`llamachat rs` in processes of its own."""

    process: "subprocess.Popen[str]"
    operations: int = 0  # of the last command, in its run folder

    def run(self, recipe: Path, *, kill_at: int = -1, kill_on: str = "$^") -> int:
        """The exit status, or -9 where it was killed."""
        assert self.process.stdin and self.process.stdout
        order = {"arguments": ["rs", "--config", str(recipe)], "kill_at": kill_at, "kill_on": kill_on}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        status, self.operations = json.loads(self.process.stdout.readline())
        return status
