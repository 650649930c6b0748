"""The trained weights with the lowest held-out loss so far: what a training that its hours end publishes.

One file beside the checkpoints, replaced as a whole. It may be of a later step than the checkpoint that a killed training
goes on from: those weights were evaluated all the same.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from llamachat import distributed
from llamachat.runs.atomic import INCOMING, flush, make_folder, storage_errors


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What was evaluated: after how many optimizer steps, and its held-out figures by their metric names."""

    step: int
    loss: float
    figures: Mapping[str, float]
    words: str = ""  # the figures for people, not kept


@dataclass(frozen=True, slots=True)
class BestWeights:
    """The best so far of one training."""

    checkpoints: Path

    @property
    def path(self) -> Path:
        return self.checkpoints / "best.safetensors"

    def read(self) -> Evaluated | None:
        """What the best was like; None before the first evaluation."""
        if not self.path.is_file():
            return None
        with storage_errors(self.path), safe_open(self.path, framework="pt") as stored:
            return Evaluated(**json.loads(stored.metadata()["evaluated"]))

    def offer(self, evaluated: Evaluated, model: nn.Module) -> None:
        """Keep the model's trained weights if no earlier ones had so low a loss."""
        trained = distributed.full_tensors(_trained(model))
        best = self.read()
        if not distributed.is_first() or (best is not None and best.loss <= evaluated.loss):
            return
        weights = {name: weight.detach().cpu().contiguous() for name, weight in trained.items()}
        told = {"step": evaluated.step, "loss": evaluated.loss, "figures": dict(evaluated.figures)}
        make_folder(self.checkpoints)
        side = self.checkpoints / f"{INCOMING}{self.path.name}"
        with storage_errors(self.path):
            save_file(weights, side, metadata={"evaluated": json.dumps(told)})
            flush(side)
            side.replace(self.path)
            flush(self.checkpoints)

    def put(self, model: nn.Module) -> Evaluated:
        """Make the model the best one."""
        distributed.wait()  # for the first process, which writes it
        best = self.read()
        assert best is not None, "a training is evaluated where it ends"
        trained = _trained(model)
        with storage_errors(self.path), safe_open(self.path, framework="pt") as stored, torch.no_grad():
            for name, weight in trained.items():
                weight.copy_(distributed.shard_like(stored.get_tensor(name), weight))
        return best


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
