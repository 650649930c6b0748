"""Compare the presets' memory peaks at full depth with `plan`, on a simulated card: `python -m benchmarks.gpu_memory`.

A stand-in for a CUDA device (tests/cuda_standin) runs the steps on models of the presets' sizes, without a GPU
or weights: large operations only compute shapes. Each preset runs sft, a reward model, a rollout and PPO as configured,
with two reward models and a judge as adapters on one base, within the memory limit of the preset's card. Measures what
torch's caching allocator would reserve with `expandable_segments:True`.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import benchmarks.memory as memory
from benchmarks.memory import estimated
from llamachat.config.gpus import parse_gpu
from llamachat.memory.estimates import Estimate, shape_of
from pipelines.planning.estimates import estimate_step
from pipelines.planning.fit import PRESETS, presets
from pipelines.recipe.recipe import Recipe, load
from tests.cuda_standin.build import UnavailableError, library
from tests.cuda_standin.memory_cases import cases_of, peaks, ppo_peaks
from tests.cuda_standin.process import on_standin
from tests.cuda_standin.sparse_models import write_sparse_models

RESPONSES, PROMPT_TOKENS = 64, 200  # of a PPO iteration
TIMEOUT = 7200


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of the presets at full depth against plan, in GiB.")
    parser.add_argument("--only", default="", help="Part of a preset's name, such as 7b-qlora.")
    parser.add_argument("--steps", default="sft,rm,rollout,ppo", help="What to run of each preset, by commas.")
    options = parser.parse_args()
    try:
        library()
    except UnavailableError as reason:
        print(f"benchmarks.gpu_memory: skipped, {reason}")
        return
    names = [path.stem for path, recipe in presets() if recipe.run.gpu and options.only in path.stem]
    print(f"{'':<110}{'plan':>7}{'allocated':>11}{'ratio':>7}{'reserved':>10}  of")
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            _run(name, Path(scratch) / "models", options.steps.split(","))


def _run(name: str, models: Path, steps: Sequence[str]) -> None:
    """Print a line for each step of the preset."""
    recipe = load(PRESETS / f"{name}.yaml")
    shape = shape_of(recipe.base.model)
    assert shape is not None and recipe.run.gpu is not None
    card = parse_gpu(recipe.run.gpu)
    memory.RANK = recipe.tuning.rank
    write_sparse_models(models, shape)
    mode = {"is_shape_mode": True, "is_expandable": True, "timeout": TIMEOUT}
    if card.count == 1:  # weights sharded over several cards cannot be run
        # PPO with a separate reward model is for larger cards; the preset's PPO is below.
        for case in (case for case in cases_of(recipe) if case.step in steps and case.step != "ppo"):
            (peak,) = on_standin(peaks, models, [asdict(case)], recipe.tuning.rank, total_gib=card.gib, **mode)
            _report(f"{name}: {case}", estimated(case, shape, card), peak, card.gib)
    if "ppo" in steps and any(step.stage.command == "ppo" for step in recipe.steps):
        arguments = (PRESETS / f"{name}.yaml", [], models, RESPONSES, PROMPT_TOKENS)
        peak = on_standin(ppo_peaks, *arguments, total_gib=card.gib, **mode)
        _report(f"{name}: PPO of the preset with two reward models and a judge", _planned(recipe), peak, card.gib)


def _planned(recipe: Recipe) -> Estimate:
    """The estimate of `plan` for the preset's PPO."""
    estimate = estimate_step(recipe, recipe.step("ppo"), None)
    assert estimate is not None
    return estimate


def _report(name: str, estimate: Estimate, peak: dict[str, int], gib: float) -> None:
    planned, allocated, reserved = (size / 2**30 for size in (estimate.peak_bytes, peak["allocated"], peak["reserved"]))
    print(f"{name:<110}{planned:>7.2f}{allocated:>11.2f}{planned / allocated:>7.2f}{reserved:>10.2f}  {gib:g}")


if __name__ == "__main__":
    main()
