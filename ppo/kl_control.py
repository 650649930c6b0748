"""The KL coefficient beta: fixed, as in the paper (Llama 2, section 3.2.3), or steered to a KL that is asked for.

Steering is that of Ziegler et al. 2019 (arXiv:1909.08593), section 2.2:

    e_t = clip((KL(pi_t, pi_0) - target) / target, -0.2, 0.2)        beta_{t+1} = beta_t * (1 + K * e_t)

KL is in nats a response. A controller is a value: an iteration gives the next one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

_LARGEST_ERROR = 0.2


@dataclass(frozen=True, slots=True)
class FixedKl:
    """The coefficient stays what it is."""

    coef: float

    def after(self, kl: float) -> "FixedKl":
        """The controller of the next iteration, `kl` being this iteration's mean."""
        return self

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: nothing, since the configuration has it all."""
        return {}

    def restored(self, state: Mapping[str, Any]) -> "FixedKl":
        """This controller as it was when `state` was taken."""
        assert not state, "a fixed coefficient has no state"
        return self


@dataclass(frozen=True, slots=True)
class AdaptiveKl:
    """The coefficient grows while the KL is above the target and shrinks while it is below."""

    coef: float
    target: float  # nats a response
    gain: float  # K: at most 0.2 * K of the coefficient is changed in an iteration

    def after(self, kl: float) -> "AdaptiveKl":
        """The controller of the next iteration, `kl` being this iteration's mean."""
        assert math.isfinite(kl), "an iteration whose KL is no number is stopped before it gets here"
        error = min(max((kl - self.target) / self.target, -_LARGEST_ERROR), _LARGEST_ERROR)
        return replace(self, coef=self.coef * (1.0 + self.gain * error))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; target and gain are the configuration's."""
        return {"coef": self.coef}

    def restored(self, state: Mapping[str, Any]) -> "AdaptiveKl":
        """This controller as it was when `state` was taken."""
        return replace(self, coef=float(state["coef"]))
