"""The whole recipe against a card and the hours that there are: the worst step, the largest micro-batches, what would fit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llamachat.config.gpus import Gpu, parse_gpu
from llamachat.memory.estimates import Estimate
from pipelines.cli.main import main
from pipelines.planning import doctor
from pipelines.planning.fit import fits, largest_microbatch, way_to_fit
from pipelines.planning.hardware import Device, Torch, newest_cuda
from pipelines.planning.measured import answer_tokens, timed
from pipelines.planning.plan import estimate_step
from pipelines.planning.text import presets_text
from pipelines.recipe.recipe import Recipe, Step, load, resolve_steps
from tests.recipes import preference_data, write_recipe

ROOT = Path(__file__).resolve().parents[3]
QLORA, LORA, FSDP = (f"configs/llama2-{name}.yaml" for name in ("7b-qlora", "7b-lora", "7b-full-fsdp"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def step_of(recipe: Recipe, name: str) -> Step:
    return next(step for step in resolve_steps(recipe) if step.name == name)


def test_a_recipe_fits_where_its_worst_step_does() -> None:
    recipe = load(QLORA)
    found = fits(recipe, parse_gpu("24GiB"))
    assert found is not None and found.fits and found.worst.name == "ppo" and found.hours is not None
    assert found.peak_bytes == max(step.estimate.peak_bytes for step in found.steps)
    assert found.hours == pytest.approx(sum(step.estimate.seconds for step in found.steps) / 3600)
    small = fits(recipe, parse_gpu("12GiB"))
    assert small is not None and not small.fits
    assert fits(load(QLORA, ["base.model=owner/unknown"]), parse_gpu("24GiB")) is None
    uncounted = fits(load(QLORA, ["data.sft.0.limit=null"]), parse_gpu("24GiB"))
    assert uncounted is not None and uncounted.hours is None


@pytest.mark.parametrize("name", ["rm/helpfulness", "ppo"])
def test_the_largest_micro_batch_fits_and_the_next_does_not(name: str) -> None:
    recipe, gpu = load(QLORA), parse_gpu("24GiB")
    step = step_of(recipe, name)
    found = largest_microbatch(recipe, step, gpu)
    assert found is not None and not found.is_whole_step
    section, _, _ = found.key.partition(".")
    unit = recipe.base.max_tokens * (2 if section == "reward" else 1)

    def peak(value: int) -> int:
        asked = load(QLORA, [f"{found.key}={value}"])
        estimate = estimate_step(asked, step_of(asked, name), gpu)
        assert estimate is not None
        return estimate.peak_bytes

    assert peak(found.value) <= gpu.usable_bytes < peak(found.value + unit)
    assert "at its least does not fit" in str(largest_microbatch(recipe, step, parse_gpu("6GiB")))


def test_padded_dialogs_have_rows_and_a_card_may_hold_all_of_a_step() -> None:
    recipe = load(QLORA, ["sft.packing=false", "sft.examples_per_step=4"])
    found = largest_microbatch(recipe, step_of(recipe, "sft"), parse_gpu("80GiB"))
    assert str(found) == "sft.rows_per_microbatch=4 (all there is to use)"
    assert largest_microbatch(recipe, step_of(recipe, "eval"), parse_gpu("80GiB")) is None


def test_what_would_fit_is_the_fewest_settings() -> None:
    told = way_to_fit(load(LORA), parse_gpu("24GiB"))
    assert told == "It would fit with sft.gradient_checkpointing=true reward.gradient_checkpointing=true: 21.4 GiB."
    settings = told.removeprefix("It would fit with ").partition(":")[0].split()
    found = fits(load(LORA, settings), parse_gpu("24GiB"))
    assert found is not None and found.fits
    assert all(not (without := fits(load(LORA, [s]), parse_gpu("24GiB"))) or not without.fits for s in settings)
    told = way_to_fit(load("configs/llama2-70b-qlora.yaml"), parse_gpu("24GiB"))
    assert told is not None and "these presets do: llama2-13b-qlora, llama2-7b-qlora, tinyllama-1.1b-lora" in told
    assert "no preset does" in (way_to_fit(load(QLORA), parse_gpu("1GiB")) or "")
    assert way_to_fit(load(QLORA), parse_gpu("24GiB")) == "It fits."
    told = way_to_fit(load(FSDP), parse_gpu("8x28GiB"))
    assert told == "It would fit with sft.sample_prompts=0: 22.8 GiB."


def test_hours_that_do_not_suffice_are_told_with_what_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan_of(capsys, "--config", QLORA, "--gpu", "24GiB", "--hours", "120")
    assert "fits 24 GiB" in out and "OVER 120 h by" in out and "or run.max_hours=120" in out
    ppo = next(line for line in out.splitlines() if line.startswith("    ppo, "))
    iterations = int(ppo.partition("ppo.iterations=")[2].partition(" ")[0])
    shorter = plan_of(capsys, "--config", QLORA, "--gpu", "24GiB", "--hours", "120", f"ppo.iterations={iterations}")
    assert "within 120 h" in shorter
    out = plan_of(capsys, "--config", QLORA, "--gpu", "24GiB", "--hours", "1")
    assert "with the others shortened alike" in out
    out = plan_of(capsys, "--config", QLORA, "--gpu", "24GiB", "--hours", "100", "ppo.max_hours=10")
    assert "10.0 h as ppo.max_hours has it" in out and "within 100 h" in out
    assert "without sft, " in plan_of(capsys, "--config", QLORA, "data.sft.0.limit=null")


def test_presets_on_three_cards(capsys: pytest.CaptureFixture[str]) -> None:
    lines, limits = (part.splitlines() for part in plan_of(capsys, "--presets").split("\n\n"))
    by_name = {line.split()[0]: line for line in lines[1:-1]}
    assert {"llama2-7b-qlora", "llama2-70b-qlora", "llama2-7b-full-fsdp", "tiny"} <= set(by_name)
    assert by_name["llama2-7b-lora"].count("NO 57.5 (rm/helpfulness)") == 2 and "fits 57.5" in by_name["llama2-7b-lora"]
    assert by_name["llama2-7b-full-fsdp"].count("8 x: fits 26.5 (sft)") == 2
    assert "8 x: NO 26.5 (sft)" in by_name["llama2-7b-full-fsdp"]
    (header, *_, told) = plan_of(capsys, "--presets", "--gpu", "8x80GiB").partition("\n\n")[0].splitlines()
    assert header.split()[3] == "8x80GiB" and "not measured" in told
    # 7B in bf16 on 312 TFLOP/s: adapters without checkpointing take two passes of 2 operations a weight.
    (lora,) = (line.split() for line in limits if line.startswith("llama2-7b-lora"))
    assert lora[2:4] == ["1935", "312"] and lora[5] == f"{312e12 / 4 / 6_738_415_616:,.0f}"
    # A step reads 13.2 GB of weights, without the embeddings, and 64 answers' keys and values of 251 tokens.
    step = 2 * (6_738_415_616 - 32000 * 4096) + 64 * 251.2 * 2 * 32 * 4096 * 2
    assert lora[4] == f"{64 * 1935e9 / step:,.0f}"


def test_what_plan_cannot_take_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--presets", "--gpu", "abacus"]) == 2
    assert "--gpu: 'abacus' is no card that is known" in capsys.readouterr().err
    assert main(["plan", "--hours", "5", "--config", "configs/studies/k.yaml"]) == 2
    assert "is a study, whose runs the plan sums" in capsys.readouterr().err


# -- what a run has measured


def measured_run(tmp_path: Path, **changes: Any) -> Recipe:
    path = write_recipe(tmp_path, data=preference_data(tmp_path), steps=["sft", "rm", "rs", "ppo"], **changes)
    return load(path)


def test_answers_are_as_long_as_an_earlier_policy_gave_them(tmp_path: Path) -> None:
    recipe = measured_run(tmp_path)
    rs, ppo = (step_of(recipe, name) for name in ("rs", "ppo"))
    before = estimate_step(recipe, ppo)
    assert answer_tokens(recipe, ppo) is None and before is not None and "0.4 of the longest" in before.assumed
    for name, figures in {"sft": {"sft/answer_tokens": 30.0}, "rs": {"rs/test/final/response_tokens": 7.0}}.items():
        folder = Path(recipe.run.dir) / name
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(json.dumps(figures))
    assert answer_tokens(recipe, rs) == (30.0, "'sft'") and answer_tokens(recipe, ppo) == (7.0, "'rs'")
    child = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"dir": str(tmp_path / "b"), "parent": recipe.run.dir})}
    )
    after = estimate_step(child, ppo)
    assert after is not None and after.seconds < before.seconds and "answers of 7 (as of 'rs')" in after.assumed


def test_a_step_that_has_run_takes_its_time_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = measured_run(tmp_path)
    step = step_of(recipe, "sft")
    folder = Path(recipe.run.dir) / "sft"
    (folder / "artifact").mkdir(parents=True)
    (folder / "config.yaml").write_text((tmp_path / "recipe.yaml").read_text())
    (folder / "cost.json").write_text(json.dumps({"seconds": 50.0, "peak_gib": 1.0, "starts": 1}))
    monkeypatch.setattr("pipelines.planning.measured.is_published", lambda folder: True)
    here = Estimate(seconds=30.0, assumed="by thought")

    def then(recipe: Recipe, step: Step) -> Estimate:
        return replace(here, seconds=10.0)

    found = timed(recipe, step, here, then)
    assert found.seconds == 150.0 and found.assumed == f"(measured: 50 s in {folder}, times 3)"
    other = recipe.model_copy(update={"run": recipe.run.model_copy(update={"gpu": "24GiB"})})
    assert timed(other, step, here, then) is here  # on another card
    (folder / "config.yaml").write_text("nothing")
    assert timed(recipe, step, here, then) is here  # that cannot be read any more


# -- the doctor on cards


@pytest.mark.parametrize(
    ("torch", "driver", "found", "way"),
    [
        (Torch("2.13", "13.0", None), "560.35.03", "needs 580.65.06 or newer", "the build of torch for CUDA 12"),
        (Torch("2.13", "12.8", None), "470.10", "needs 525.60.13 or newer", "the build of torch for CUDA 11"),
        (Torch("2.13", "12.8", None), "390.1", "needs 525.60.13 or newer", "Install driver 525.60.13 or newer."),
        (Torch("2.13", "12.8", None), "535.1", "cannot use the card", "CUDA_VISIBLE_DEVICES"),
        (
            Torch("2.13", "12.8", (6, 1), (7, 5)),
            "580.1",
            "is 6.1, and the oldest that it is built for 7.5",
            "newer card",
        ),
    ],
)
def test_a_driver_or_a_card_too_old_is_told_with_what_is_needed(
    torch: Torch, driver: str, found: str, way: str
) -> None:
    (told,) = [f for f in doctor._cards([Device("card", 24.0, 24.0, driver)], torch) if f.check == "cuda"]
    assert told.verdict == "FAIL" and found in told.found and way in told.way_out
    assert (newest_cuda("580.95"), newest_cuda("550.1"), newest_cuda("300")) == (13, 12, None)


def test_a_card_too_small_is_told_with_what_would_fit_and_fewer_cards_than_meant_are_noted() -> None:
    findings = list(doctor._memory(load(LORA), [Device("card", 24.0, 24.0, "580.1")]))
    assert [f.check for f in findings if f.verdict == "FAIL"] == ["memory"] * 5
    assert findings[-1].check == "way out" and "It would fit with sft.gradient" in findings[-1].found
    two = [Device("card", 80.0, 80.0, "580.1")] * 2
    cards, *memory = doctor._memory(load(FSDP), two)
    assert "meant for 8 cards, and 2 are here" in cards.found and "num_processes: 2" in cards.way_out
    whole = fits(load(FSDP), Gpu("card", 80.0, None, 2))
    assert whole is not None and f"{whole.peak_bytes / 2**30:.1f} GiB" in memory[0].found


def test_the_page_on_gpus_says_what_is_computed() -> None:
    page = (ROOT / "docs" / "results" / "gpu.md").read_text()
    lines = [line for line in presets_text().splitlines() if line.startswith(("llama2-", "tinyllama-"))]
    assert len(lines) == 12 and [line for line in lines if f"    {line}\n" not in page] == []
    assert "No number on this page was measured" in page
