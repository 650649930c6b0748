"""fp32 master weights under 16-bit parameters, held to hand numbers and to torch's own AdamW; what a terminal shows."""

import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from llamachat.training import master_weights
from llamachat.training.master_weights import MasterWeightOptimizer, adamw
from llamachat.training.progress import StepProgress

SETTINGS: dict[str, Any] = {"learning_rate": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-5}


def sgd(params: list[nn.Parameter], rate: float) -> MasterWeightOptimizer:
    return MasterWeightOptimizer([{"params": params}], lambda groups: [torch.optim.SGD(groups, lr=rate)])


def small_model(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).to(dtype)


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in model.parameters():
        if param.requires_grad:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def test_updates_below_a_bf16_step_add_up_by_hand():
    # Below 1 bf16 has steps of 1/256 = 0.0039: 0.999 rounds to 1, 0.998 is under the middle (0.998047) and goes down.
    plain = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    kept = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    without, with_masters = torch.optim.SGD([plain], lr=1e-3), sgd([kept], 1e-3)
    seen = []
    for _ in range(4):
        plain.grad, kept.grad = torch.ones_like(plain), torch.ones_like(kept)
        without.step()
        with_masters.step()
        seen.append(kept.item())
    assert plain.item() == 1.0
    assert seen == [1.0, 1 - 1 / 256, 1 - 1 / 256, 1 - 1 / 256]
    (master,) = with_masters.state_dict()["masters"]
    assert float(master) == pytest.approx(0.996, abs=1e-6)


def test_fp32_parameters_are_stepped_exactly_as_by_adamw():
    ours, theirs = small_model(torch.float32), small_model(torch.float32)
    optimizer = adamw(ours.parameters(), **SETTINGS)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-5,
        fused=True,
    )
    for step in range(5):
        for model, stepped in ((ours, optimizer), (theirs, reference)):
            gradients(model, step)
            stepped.step()
    for got, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(got, expected)
    assert optimizer.state_dict()["masters"] == [None] * 6  # no second copy of what is fp32 already


def test_bf16_parameters_are_the_rounded_masters_of_an_fp32_adamw():
    model, reference = small_model(torch.bfloat16), small_model(torch.bfloat16).to(torch.float32)
    optimizer = adamw(model.parameters(), **SETTINGS)
    stepped = adamw(reference.parameters(), **SETTINGS)
    for step in range(5):
        gradients(model, step)
        for low, high in zip(model.parameters(), reference.parameters(), strict=True):
            assert low.grad is not None
            high.grad = low.grad.to(torch.float32)
        optimizer.step()
        stepped.step()
    for low, high in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(low, high.to(torch.bfloat16))


def test_one_step_of_decay_by_hand_on_matrices_and_not_on_vectors():
    # A zero gradient leaves the decay alone: 2 * (1 - 0.01 * 0.1) = 1.998.
    matrix, vector = nn.Parameter(torch.full((1, 1), 2.0)), nn.Parameter(torch.full((1,), 2.0))
    optimizer = adamw([matrix, vector], **SETTINGS)
    matrix.grad, vector.grad = torch.zeros_like(matrix), torch.zeros_like(vector)
    optimizer.step()
    assert matrix.item() == pytest.approx(1.998, abs=1e-7)
    assert vector.item() == 2.0


