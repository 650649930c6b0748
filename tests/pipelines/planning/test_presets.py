"""The recipes for real cards: what their headers say, what `plan` says of them, and that neither needs a network."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llamachat.config.sections import hub_set
from llamachat.data.sources import SOURCES
from llamachat.memory.estimates import KNOWN_BASES
from pipelines.cli.main import main
from pipelines.planning.estimates import card, duration, estimate_step
from pipelines.planning.plan import make_plan
from pipelines.recipe.recipe import load
from tests.pipelines.cli.test_command_line import HEAVY

ROOT = Path(__file__).resolve().parents[3]
PRESETS = {
    "tinyllama-1.1b-lora": ("lora", 12),
    "llama2-7b-qlora": ("qlora", 24),
    "llama2-7b-lora": ("lora", 80),
    "llama2-13b-qlora": ("qlora", 24),
    "llama2-70b-qlora": ("qlora", 80),
    "llama2-7b-full-fsdp": ("full", 80),
}
OFFLINE = """
import socket, sys
def refuse(*given, **named):
    raise AssertionError("a network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from pipelines.cli.main import main
assert main(sys.argv[1:]) == 0
assert not [name for name in HEAVY if name in sys.modules]
"""


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


TRAINED = ("sft", "rm/helpfulness", "rm/safety", "rm/judge")  # what the table of training has


@pytest.mark.parametrize("arguments", [["plan"], ["sft", "--dry-run"]])
@pytest.mark.parametrize("name", PRESETS)
def test_a_plan_takes_seconds_and_no_network_no_weights_no_torch(name: str, arguments: list[str]) -> None:
    code = OFFLINE.replace("HEAVY", repr(HEAVY))
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, "--config", f"configs/{name}.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - started < 5
    assert "optimizer steps" in done.stdout and "(MFU)" in done.stdout and "\n    fits " in done.stdout
    assert "warning" not in done.stdout


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_card_and_its_header_says_what_plan_says(name: str) -> None:
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    recipe = load(f"configs/{name}.yaml")
    steps, gpu = [step for step in recipe.steps if step.name in TRAINED], card(recipe)
    estimates = [estimate for step in steps if (estimate := estimate_step(recipe, step)) is not None]
    assert tuple(step.name for step in steps) == TRAINED
    assert len(estimates) == len(steps) and gpu is not None
    method, most = PRESETS[name]
    assert {step.tuning.method for step in steps} == {method} and gpu.gib <= most
    assert max(estimate.peak_bytes for estimate in estimates) <= gpu.usable_bytes
    sft, *models = [f"{estimate.peak_bytes / 2**30:.1f}" for estimate in estimates]
    assert f"# Memory: {sft} GiB at the peak" in text and f"({models[0]} for reward models)" in text
    assert {*models} == {models[0]} and "not measured" in text and "# Card: " in text
    assert ("Gated: " in text) == KNOWN_BASES[recipe.base.model].is_gated
    counts = " + ".join(str(estimate.optimizer_steps) for estimate in estimates)
    row = f"| `{name}.yaml` | {recipe.base.model} | {method} | {gpu} | {sft}, {models[0]} | {counts} |"
    times = " + ".join(duration(estimate.seconds) for estimate in estimates)
    assert f"{row} {times} |" in (ROOT / "docs" / "presets.md").read_text()


@pytest.mark.parametrize("name", [name for name, (method, _) in PRESETS.items() if method != "full"])
def test_ppo_of_a_preset_fits_its_card_and_the_table_says_what_plan_says(name: str) -> None:
    recipe = load(f"configs/{name}.yaml")
    gpu, steps = card(recipe), {step.name: step for step in recipe.steps}
    estimate, evaluated = (estimate_step(recipe, steps[name]) for name in ("ppo", "eval"))
    assert estimate is not None and evaluated is not None and gpu is not None
    assert max(estimate.peak_bytes, evaluated.peak_bytes) <= gpu.usable_bytes
    peak = f"{estimate.peak_bytes / 2**30:.1f}"
    row = f"| `{name}.yaml` | {gpu} | {peak} | {estimate.optimizer_steps} | {duration(estimate.seconds)} |"
    assert row in (ROOT / "docs" / "presets.md").read_text(), row


@pytest.mark.parametrize("name", PRESETS)
def test_each_number_of_a_preset_says_where_it_comes_from(name: str) -> None:
    lines = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    body = lines[lines.index("sft:") :]
    origin = re.compile(r"# (paper, [0-9.]+|paper, Table [0-9]+|ours)")
    assert [line for line in body if re.search(r"[0-9]", line.partition("#")[0]) and not origin.search(line)] == []
    for index, line in enumerate(lines):
        if re.match(r"(base|tuning|  split):", line):
            assert re.search(r"paper|[Oo]urs", line + lines[index - 1]) or "pretrained" in line, line


def test_the_sets_of_the_presets_are_named_with_their_split_and_format() -> None:
    for name in PRESETS:
        data = load(f"configs/{name}.yaml").data
        for kind, sources in (
            ("dialog", (*data.sft, *data.labels)),
            ("preference", (*data.helpfulness, *data.safety, *data.open)),
        ):
            for source in sources:
                assert hub_set(source.path) is not None and ":" in source.path
                assert source.format == "native" or SOURCES[source.format].kind == kind


def test_rows_as_the_sets_hold_them_are_read(tmp_path: Path) -> None:
    row = {
        "prompt": "Why is the sky blue?",
        "prompt_id": "7c1",
        "messages": [
            {"role": "user", "content": "Why is the sky blue?"},
            {"role": "assistant", "content": "Scattering."},
        ],
        "category": "Open QA",
    }
    (tmp_path / "no_robots.jsonl").write_text(json.dumps(row) + "\n")
    dolly = {"instruction": "Name a color.", "context": "", "response": "Blue.", "category": "open_qa"}
    (tmp_path / "dolly.jsonl").write_text(json.dumps(dolly) + "\n")
    assert main(["data", "check", str(tmp_path / "no_robots.jsonl"), "--kind", "dialog", "--format", "native"]) == 0
    assert main(["data", "check", str(tmp_path / "dolly.jsonl"), "--kind", "dialog", "--format", "dolly"]) == 0


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_understands_its_files(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = f"configs/accelerate/{name}.yaml"
    found: Any = load_config_from_file(path)
    assert found.num_processes == 8 and found.mixed_precision == "no"
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(found.fsdp_config) <= known
    if name == "fsdp2":
        assert found.fsdp_config["fsdp_version"] == 2
        for told in (path, "configs/llama2-7b-full-fsdp.yaml"):
            assert "not run on GPUs" in Path(told).read_text() or "has not been run on GPUs" in Path(told).read_text()


# -- plan


def test_plan_on_another_card_says_that_it_does_not_fit_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "configs/llama2-7b-lora.yaml", "--gpu", "24GiB"]) == 0
    out = capsys.readouterr().out
    assert "does not fit 24 GiB: " in out and "a step should need at most 21.6 of 24 GiB" in out
    assert "DOES NOT FIT 24 GiB" in out and "It would fit with sft.gradient_checkpointing=true" in out
    assert main(["sft", "--dry-run", "--config", "configs/llama2-7b-lora.yaml", "run.gpu=24GiB"]) == 0
    assert "It would fit with sft.gradient_checkpointing=true" in capsys.readouterr().out
    assert main(["plan", "--config", "configs/llama2-7b-lora.yaml", "--gpu", "abacus"]) == 2
    assert "run.gpu: 'abacus' is no card that is known." in capsys.readouterr().err


def test_plan_of_hub_sets_without_a_limit_counts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.sft.0.limit=null", "data.sft.1.limit=null"]
    assert main(["plan", "--config", "configs/llama2-7b-qlora.yaml", *overrides]) == 0
    assert "optimizer steps and hours: not counted before download" in capsys.readouterr().out
    step, *_ = make_plan(load("configs/llama2-7b-qlora.yaml", overrides))
    assert step.estimate is not None and step.estimate.memory and step.estimate.optimizer_steps is None


def test_plan_of_an_unknown_base_says_why_it_estimates_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "configs/llama2-7b-qlora.yaml", "base.model=owner/unknown"]) == 0
    assert "no estimate: the shape of 'owner/unknown' is not known" in capsys.readouterr().out
