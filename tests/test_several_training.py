"""Supervised tuning, reward models and DPO by two processes: the losses and weights of one, killed and resumed with either."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

import dpo
import reward
import sft
from dpo.config import Config as DpoConfig
from llamachat.config.sections import Tuning
from llamachat.runs.artifacts import StepFolder
from llamachat.training import session as session_module
from llamachat.training.master_weights import MasterWeightOptimizer
from llamachat.training.progress import StepProgress
from reward import train as reward_module
from reward.config import Config as RewardConfig
from sft.config import Config as SftConfig
from tests.dpo.tiny_dpo import dpo_inputs
from tests.killed_steps import lasting_rows
from tests.reward.tiny_reward import data_of, reward_inputs, toy_labels, toy_pairs
from tests.several import run_several
from tests.sft.tiny_sft import inputs_of, toy_dialogs
from tests.tiny_llama import LORA, tiny_llama

SFT = SftConfig(epochs=2, learning_rate=1e-3, examples_per_step=8, sample_prompts=2)
# One packed row holds a step's pairs: of two processes one has nothing to do but to fill up.
REWARD = RewardConfig(epochs=2, learning_rate=1e-3, pairs_per_step=4, row_tokens=512)
DPO = DpoConfig(epochs=2, learning_rate=1e-3, pairs_per_step=4, row_tokens=400, sample_prompts=2)
FULL = Tuning(method="full")
OFTEN = {"eval_every": 3, "save_every": 2, "sample_every": 4}


def tune(folder: Path, base: Path, *, packing: bool = True, tuning: Tuning = LORA) -> Path:
    config = SFT if packing else SFT.model_copy(update={"packing": False, "rows_per_microbatch": 3})
    inputs = inputs_of(folder, base, toy_dialogs(40), tuning=tuning, tracking=OFTEN)
    session_module.draw_curves = lambda *_: None  # takes longer than all else
    sft.run(config, inputs)
    return inputs.folder.path


def tune_padded(folder: Path, base: Path) -> Path:
    return tune(folder, base, packing=False)


def learn_to_score(folder: Path, base: Path, *, tuning: Tuning = LORA) -> Path:
    data = data_of(folder, helpfulness=toy_pairs(20), safety=toy_pairs(40, "the moon"), labels=toy_labels(24))
    inputs = reward_inputs(folder, base, which="safety", data=data, tuning=tuning, tracking=OFTEN)
    session_module.draw_curves, reward_module.draw_figures = (lambda *_: None), (lambda *_: [])
    reward.run(REWARD, inputs)
    return inputs.folder.path


def prefer(folder: Path, base: Path, *, tuning: Tuning = LORA) -> Path:
    inputs = dpo_inputs(folder, base, tuning=tuning, tracking=OFTEN)
    session_module.draw_curves = lambda *_: None
    dpo.run(DPO, inputs)
    return inputs.folder.path


def whole(work: Callable[..., Path], folder: Path, base: Path) -> tuple[Path, int]:
    return work(folder, base), 0


def cut(work: Callable[..., Path], folder: Path, base: Path) -> tuple[Path, int]:
    """All weights by the work, cut over the processes as under configs/accelerate/fsdp2.yaml; and how many masters this
    process has stepped."""
    os.environ["LLAMACHAT_FSDP"] = "true"  # what `distributed.opened` makes of accelerate's ACCELERATE_USE_FSDP
    weighed: list[int] = []
    step = MasterWeightOptimizer.step

    def weigh(self: MasterWeightOptimizer, closure: Any = None) -> None:
        step(self, closure)
        masters = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in self._masters.values()]
        weighed.append(sum(weight.numel() for weight in masters))

    MasterWeightOptimizer.step = weigh
    return work(folder, base, tuning=FULL), weighed[-1]


def killed_after(step: int, work: Callable[[Path, Path], object], folder: Path, base: Path) -> None:
    """The work; SIGKILL ends every process when this step has been logged and before it is saved."""
    tell = StepProgress.step

    last = step

    def stop_after(self: StepProgress, step: int, headline: str) -> None:
        tell(self, step, headline)
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)

    StepProgress.step = stop_after
    work(folder, base)


def assert_alike(step: Path, alone: Path) -> None:
    """The same lines of figures, losses within 1e-4, and weights within 1e-3 of their norm."""
    rows, wanted = lasting_rows(StepFolder(step)), lasting_rows(StepFolder(alone))
    assert len(wanted) > 8 and [list(row) for row in rows] == [list(row) for row in wanted]
    for row, expected in zip(rows, wanted, strict=True):
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-4, nan_ok=True)
    files = sorted(path.name for path in (alone / "artifact").glob("*.safetensors"))
    assert files
    for name in files:
        ours, theirs = load_file(step / "artifact" / name), load_file(alone / "artifact" / name)
        for key, weight in theirs.items():
            assert (ours[key] - weight).norm() <= 1e-3 * weight.norm(), key


@pytest.mark.parametrize(
    ("work", "is_cut"),
    [
        *((tune, False), (tune_padded, False), (learn_to_score, False), (prefer, False)),
        *((tune, True), (learn_to_score, True), (prefer, True)),
    ],
)
def test_two_processes_learn_what_one_does(tmp_path: Path, base: Path, work: Callable[..., Path], is_cut: bool) -> None:
    """With whole weights in each, and with weights that are cut over them."""
    alone, both, killed = (tmp_path / name for name in ("alone", "both", "killed"))
    for place in (alone, both, killed):
        place.mkdir()
    do = partial(cut, work) if is_cut else partial(whole, work)
    ((wanted, all_weights),) = run_several(1, do, alone, base)
    results = run_several(2, do, both, base)
    assert_alike(results[0][0], wanted)
    if is_cut:
        with torch.device("meta"):
            config = tiny_llama().config
        shared = config.vocab_size * config.hidden_size * (1 if work is learn_to_score else 2)  # whole in each process
        assert all(num_weights <= shared + (all_weights - shared) / 2 + 64 for _, num_weights in results)
    if work is not tune_padded:  # how a row is laid out says nothing about saving
        first, then = (2, 1) if work is tune else (1, 2)
        assert run_several(first, killed_after, 5, do, killed, base, may_die=True) == [None] * first
        assert_alike(run_several(then, do, killed, base)[0][0], wanted)
