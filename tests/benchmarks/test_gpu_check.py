"""`make gpu-check` on the stand-in: it passes there, and a fault of the card is a mismatch."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check.figures import Figure, figures_of, line, write
from benchmarks.gpu_check.sizes import CARD
from tests.cuda_standin.device import Device
from tests.cuda_standin.process import on_standin
from tests.cuda_standin.sparse_models import write_sparse_models

EXPECTED = (
    "self_attn.q_proj in 4 bits, 1 rows: forward",
    "mlp.down_proj in 4 bits, 512 rows: backward",
    "mlp.down_proj: 4 bits against bf16, backward",
    "packed rows (varlen): gradient of a token to other sequences and later tokens",
    "decoding, merged bf16: answers of recorded steps that are those of plain ones",
    "decoding over 4 bits: largest gap of their log-probabilities",
    "sft: plan over measured",
    "rm: plan over measured",
    "ppo: plan over measured",
)


def test_the_check_passes_and_finds_faults(tmp_path: Path) -> None:
    result = on_standin(_check, tmp_path)
    assert result["status"] == 0
    report = json.loads((tmp_path / "check.json").read_text())
    assert report["is_right"] and "stand-in, 24.0 GiB" in report["facts"]["card"]
    values = {figure["name"]: figure["value"] for figure in report["figures"] if not figure["error"]}
    assert set(EXPECTED) <= values.keys() and len(values) == len(report["figures"])
    assert result["replays"] > 0, "the decode steps were recorded"
    for fault, wrong in result["faults"].items():
        assert wrong, fault
    assert result["status_of_mismatch"] == 1


def _check(device: Device, folder: str) -> dict[str, Any]:
    import torch

    from benchmarks.gpu_check import __main__ as program
    from benchmarks.gpu_check import numerics
    from benchmarks.gpu_check.sizes import TOY
    from benchmarks.memory import write_models

    status = program.main(["--toy", "--json", f"{folder}/check.json"])
    replays = device.statistics()["replays"]

    models = write_models(Path(folder) / "models", TOY.shape)
    faults = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numerics, "CudaCapture", lambda: _with_other_products)
        faults["graph"] = _wrong(numerics.decoding(models, TOY, is_nf4=False, bandwidth=None))
    with pytest.MonkeyPatch.context() as patch:  # a row without positions is one sequence
        collate = numerics.collate_packed
        positions = {"position_ids": torch.arange(sum(TOY.packed)).unsqueeze(0)}
        patch.setattr(numerics, "collate_packed", lambda examples: collate(examples) | positions)
        faults["packing"] = _wrong(numerics.packing(models, TOY))
    with pytest.MonkeyPatch.context() as patch:  # the halves of a byte the other way round
        unpacked = numerics.unpacked
        patch.setattr(
            numerics, "unpacked", lambda layer: unpacked(layer).view(-1, 2).flip(1).view(unpacked(layer).shape)
        )
        faults["4 bits"] = _wrong(numerics.nf4(models, TOY))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "check", lambda *_, **__: [Figure("wrong", 2.0, most=1.0)])
        mismatch = program.main(["--toy", "--json", f"{folder}/mismatch.json"])
    return {"status": status, "replays": replays, "faults": faults, "status_of_mismatch": mismatch}


def _with_other_products(step: Any) -> Any:
    """A recording that computes something else than the step."""
    from torch.nn import functional

    def repeat() -> Any:
        with pytest.MonkeyPatch.context() as patch:
            linear = functional.linear
            patch.setattr(functional, "linear", lambda *arguments: 1.1 * linear(*arguments))
            return step()

    return repeat


def _wrong(figures: Any) -> list[str]:
    return [figure.name for figure in figures if not figure.is_right]


def test_the_plan_is_near_the_peak_of_the_model_that_a_card_is_checked_with(tmp_path: Path) -> None:
    write_sparse_models(tmp_path, CARD.shape)
    ratios = on_standin(_ratios, tmp_path, is_shape_mode=True)
    assert ratios.keys() == {"sft: plan over measured", "rm: plan over measured", "ppo: plan over measured"}
    for name, ratio in ratios.items():
        assert 0.88 < ratio < 1.12, name


def _ratios(device: Device, folder: str) -> dict[str, float]:
    from benchmarks.gpu_check.sizes import sizes_for
    from benchmarks.gpu_check.steps import card, step
    from tests.cuda_standin.memory_cases import _without_values

    _without_values()
    gpu = card()
    assert gpu is not None and sizes_for(gpu) == CARD
    figures = [
        figure
        for case in CARD.cases
        for figure in step(case, Path(folder), CARD, gpu, is_toy=False, peak=None)
        if figure.least is not None
    ]
    return {figure.name: figure.value for figure in figures}


def test_a_figure_is_right_within_its_bounds_alone() -> None:
    for value, is_right in ((0.9, False), (1.0, True), (2.0, True), (2.1, False), (math.nan, False), (math.inf, False)):
        assert Figure("x", value, least=1.0, most=2.0).is_right is is_right
    assert Figure("for information", math.inf).is_right
    assert not Figure("x", 1.5, most=2.0, error="RuntimeError: no kernel").is_right


def test_a_section_that_fails_is_a_mismatch_and_the_file_is_json(tmp_path: Path) -> None:
    def section() -> Any:
        yield Figure("first", 1.0, "GiB", most=2.0)
        raise RuntimeError("no kernel\nmore")

    figures = list(figures_of("decoding", section))
    assert line(figures[0]).split() == ["ok", "first", "1", "GiB", "at", "most", "2"]
    assert line(figures[1]) == "MISMATCH  decoding: RuntimeError: no kernel"
    write(tmp_path / "out.json", {"torch": "2"}, figures)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["facts"] == {"torch": "2"} and not content["is_right"]
    assert [(row["value"], row["is_right"]) for row in content["figures"]] == [(1.0, True), (None, False)]
