"""Where a PPO training stands, whole in each checkpoint: killed at any moment, it goes on as if nothing had been.

The prompts of an iteration and the seeds of its rollouts follow from its number, and nothing is drawn from torch's
random state, so the number is all that there is to say of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llamachat.answers.evaluation import Evaluation
from llamachat.scoring.standardising import Constants
from ppo.kl_control import AdaptiveKl, FixedKl
from ppo.update import Optimizers

if TYPE_CHECKING:
    from llamachat.models.roles import RoleBank

FILE = "state.pt"
End = Literal["iterations", "patience", "kl_guard", "hours", "run_hours"]


@dataclass(slots=True)
class State:
    """All that changes from one iteration to the next, beside weights and optimizers."""

    kl: FixedKl | AdaptiveKl
    constants: Constants  # of the starting policy's scores on validation prompts
    first_test: Evaluation  # the starting policy on test prompts
    best_iteration: int
    best_score: float
    best_weights: dict[str, Tensor]  # of the policy alone, on the CPU
    iteration: int = 0  # finished
    evaluations_without_better: int = 0
    seconds: float = 0.0  # of iterations, over all commands
    end: End | None = None  # why training is over

    def offer(self, score: float, bank: "RoleBank") -> None:
        """An evaluated policy under the KL guard: the best so far is kept."""
        if score > self.best_score:
            self.best_iteration, self.best_score = self.iteration, score
            self.best_weights = policy_weights(bank)
            self.evaluations_without_better = 0
        else:
            self.evaluations_without_better += 1


def policy_weights(bank: "RoleBank") -> dict[str, Tensor]:
    """A copy of the policy's trained weights."""
    return {
        name: weight.detach().to("cpu", copy=True)
        for name, weight in bank.state_dict().items()
        if name.startswith("policy.")
    }


def put_best(state: State, bank: "RoleBank") -> None:
    """Make the policy the best one."""
    bank.load_state_dict(bank.state_dict() | state.best_weights)


def save_state(folder: Path, state: State, bank: "RoleBank", optimizers: Optimizers) -> None:
    """Everything in one file."""
    plain: dict[str, Any] = {
        "weights": bank.state_dict(),
        "optimizers": optimizers.state_dict(),
        "kl": state.kl.state(),
        "constants": state.constants.to_plain(),
        "first_test": state.first_test.to_plain(),
        "best_iteration": state.best_iteration,
        "best_score": state.best_score,
        "best_weights": state.best_weights,
        "iteration": state.iteration,
        "evaluations_without_better": state.evaluations_without_better,
        "seconds": state.seconds,
        "end": state.end,
    }
    torch.save(plain, folder / FILE)


def load_state(folder: Path, bank: "RoleBank", optimizers: Optimizers, kl: FixedKl | AdaptiveKl) -> State:
    """Put weights and optimizers back in place; `kl` is the controller that the recipe begins with."""
    saved: Mapping[str, Any] = torch.load(folder / FILE, map_location="cpu", weights_only=True)
    bank.load_state_dict(saved["weights"])
    optimizers.load_state_dict(saved["optimizers"])
    return State(
        kl=kl.restored(saved["kl"]),
        constants=Constants.from_plain(saved["constants"]),
        first_test=Evaluation.from_plain(saved["first_test"]),
        best_iteration=saved["best_iteration"],
        best_score=saved["best_score"],
        best_weights=saved["best_weights"],
        iteration=saved["iteration"],
        evaluations_without_better=saved["evaluations_without_better"],
        seconds=saved["seconds"],
        end=saved["end"],
    )
