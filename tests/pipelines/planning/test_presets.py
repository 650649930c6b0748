"""The recipes for real cards: what their headers say, what `plan` says of them, and that neither needs a network."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamachat.config.gpus import parse_gpu
from llamachat.config.sections import hub_set
from llamachat.data.sources import SOURCES
from llamachat.memory.estimates import KNOWN_BASES
from llamachat.tables import duration
from pipelines.cli.main import main
from pipelines.planning.estimates import card, estimate_step
from pipelines.planning.fit import fits
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
def refuse(*arguments, **named):
    raise AssertionError("a network was asked")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from pipelines.cli.main import main
assert main(sys.argv[1:]) == 0
assert not [name for name in HEAVY if name in sys.modules]
"""


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(
    ("name", "arguments"), [("llama2-7b-qlora", ["plan"]), ("llama2-7b-full-fsdp", ["sft", "--dry-run"])]
)
def test_a_plan_takes_seconds_and_no_network_no_weights_no_torch(name: str, arguments: list[str]) -> None:
    code = OFFLINE.replace("HEAVY", repr(HEAVY))
    command = [sys.executable, "-c", code, *arguments, "--config", f"configs/{name}.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "optimizer steps" in done.stdout and "(MFU)" in done.stdout and ", fits " in done.stdout
    assert "warning" not in done.stdout


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_its_card_and_its_header_names_what_it_needs(name: str) -> None:
    recipe, (method, most) = load(f"configs/{name}.yaml"), PRESETS[name]
    gpu = card(recipe)
    assert gpu is not None and gpu.gib <= most
    fit = fits(recipe, gpu)
    assert fit is not None and fit.fits and fit.hours is not None
    assert {step.tuning.method for step in recipe.steps} == {method}
    models = [fit.steps[f"rm/{which}"].peak_bytes for which in ("helpfulness", "safety", "judge")]
    assert len(set(models)) == 1, "one shape, one row"
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    assert "not measured" in text and "# Card: " in text
    assert ("Gated: " in text) == KNOWN_BASES[recipe.base.model].is_gated


@pytest.mark.parametrize("name", PRESETS)
def test_each_number_of_a_preset_says_where_it_comes_from(name: str) -> None:
    lines = (ROOT / "configs" / f"{name}.yaml").read_text().splitlines()
    body = lines[lines.index("sft:") :] if "sft:" in lines else []
    origin = re.compile(r"# (paper, [0-9.]+|paper, Table [0-9]+|ours)")
    assert [line for line in body if re.search(r"[0-9]", line.partition("#")[0]) and not origin.search(line)] == []
    for index, line in enumerate(lines):
        if re.match(r"(base: .*max_tokens|tuning:|  split:)", line):
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


@pytest.mark.parametrize("name", PRESETS)
def test_the_pages_have_the_steps_memory_and_hours_of_the_plan(name: str) -> None:
    recipe = load(f"configs/{name}.yaml")
    steps = {step.name for step in recipe.steps}
    columns = ("sft", "rm/helpfulness", "rm/safety", "rm/judge", "rs", "ppo", "eval")
    estimates = [estimate_step(recipe, recipe.step(step)) if step in steps else None for step in columns]
    counts = [str(estimate.optimizer_steps) for estimate in estimates[:-1] if estimate is not None]
    assert f" | {' + '.join(counts)} |" in _row("docs/gpu.md", f"| `{name}.yaml` | ")
    cells = (
        f"{estimate.peak_bytes / 2**30:.1f}, {duration(estimate.seconds)}" if estimate else "" for estimate in estimates
    )
    assert _row("docs/gpu.md", f"| {name} | ").endswith(f" | {' | '.join(cells)} |")


def _row(page: str, beginning: str) -> str:
    (row,) = [line for line in Path(page).read_text().splitlines() if line.startswith(beginning)]
    return row


BASES = {
    "TinyLlama 1.1B": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "Llama 2 7B": "meta-llama/Llama-2-7b-hf",
    "Llama 2 13B": "meta-llama/Llama-2-13b-hf",
    "Llama 2 70B": "meta-llama/Llama-2-70b-hf",
}


def smallest_card(base: str, method: str) -> str:
    """The least memory in GiB with which the plan finds room for PPO, or none."""
    values = [f"base.model={base}", f"tuning.method={method}", "rollout.cache_gib=1.0"]
    recipe = load("configs/llama2-70b-qlora.yaml", values)
    for gib in (12, 24, 48, 80, 140):
        gpu = parse_gpu(f"{gib}GiB")
        estimate = estimate_step(recipe, recipe.step("ppo"), gpu)
        assert estimate is not None
        if estimate.peak_bytes <= gpu.usable_bytes:
            return str(gib)
    return "none"


def test_the_first_table_says_which_sizes_ppo_serves() -> None:
    page = Path("docs/gpu.md").read_text().partition("## Which sizes PPO serves")[2]
    first = page[page.index("\n|") :].strip().partition("\n\n")[0].splitlines()
    expected = [
        f"| {name} | {' | '.join(smallest_card(base, method) for method in ('qlora', 'lora', 'full'))} |"
        for name, base in BASES.items()
    ]
    assert first[2:] == expected
    assert "| Llama 2 70B | 80 | none | none |" in expected
    sharded = load("configs/llama2-7b-full-fsdp.yaml")
    assert {step.stage.command for step in sharded.steps} == {"sft", "rm"}, "what is cut over cards has no PPO"


@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_accelerate_understands_its_files(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    path = f"configs/accelerate/{name}.yaml"
    config: Any = load_config_from_file(path)
    assert config.num_processes == 8 and config.mixed_precision == "no"
    known = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= known
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        for file in (path, "configs/llama2-7b-full-fsdp.yaml"):
            assert "not run on GPUs" in Path(file).read_text() or "has not been run on GPUs" in Path(file).read_text()


# -- plan


def test_plan_on_another_card_says_that_it_does_not_fit_and_what_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "configs/llama2-7b-lora.yaml", "--gpu", "24GiB"]) == 0
    out = capsys.readouterr().out
    assert "does not fit 24 GiB (" in out and "a step should need at most 21.6 of 24 GiB" in out
    assert "DOES NOT FIT 24 GiB" in out and "It would fit with sft.gradient_checkpointing=true" in out
    assert main(["sft", "--dry-run", "--config", "configs/llama2-7b-lora.yaml", "run.gpu=24GiB"]) == 0
    assert "It would fit with sft.gradient_checkpointing=true" in capsys.readouterr().out
    assert main(["plan", "--config", "configs/llama2-7b-lora.yaml", "--gpu", "abacus"]) == 2
    assert "run.gpu: 'abacus' is not a known card." in capsys.readouterr().err


def test_what_is_not_known_before_a_download_is_not_estimated(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["data.sft.0.limit=null", "data.sft.1.limit=null"]
    assert main(["plan", "--config", "configs/llama2-7b-qlora.yaml", *overrides]) == 0
    assert "optimizer steps and hours: unknown before the download" in capsys.readouterr().out
    step, *_ = make_plan(load("configs/llama2-7b-qlora.yaml", overrides))
    assert step.estimate is not None and step.estimate.memory and step.estimate.optimizer_steps is None
    assert main(["plan", "--config", "configs/llama2-7b-qlora.yaml", "base.model=owner/unknown"]) == 0
    assert "no estimate: the shape of 'owner/unknown' is unknown" in capsys.readouterr().out
