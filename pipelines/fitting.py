"""Whether a whole recipe fits a card: its worst step, the bytes of that, and the hours of all. Torch-free, seconds."""

from dataclasses import dataclass
from typing import NamedTuple

from llamachat.config.gpus import Gpu
from llamachat.models.estimates import Estimate
from pipelines.plan import estimate_step
from pipelines.recipe import Recipe, resolve_steps


class StepEstimate(NamedTuple):
    """A step's name and what it would cost."""

    name: str
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Fit:
    """What a whole recipe, run from its beginning, asks of a card."""

    gpu: Gpu
    steps: tuple[StepEstimate, ...]  # in the recipe's order

    @property
    def worst(self) -> StepEstimate:
        """The step that needs most memory."""
        return max(self.steps, key=lambda step: step.estimate.peak_bytes)

    @property
    def peak_bytes(self) -> int:
        """Of the worst step, on one card."""
        return self.worst.estimate.peak_bytes

    @property
    def fits(self) -> bool:
        """Whether the worst step needs no more than a step should."""
        return self.peak_bytes <= self.gpu.usable_bytes

    @property
    def hours(self) -> float | None:
        """Of all steps; None where one of them could not be counted (a set of the hub without a limit)."""
        seconds = [step.estimate.seconds for step in self.steps]
        return sum(seconds) / 3600 if all(seconds) else None


def fits(recipe: Recipe, gpu: Gpu) -> Fit | None:
    """The recipe on this card, with its settings as they stand; None where the shape of its base is not known here."""
    steps = []
    for step in resolve_steps(recipe):
        estimate = estimate_step(recipe, step, gpu)
        if estimate is None:
            return None
        steps.append(StepEstimate(step.name, estimate))
    return Fit(gpu, tuple(steps))