def test_what_is_frozen_or_has_no_gradient_stays():
    model = small_model(torch.bfloat16)
    params = dict(model.named_parameters())
    before = {name: param.detach().clone() for name, param in params.items()}
    params["0.weight"].requires_grad_(False)
    optimizer = adamw(model.parameters(), **SETTINGS)
    gradients(model, 0)
    params["2.bias"].grad = None
    optimizer.step()
    assert {name for name, param in params.items() if torch.equal(param, before[name])} == {"0.weight", "2.bias"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_it_continues_bit_by_bit(dtype: torch.dtype, tmp_path: Path):
    whole = small_model(dtype)
    optimizer = adamw(whole.parameters(), **SETTINGS)
    for step in range(6):
        if step == 3:
            torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        gradients(whole, step)
        optimizer.step()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = small_model(dtype)
    resumed = adamw(again.parameters(), **SETTINGS)
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["optimizer"])
    for step in range(3, 6):
        gradients(again, step)
        resumed.step()
    for got, expected in zip(again.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, expected)
    ours, theirs = resumed.state_dict()["masters"], optimizer.state_dict()["masters"]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_schedule_acts_on_it_before_and_after_loading():
    param = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = sgd([param], 1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    moved: list[float] = []
    for step in range(3):
        if step == 2:
            optimizer.load_state_dict(optimizer.state_dict())
        param.grad = torch.ones_like(param)
        optimizer.step()
        schedule.step()
        moved.append(param.item())
    assert moved == [-1.0, -1.5, -1.75]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_taken_away_or_zeroed(set_to_none: bool):
    param = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer = sgd([param], 1.0)
    param.grad = torch.ones_like(param)
    optimizer.zero_grad(set_to_none=set_to_none)
    gradient: Tensor | None = param.grad
    assert gradient is None if set_to_none else gradient is not None and not gradient.any()


# --- what a terminal shows


def shown(is_terminal: bool) -> str:
    progress = StepProgress("sft", steps=4, done=1)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=100)
    progress._console = progress._bar.live.console = console
    with progress:
        progress.step(2, "loss 1.500")
        progress.say("held-out answers [bold]1.2[/bold]")
    return screen.getvalue()


def test_without_a_terminal_each_step_is_a_line_with_the_time_left(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("llamachat.training.progress.time.monotonic", lambda: next(clock, math.nan))
    # 1 step in 10 s since the start at step 1, 2 are left: 20 s.
    assert (
        shown(is_terminal=False) == "sft 2/4  loss 1.500  0:10 elapsed, 0:20 left\nheld-out answers [bold]1.2[/bold]\n"
    )


def test_without_a_terminal_a_line_comes_every_five_seconds_and_at_the_end(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(2000))
    monkeypatch.setattr("llamachat.training.progress.time.monotonic", lambda: float(next(clock)))
    progress = StepProgress("sft", steps=1334)
    screen = io.StringIO()
    progress._console = Console(file=screen, width=100)
    for step in range(1, 1335):  # one a second
        progress.step(step, "loss 1.0")
    lines = screen.getvalue().splitlines()
    assert [int(line.partition("/")[0].removeprefix("sft ")) for line in lines] == [*range(1, 1334, 5), 1334]
    assert lines[0] == "sft 1/1334  loss 1.0  0:01 elapsed, 22:13 left"


def test_in_a_terminal_there_is_a_bar_with_the_loss():
    screen = shown(is_terminal=True)
    assert "2/4" in screen and "loss 1.500" in screen and "[bold]1.2[/bold]" in screen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_stepped_in_parts_are_those_of_one_step(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(at_once: int) -> tuple[list[nn.Parameter], list[int]]:
        monkeypatch.setattr(master_weights, "STEPPED_AT_ONCE", at_once)
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(size).to(dtype)) for size in ((6, 4), (4,), (3, 8), (40,), (2, 2))]
        optimizer = adamw(params, learning_rate=0.1, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8)
        sizes: list[int] = []
        for inner in optimizer.inner:
            inner.register_step_pre_hook(
                lambda inner, *_: sizes.append(
                    sum(p.numel() for group in inner.param_groups for p in group["params"] if p.grad is not None)
                )
            )
        for _ in range(3):
            for param in params[:-1]:  # the last one has no gradient
                param.grad = torch.randn_like(param)
            optimizer.step()
        assert params[0].grad is not None and params[-1].grad is None
        return params, sizes

    whole, sizes = trained(1000)
    assert sizes == [92] * 3
    parts, sizes = trained(30)
    assert sizes == [24, 24, 4, 40] * 3, "matrices come first; one of more weights than that is alone"
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)
