"""An optimizer that steps fp32 master copies of low-precision parameters.

A bf16 weight of size 0.05 cannot take an update below 0.0002: small updates are lost to rounding. So the weights
are accumulated in fp32 here and the model's own tensors are rounded copies, which keeps forward and backward at bf16
speed. Parameters that are already fp32 are stepped directly.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from llamachat import distributed
from llamachat.errors import ConfigError
from llamachat.memory.estimates import STEPPED_AT_ONCE

OptimizerName = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
ParamGroups = list[dict[str, Any]]


class MasterWeightOptimizer(torch.optim.Optimizer):
    """Wraps the optimizers that `build(groups)` makes over the master copies of `groups` (torch parameter groups).

    `param_groups` are the inner optimizers' own, so a learning-rate scheduler acts on them; gradients are read from
    the model's parameters. `state_dict` contains the masters: a resumed run continues from the unrounded weights. For a
    model that is sharded over processes it contains the whole model, and all processes must call it.
    """

    def __init__(self, groups: ParamGroups, build: Callable[[ParamGroups], list[torch.optim.Optimizer]]) -> None:
        self._params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._parts = _parts(self._params)
        self._masters = {id(p): _master_of(p) for p in self._params}
        master_groups = [{**g, "params": [self._masters[id(p)] for p in g["params"]]} for g in groups]
        self.inner = build(master_groups)
        super().__init__(self._params, {})
        self.param_groups = [group for optimizer in self.inner for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch's overloads return the closure's loss
        assert closure is None, "closures are not used here"
        gradients = [param.grad for param in self._params]
        for param in self._params:
            self._masters[id(param)].grad = None
        for part in self._parts:  # the inner optimizers skip parameters without a gradient
            for number in part:
                gradient = gradients[number]
                master = self._masters[id(self._params[number])]
                master.grad = None if gradient is None else gradient.to(torch.float32)
            for optimizer in self.inner:
                optimizer.step()
            for number in part:
                param = self._params[number]
                master = self._masters[id(param)]
                master.grad = None
                if master is not param:
                    param.copy_(master)
        for param, gradient in zip(self._params, gradients, strict=True):
            param.grad = gradient

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self._params:
            if set_to_none or param.grad is None:
                param.grad = None
            else:
                param.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        masters = [None if self._masters[id(p)] is p else self._masters[id(p)].detach() for p in self._params]
        return distributed.full_tensors(
            {"inner": [optimizer.state_dict() for optimizer in self.inner], "masters": masters}
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for param, saved in zip(self._params, state_dict["masters"], strict=True):
            if saved is not None:
                self._masters[id(param)].copy_(distributed.shard_like(saved, param))
        for optimizer, state in zip(self.inner, state_dict["inner"], strict=True):
            params = [param for group in optimizer.param_groups for param in group["params"]]
            moments = {
                number: {
                    name: distributed.shard_like(value, params[number]) if torch.is_tensor(value) else value
                    for name, value in one.items()
                }
                for number, one in state["state"].items()
            }
            # How this process steps its weights does not depend on the process that saved them.
            groups = [
                {**saved, **{name: own[name] for name in ("foreach", "fused") if name in own}}
                for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
            ]
            optimizer.load_state_dict({**state, "state": moments, "param_groups": groups})
        self.param_groups = [group for optimizer in self.inner for group in optimizer.param_groups]


def _master_of(param: Tensor) -> Tensor:
    if param.dtype == torch.float32:
        return param
    return param.detach().to(torch.float32).clone().requires_grad_(True)


def _parts(params: Sequence[Tensor]) -> list[range]:
    """Consecutive parameters that are stepped together, so that few gradients exist in fp32 at once: `STEPPED_AT_ONCE`
    weights."""
    parts: list[range] = []
    start = size = 0
    for number, param in enumerate(params):
        if number > start and size + param.numel() > STEPPED_AT_ONCE:
            parts.append(range(start, number))
            start, size = number, 0
        size += param.numel()
    return [*parts, range(start, len(params))]


def check_optimizer(name: OptimizerName, *, where: str) -> None:
    """Refuse bitsandbytes' optimizers without a GPU, before anything is loaded."""
    if name != "adamw" and not torch.cuda.is_available():
        raise ConfigError(
            f"{where}: '{name}', but this machine has no GPU. bitsandbytes steps 8-bit moments on a GPU; on a CPU they save "
            "little memory and cost much time. Set it to adamw, or run on a machine with a GPU."
        )


def adamw(
    params: Iterable[Tensor],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
    name: OptimizerName = "adamw",
) -> MasterWeightOptimizer:
    """AdamW over fp32 masters; matrices decay, vectors (norms, biases) do not.

    The two of bitsandbytes hold both moments in 8 bits, in blocks of 256 (Dettmers et al. 2022, arXiv:2110.02861), the
    paged one in memory that the driver moves to the host when the GPU is full. They save 6 of 8 bytes per trained
    weight; the masters stay fp32, since their rounding would lose small updates. Tensors under 4096 weights keep fp32
    moments.
    """
    trained = [p for p in params if p.requires_grad]
    groups: ParamGroups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    values: dict[str, Any] = {"lr": learning_rate, "betas": betas, "eps": eps}
    if any(distributed.is_sharded_tensor(p) for p in trained):
        values["foreach"] = False  # its kernels accept either sharded or whole weights, not both at once
    elif name == "adamw" and all(p.device.type == "cpu" for p in trained):
        values["fused"] = True  # one pass over memory instead of ten: a fifth of the time
    return MasterWeightOptimizer(groups, lambda g: [_adamw_class(name)(g, **values)])


def _adamw_class(name: OptimizerName) -> Callable[..., torch.optim.Optimizer]:
    if name == "adamw":
        return torch.optim.AdamW
    from bitsandbytes.optim import AdamW8bit, PagedAdamW8bit

    return AdamW8bit if name == "adamw_8bit" else PagedAdamW8bit
