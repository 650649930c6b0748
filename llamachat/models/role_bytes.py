"""What a role bank holds, in bytes by part, from shapes alone: for `plan`, torch-free. A test holds it to the bank's own count."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llamachat.config.sections import Tuning
from llamachat.models.estimates import BYTES, Shape

FULL_SIZE_HEAD = 4  # bytes a weight of the value head, which is fp32


@dataclass(frozen=True, slots=True)
class Beside:
    """A reward model on other weights than the policy's, loaded beside them."""

    shape: Shape
    width: int = BYTES["bfloat16"]  # bytes a weight
    is_4bit: bool = False
    has_adapter: bool = False  # of the recipe's rank


def role_bank_bytes(
    shape: Shape,
    tuning: Tuning,
    *,
    width: int,
    critic: Literal["separate", "shared"],
    is_continued: bool,
    sharing: int,
    beside: Mapping[str, Beside],
) -> dict[str, int]:
    """Bytes of weights by part: `is_continued` where the policy that PPO starts from is an adapter already; `sharing`
    reward models are adapters on its trunk, `beside` are the others by name, one for each trunk.

    Gradients, optimizer states, activations and caches come on top.
    """
    targets = None if tuning.targets == "all-linear" else tuning.targets
    adapter = shape.adapter_weights(tuning.rank, targets) * width
    held = {"trunk": shape.trunk_bytes(width, is_4bit=tuning.method == "qlora")}
    num_adapters = sharing
    headless = shape.trunk_bytes(width, is_4bit=False) - _language_head(shape, width)
    if tuning.method == "full":
        held["policy's own weights"] = shape.trunk_bytes(width, is_4bit=False)
        if critic == "separate":
            held["critic's own weights"] = headless
    else:
        num_adapters += 1 + is_continued + (critic == "separate")
    for name, model in beside.items():
        whole = model.shape.trunk_bytes(model.width, is_4bit=model.is_4bit)
        own = model.shape.adapter_weights(tuning.rank, targets) if model.has_adapter else 0
        head = _language_head(model.shape, model.width)
        held[f"{name} reward model beside the trunk"] = whole - head + (own + model.shape.hidden_size) * model.width
    held["adapters and heads"] = (
        num_adapters * adapter + sharing * shape.hidden_size * width + (shape.hidden_size + 1) * FULL_SIZE_HEAD
    )
    return held


def _language_head(shape: Shape, width: int) -> int:
    return 0 if shape.is_tied else shape.vocabulary * shape.hidden_size * width
