"""The state of a PPO run, complete in each checkpoint, and the KL coefficient beta, which is part of it.

An iteration's prompts and rollout seeds are derived from its number, and torch's random state is not used, so a
checkpoint only stores the number.

Beta is fixed, as in the paper (Llama 2, section 3.2.3), or adapted to a target KL in nats per response, as in Ziegler
et al. 2019 (arXiv:1909.08593), section 2.2:

    e_t = clip((KL(pi_t, pi_0) - target) / target, -0.2, 0.2)        beta_{t+1} = beta_t * (1 + K * e_t)
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llamachat.answers.evaluation import Evaluation
from llamachat.scoring.standardising import Constants
from llamachat.training.hours import EndedBy
from ppo.update import Optimizers

if TYPE_CHECKING:
    from llamachat.models.roles import RoleBank
    from ppo.config import Config

_FILE = "state.pt"
_LARGEST_ERROR = 0.2
GUARDS = ("kl_guard", "collapse_guard")
End = Literal["iterations", "patience", "kl_guard", "collapse_guard"] | EndedBy


@dataclass(frozen=True, slots=True)
class KlCoefficient:
    """Beta of one iteration. With a target, beta grows while the KL is above it and shrinks while it is below."""

    coef: float
    target: float | None = None  # nats per response; None: beta is fixed
    gain: float = 0.0  # K: beta changes by at most a fraction 0.2 * K per iteration

    def after(self, kl: float) -> "KlCoefficient":
        """The coefficient of the next iteration; `kl` is this iteration's mean KL."""
        if self.target is None:
            return self
        assert math.isfinite(kl), "an iteration whose KL is not finite is stopped before it gets here"
        error = min(max((kl - self.target) / self.target, -_LARGEST_ERROR), _LARGEST_ERROR)
        return replace(self, coef=self.coef * (1.0 + self.gain * error))

    def state(self) -> dict[str, Any]:
        """Checkpoint state: only an adapted beta, since a fixed one, target and gain are in the configuration."""
        return {} if self.target is None else {"coef": self.coef}

    def restored(self, state: Mapping[str, Any]) -> "KlCoefficient":
        """The coefficient at the time `state` was saved."""
        return replace(self, coef=float(state["coef"])) if state else self


def first_coefficient(config: "Config") -> KlCoefficient:
    """The coefficient of the first iteration."""
    if config.kl_control == "adaptive":
        return KlCoefficient(config.kl_coef, target=config.kl_target, gain=config.kl_gain)
    return KlCoefficient(config.kl_coef)


@dataclass(slots=True)
class State:
    """Everything that changes between iterations, except weights and optimizers."""

    kl: KlCoefficient
    constants: Constants  # of the starting policy's scores on validation prompts
    first_validation: Evaluation  # the starting policy on validation prompts,
    first_test: Evaluation  # and on test prompts
    best_iteration: int
    best_superiority: float  # over the starting policy on validation prompts
    best_weights: dict[str, Tensor]  # of the policy alone, on the CPU
    iteration: int = 0  # trained
    unvalidated: dict[str, float] | None = None  # figures of that iteration while its evaluation is pending
    evaluations_without_better: int = 0
    end: End | None = None  # why training ended

    def offer(self, superiority: float, bank: "RoleBank") -> None:
        """Keep the current policy, which passed the guards, if it is the best so far."""
        if superiority > self.best_superiority:
            self.best_iteration, self.best_superiority = self.iteration, superiority
            self.best_weights = policy_weights(bank)
            self.evaluations_without_better = 0
        else:
            self.evaluations_without_better += 1

    def put_best(self, bank: "RoleBank") -> None:
        """Load the best policy's weights into the bank."""
        bank.load_state_dict(bank.state_dict() | self.best_weights)

    def save(self, folder: Path, bank: "RoleBank", optimizers: Optimizers) -> None:
        """Write the state, weights and optimizers to one file."""
        plain: dict[str, Any] = {
            "weights": bank.state_dict(),
            "optimizers": {role: optimizer.state_dict() for role, optimizer in optimizers.items()},
            "kl": self.kl.state(),
            "constants": asdict(self.constants),
            "first_validation": asdict(self.first_validation),
            "first_test": asdict(self.first_test),
            "best_iteration": self.best_iteration,
            "best_superiority": self.best_superiority,
            "best_weights": self.best_weights,
            "iteration": self.iteration,
            "unvalidated": self.unvalidated,
            "evaluations_without_better": self.evaluations_without_better,
            "end": self.end,
        }
        torch.save(plain, folder / _FILE)


def load_state(folder: Path, bank: "RoleBank", optimizers: Optimizers, kl: KlCoefficient) -> State:
    """Load the saved state and restore weights and optimizers; `kl` is the configured coefficient."""
    saved: dict[str, Any] = torch.load(folder / _FILE, map_location="cpu", weights_only=True)
    bank.load_state_dict(saved.pop("weights"))
    for role, state in saved.pop("optimizers").items():
        optimizers[role].load_state_dict(state)
    return State(
        kl=kl.restored(saved.pop("kl")),
        constants=Constants.from_plain(saved.pop("constants")),
        first_validation=Evaluation(**saved.pop("first_validation")),
        first_test=Evaluation(**saved.pop("first_test")),
        **saved,
    )


def policy_weights(bank: "RoleBank") -> dict[str, Tensor]:
    """A copy of the policy's trained weights."""
    return {
        name: weight.detach().to("cpu", copy=True)
        for name, weight in bank.state_dict().items()
        if name.startswith("policy.")
    }
