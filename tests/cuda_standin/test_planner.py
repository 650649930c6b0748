"""The planner's bytes against the peaks on the device, for models of the presets' widths with few layers.

Memory is linear in layers, so two depths decide. `python -m benchmarks.gpu_memory` has the presets at full depth.
"""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

import benchmarks.memory as memory
from benchmarks.memory import estimated
from llamachat.config.gpus import parse_gpu
from llamachat.memory.estimates import shape_of
from pipelines.planning.fit import PRESETS, presets
from pipelines.recipe.recipe import load
from tests.cuda_standin.memory_cases import cases_of, peaks
from tests.cuda_standin.process import on_standin
from tests.cuda_standin.sparse_models import write_sparse_models

NAMES = ("llama2-7b-qlora", "llama2-13b-qlora", "llama2-70b-qlora", "llama2-7b-lora", "llama2-7b-full-fsdp")
NAMES += ("tinyllama-1.1b-lora",)


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
    found = on_standin(peaks, *arguments, total_gib=80.0, is_shape_mode=True, is_expandable=True)
    ratios = {
        str(case): estimated(case, shape, parse_gpu("80GiB")).peak_bytes / peak["allocated"]
        for case, peak in zip(cases, found, strict=True)
    }
    assert all(0.95 <= ratio <= 1.05 for ratio in ratios.values()), ratios
