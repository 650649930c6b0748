"""The whole recipe against a card and the hours that there are: the worst step, the largest micro-batches, what would fit."""

from pathlib import Path

import pytest

from llamachat.config.gpus import Gpu, parse_gpu
from pipelines.cli.main import main
from pipelines.planning import doctor
from pipelines.planning.estimates import estimate_step
from pipelines.planning.fit import Setting, changed, fits, largest_microbatch, settings_to_fit, way_to_fit
from pipelines.planning.hardware import Device, Torch, newest_cuda
from pipelines.planning.text import presets_text
from pipelines.recipe.recipe import Recipe, Step, load

ROOT = Path(__file__).resolve().parents[3]
QLORA, LORA, FSDP = (f"configs/llama2-{name}.yaml" for name in ("7b-qlora", "7b-lora", "7b-full-fsdp"))


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def plan_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["plan", *arguments]) == 0
    return capsys.readouterr().out


def step_of(recipe: Recipe, name: str) -> Step:
    return next(step for step in recipe.steps if step.name == name)


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
    head, *lines, remark = plan_of(capsys, "--presets").splitlines()
    by_name = {line.split()[0]: line for line in lines}
    assert head.split()[3:6] == ["24GiB", "48GiB", "80GiB"] and "not measured" in remark
    assert {"llama2-7b-qlora", "llama2-70b-qlora", "llama2-7b-full-fsdp", "tiny"} <= set(by_name)
    for name, sizes in {"7b-lora": "NO NO fits", "7b-full-fsdp": "NO fits fits", "7b-qlora": "fits fits fits"}.items():
        line = by_name[f"llama2-{name}"]
        assert [word for word in line.split() if word in ("fits", "NO")] == sizes.split(), line
        assert line.count("8 x: ") == (3 if "fsdp" in name else 0)
    assert plan_of(capsys, "--presets", "--gpu", "8x80GiB").split()[3] == "8x80GiB"


def test_what_plan_cannot_take_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--presets", "--gpu", "abacus"]) == 2
    assert "--gpu: 'abacus' is no card that is known" in capsys.readouterr().err
    assert main(["plan", "--hours", "5", "--config", "configs/studies/k.yaml"]) == 2
    assert "is a study, whose runs the plan sums" in capsys.readouterr().err


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
    assert told.verdict == "FAIL" and found in told.problem and way in told.fix
    assert (newest_cuda("580.95"), newest_cuda("550.1"), newest_cuda("300")) == (13, 12, None)


def test_a_card_too_small_is_told_with_what_would_fit_and_fewer_cards_than_meant_are_noted() -> None:
    findings = list(doctor._memory(load(LORA), [Device("card", 24.0, 24.0, "580.1")]))
    failing = [finding for finding in findings if finding.verdict == "FAIL"]
    assert {finding.check for finding in failing} == {"memory"} and len(failing) > 1
    advice, *others = (finding.fix for finding in failing)
    assert "It would fit with sft.gradient" in advice and set(others) == {"As above."}
    two = [Device("card", 80.0, 80.0, "580.1")] * 2
    cards, *memory = doctor._memory(load(FSDP), two)
    assert "meant for 8 cards, and 2 are here" in cards.problem and "num_processes: 2" in cards.fix
    whole = fits(load(FSDP), Gpu("card", 80.0, None, 2))
    assert whole is not None and f"{whole.peak_bytes / 2**30:.1f} GiB" in memory[0].problem


def test_the_page_on_gpus_says_what_is_computed() -> None:
    page = (ROOT / "docs" / "results" / "gpu.md").read_text()
    lines = [line for line in presets_text().splitlines() if line.startswith(("llama2-", "tinyllama-"))]
    assert len(lines) == 6 and [line for line in lines if f"    {line}\n" not in page] == []
    assert "No number on this page was measured" in page
