"""The whole recipe against a card and the hours that there are: the worst step, the largest micro-batches, what would fit."""

from pathlib import Path

import pytest

from llamachat.config.gpus import Gpu, parse_gpu
from pipelines.cli.main import main
from pipelines.planning import doctor
from pipelines.planning.estimates import estimate_step
from pipelines.planning.fit import Setting, changed, fits, largest_microbatch, settings_to_fit, way_to_fit
from pipelines.planning.hardware import Device
from pipelines.planning.text import presets_text
from pipelines.recipe.recipe import load

ROOT = Path(__file__).resolve().parents[3]
QLORA, LORA, FSDP = (f"configs/llama2-{name}.yaml" for name in ("7b-qlora", "7b-lora", "7b-full-fsdp"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def test_a_recipe_fits_where_its_worst_step_does() -> None:
    recipe = load(QLORA)
    fit = fits(recipe, parse_gpu("24GiB"))
    assert fit is not None and fit.fits and fit.worst == "ppo" and fit.hours is not None
    assert fit.peak_bytes == max(estimate.peak_bytes for estimate in fit.steps.values())
    assert fit.hours == pytest.approx(sum(estimate.seconds for estimate in fit.steps.values()) / 3600)
    small = fits(recipe, parse_gpu("12GiB"))
    assert small is not None and not small.fits
    assert fits(load(QLORA, ["base.model=owner/unknown"]), parse_gpu("24GiB")) is None
    uncounted = fits(load(QLORA, ["data.sft.0.limit=null"]), parse_gpu("24GiB"))
    assert uncounted is not None and uncounted.hours is None


@pytest.mark.parametrize("name", ["rm/helpfulness", "ppo"])
def test_the_largest_micro_batch_fits_and_the_next_does_not(name: str) -> None:
    recipe, gpu = load(QLORA), parse_gpu("24GiB")
    key, _, value = largest_microbatch(recipe, recipe.step(name), gpu).partition("=")
    unit = recipe.base.max_tokens * (2 if key.startswith("reward.") else 1)

    def peak(value: int) -> int:
        changed = load(QLORA, [f"{key}={value}"])
        estimate = estimate_step(changed, changed.step(name), gpu)
        assert estimate is not None
        return estimate.peak_bytes

    assert peak(int(value)) <= gpu.usable_bytes < peak(int(value) + unit)
    assert "does not fit" in largest_microbatch(recipe, recipe.step(name), parse_gpu("6GiB"))


def test_padded_dialogs_have_rows_and_a_card_may_hold_all_of_a_step() -> None:
    recipe, gpu = load(QLORA, ["sft.packing=false", "sft.examples_per_step=4"]), parse_gpu("80GiB")
    assert largest_microbatch(recipe, recipe.step("sft"), gpu) == "sft.rows_per_microbatch=4 (the maximum)"
    assert largest_microbatch(recipe, recipe.step("eval"), gpu) == ""


@pytest.mark.parametrize(("name", "gpu"), [(LORA, "24GiB"), (LORA, "12GiB"), (QLORA, "12GiB"), (FSDP, "8x28GiB")])
def test_what_would_fit_is_the_fewest_settings(name: str, gpu: str) -> None:
    recipe, card = load(name), parse_gpu(gpu)
    settings = settings_to_fit(recipe, card)

    def does_fit(settings: list[Setting]) -> bool:
        fit = fits(changed(recipe, settings), card)
        return fit is not None and fit.fits

    assert settings and does_fit(settings)
    assert not any(does_fit([other for other in settings if other != one]) for one in settings)
    words = " ".join(f"{key}={str(value).lower()}" for key, value in settings)
    assert way_to_fit(recipe, card).startswith(f"It would fit with {words}: ")
    loaded = fits(load(name, words.split()), card)
    assert loaded is not None and loaded.fits, "the words are what the command takes"


def test_where_nothing_makes_a_base_fit_the_presets_that_do_are_named() -> None:
    text = way_to_fit(load("configs/llama2-70b-qlora.yaml"), parse_gpu("24GiB"))
    assert "these presets do: llama2-13b-qlora, llama2-7b-qlora, tinyllama-1.1b-lora" in text
    assert "no preset does" in way_to_fit(load(QLORA), parse_gpu("1GiB"))
    assert way_to_fit(load(QLORA), parse_gpu("24GiB")) == "It fits."
    assert settings_to_fit(load(QLORA, ["base.model=owner/unknown"]), parse_gpu("24GiB")) is None


@pytest.mark.parametrize("hours", ["120", "60"])
def test_hours_that_do_not_suffice_bring_settings_with_which_they_do(
    hours: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config", QLORA, "--gpu", "24GiB", "--hours", hours]
    out = plan_of(capsys, *options)
    assert "fits 24 GiB" in out and f"OVER {hours} h by" in out and f"or run.max_hours={hours}" in out
    (settings,) = (line.split() for line in out.splitlines() if "ppo.iterations=" in line)
    assert f"within {hours} h" in plan_of(capsys, *options, *settings)


def test_a_step_takes_no_longer_than_its_own_hours(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan_of(capsys, "--config", QLORA, "--gpu", "24GiB", "--hours", "100", "ppo.max_hours=10")
    assert "10.0 h within ppo.max_hours" in out and "within 100 h" in out
    assert "without sft, " in plan_of(capsys, "--config", QLORA, "data.sft.0.limit=null")


def test_presets_on_three_cards(capsys: pytest.CaptureFixture[str]) -> None:
    head, *lines, remark = plan_of(capsys, "--presets").splitlines()
    by_name = {line.split()[0]: line for line in lines}
    assert head.split()[3:6] == ["24GiB", "48GiB", "80GiB"] and "not measured" in remark
    assert {"llama2-7b-qlora", "llama2-70b-qlora", "llama2-7b-full-fsdp", "tiny"} <= set(by_name)
    for name, sizes in {"7b-lora": "NO NO fits", "7b-full-fsdp": "NO fits fits", "7b-qlora": "fits fits fits"}.items():
        line = by_name[f"llama2-{name}"]
        assert [word for word in line.split() if word in ("fits", "NO")] == sizes.split(), line
        assert line.count("8 x: ") == (3 if "fsdp" in name else 0)
    assert plan_of(capsys, "--presets", "--gpu", "8x80GiB").split()[3] == "8x80GiB"


def test_options_that_plan_cannot_take_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--presets", "--gpu", "abacus"]) == 2
    assert "--gpu: 'abacus' is not a known card" in capsys.readouterr().err
    for hours in ("nan", "1e400", "-1"):
        assert main(["plan", "--hours", hours, "--config", QLORA]) == 2
        assert "--hours" in capsys.readouterr().err
    assert main(["plan", "--hours", "5", "--config", "configs/studies/k.yaml"]) == 2
    assert "is a study, whose total time" in capsys.readouterr().err


# -- the doctor on cards


def test_a_card_too_small_is_reported_with_what_would_fit_and_fewer_cards_than_configured_are_noted() -> None:
    findings = list(doctor._memory(load(LORA), [Device("card", 24.0, 24.0, "580.1")]))
    (failing,) = (finding for finding in findings if finding.verdict == "FAIL")
    assert failing.check == "memory" and "rm/safety " in failing.problem and "ppo " in failing.problem
    assert "It would fit with sft.gradient" in failing.fix
    two = [Device("card", 80.0, 80.0, "580.1")] * 2
    cards, *memory = doctor._memory(load(FSDP), two)
    assert "meant for 8 cards; this machine has 2" in cards.problem and "num_processes: 2" in cards.fix
    whole = fits(load(FSDP), Gpu("card", 80.0, None, 2))
    assert whole is not None and f" {whole.peak_bytes / 2**30:.1f}" in memory[0].problem


def test_the_page_on_gpus_says_what_is_computed() -> None:
    page = (ROOT / "docs" / "gpu.md").read_text()
    lines = [line for line in presets_text().splitlines() if line.startswith(("llama2-", "tinyllama-"))]
    assert len(lines) == 6 and [line for line in lines if f"    {line}\n" not in page] == []
    assert "No number on this page was measured on a card" in page
