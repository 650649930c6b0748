"""What the values of `init` hang on: what was asked and found, how weights are trained, how much of the work is done.

Everything here is arithmetic; what it costs is asked elsewhere.
"""

from dataclasses import dataclass, field
from typing import Any

from llamachat.memory.estimates import Shape
from pipelines.planning.init_data import Found
from pipelines.planning.plan import FEW_STEPS

TINY_WEIGHTS = 50_000_000  # up to here all weights are trained, at the rates of configs/tiny.yaml
LONG_ENOUGH = (512, 1024, 2048, 4096)  # base.max_tokens is one of these
UNKNOWN_CONTEXT = 2048  # of a base whose config.json is not here
AIM = FEW_STEPS  # optimizer steps at least that a batch is made small enough for
FEW_EXAMPLES = 1000
PAIRS_FOR_A_JUDGE = 2000
DIALOGS_FOR_GATT = 50


@dataclass(frozen=True, slots=True)
class Chosen:
    """A value and why it is that one; no reason where the key says it."""

    value: Any
    why: str = ""


Values = dict[str, dict[str, Chosen] | Chosen]


@dataclass(frozen=True, slots=True)
class Method:
    """How weights are trained, in what memory."""

    name: str  # full, lora, qlora
    checkpointing: bool
    rank: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Asked:
    """What `init` was asked for and what it found."""

    base: str
    shape: Shape
    context: int  # the longest sequence that the base was trained with
    found: Found
    gpu: str  # "" for two CPU cores
    hours: float | None
    run_dir: str

    @property
    def is_tiny(self) -> bool:
        """Whether the values of configs/tiny.yaml hold."""
        return self.shape.weights <= TINY_WEIGHTS


@dataclass(frozen=True, slots=True)
class Effort:
    """How much of the full work is done."""

    share: float = 1.0  # of what is sampled: 0 is the least that makes sense
    again: bool = True  # whether the data are passed over as often as they are best
    gatt: bool = True
    ppo_hours: float | None = field(default=None)  # that PPO may take, once it is known

    def count(self, least: int, full: int) -> int:
        """Of something that is counted, between the least and the full number."""
        return round(least + (full - least) * self.share) if full > least else full


def scores(found: Found) -> bool:
    """Whether a reward model can be trained."""
    return found.has("helpfulness") or found.has("safety")


def with_gatt(found: Found, effort: Effort) -> bool:
    """Whether there are dialogs enough to be told an instruction in."""
    return effort.gatt and found.records["sft"] >= DIALOGS_FOR_GATT


def with_distill(found: Found) -> bool:
    """Whether a safety model can choose answers to prompts that ask for something unsafe."""
    return found.has("safety") and found.has("adversarial")


def pairs_of_models(found: Found) -> dict[str, float]:
    """Training pairs of each reward model, its mix aside."""
    shares = split_shares(found)
    kept = 1.0 - sum(shares.values())
    counts = {which: found.records[which] * kept for which in ("helpfulness", "safety") if found.has(which)}
    if shares["judge"]:
        counts["judge"] = sum(found.records.get(key, 0) for key in ("helpfulness", "safety")) * shares["judge"]
    return counts


def pairs_per_step(pairs: float, *, is_tiny: bool) -> int:
    return batch_for(pairs * reward_epochs(pairs), 32 if is_tiny else 256)


def reward_epochs(pairs: float) -> int:
    """Passes over the pairs: the paper's one, unless they are very few."""
    return 2 if pairs < 2 * FEW_STEPS else 1


def batch_for(examples: float, most: int) -> int:
    """The largest power of two up to `most` that gives steps enough."""
    batch = 1
    while batch * 2 <= most and examples / (batch * 2) >= AIM:
        batch *= 2
    return batch


def split_shares(found: Found) -> dict[str, float]:
    """What is kept from training: some hundred conversations for each side, and never much of a small set."""
    conversations = found.records["sft"] + found.records.get("helpfulness", 0) + found.records.get("safety", 0)
    judge = 0.1 if found.records.get("helpfulness", 0) >= PAIRS_FOR_A_JUDGE else 0.0
    return {"test": _share(500, conversations, 0.1), "validation": _share(200, conversations, 0.05), "judge": judge}


def _share(wanted: int, conversations: int, most: float) -> float:
    return min(most, max(0.02, round(wanted / conversations, 2)))


def answer_tokens(asked: Asked, method: Method) -> int:
    """Longest sampled answer: 95 of a hundred answers of the data are not longer, and the prompt has room."""
    wanted = -(-int(asked.found.sizes.answer_holding(0.95)) // 32) * 32
    return max(64, min(wanted, 512, method.max_tokens // 2))
