"""The planner's bytes against the peaks on the device, for models of the presets' widths with few layers.

Memory is linear in layers, so two depths decide. `python -m benchmarks.gpu_memory` has the presets at full depth.
"""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

import benchmarks.memory as memory
from benchmarks.memory import Case, estimated
from llamachat.config.gpus import Gpu, parse_gpu
from llamachat.memory.estimates import shape_of
from pipelines.planning.fit import PRESETS, largest_microbatch, presets
from pipelines.recipe.recipe import Recipe, load
from tests.cuda_standin.memory_cases import cases_of, peaks, ppo_peaks
from tests.cuda_standin.process import on_standin
from tests.cuda_standin.sparse_models import write_sparse_models

NAMES = ("llama2-7b-qlora", "llama2-13b-qlora", "llama2-70b-qlora", "llama2-7b-lora", "llama2-7b-full-fsdp")
NAMES += ("tinyllama-1.1b-lora",)
PROMPT_TOKENS = 200


def test_every_preset_for_a_card_is_checked() -> None:
    assert {path.stem for path, recipe in presets() if recipe.run.gpu} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layers", [2, 4])
def test_the_plan_is_within_5_percent_of_the_peak(
    name: str, layers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load(PRESETS / f"{name}.yaml")
    monkeypatch.setattr(memory, "RANK", recipe.tuning.rank)
    known = shape_of(recipe.base.model)
    assert known is not None
    shape = replace(known, layers=layers)
    cases = cases_of(recipe)
    write_sparse_models(tmp_path / "models", shape)
    arguments = (tmp_path / "models", [asdict(case) for case in cases], recipe.tuning.rank)
    measured = on_standin(peaks, *arguments, total_gib=80.0, is_shape_mode=True, is_expandable=True)
    ratios = {
        str(case): estimated(case, shape, parse_gpu("80GiB")).peak_bytes / peak["reserved"]
        for case, peak in zip(cases, measured, strict=True)
    }
    assert all(0.95 <= ratio <= 1.05 for ratio in ratios.values()), ratios


def test_the_largest_micro_batches_that_plan_offers_fit_the_card(tmp_path: Path) -> None:
    """Four layers of 7B on a card of 8 GiB, whose limit is kept; torch's allocator is counted."""
    preset, card = PRESETS / "llama2-7b-qlora.yaml", parse_gpu("8GiB")
    shape = shape_of("meta-llama/Llama-2-7b-hf")
    assert shape is not None
    models = write_sparse_models(tmp_path / "models", replace(shape, layers=4), positions=2**15)
    recipe = load(preset, [f"base.model={models}/base"])
    mode = {"total_gib": card.gib, "is_shape_mode": True, "is_expandable": True}

    row_tokens = _offered(recipe, "rm/helpfulness", card)
    pair = Case("rm", "qlora", tokens=row_tokens // 2, checkpointing=True, attention="auto")
    (reward,) = on_standin(peaks, models, [asdict(pair)], recipe.tuning.rank, **mode)
    assert reward["reserved"] > 0.8 * card.usable_bytes, "the offer uses the card"

    row_tokens = _offered(recipe, "ppo", card)
    responses = 2 * row_tokens // (PROMPT_TOKENS + recipe.sections.rollout.max_new_tokens) // 2 * 2
    settings = [f"ppo.tokens_per_microbatch={row_tokens}"]
    ppo = on_standin(ppo_peaks, preset, settings, models, responses, PROMPT_TOKENS, **mode)
    assert ppo["reserved"] > 0.8 * card.usable_bytes


def _offered(recipe: Recipe, step: str, card: Gpu) -> int:
    return int(largest_microbatch(recipe, recipe.step(step), card).split("=")[1].split()[0])
