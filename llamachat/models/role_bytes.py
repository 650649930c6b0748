"""What a role bank and a rollout hold, in bytes, from shapes alone: for `plan`, torch-free. A test holds the bank's part to
its own count."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Rollout, Tuning
from llamachat.models.estimates import BYTES, Shape

FULL_SIZE_HEAD = 4  # bytes a weight of the value head, which is fp32
PROMPT_TOKENS = 200.0  # ours, assumed where nothing is known of the prompts
CACHED_ROWS = 64  # answers that are sampled at once at most
# The decoder makes a merged copy of the projections where it takes at most this share of what is free.
SHARE_FOR_DECODER = 0.6
# Decoding reads all weights for each token of a batch: far from the arithmetic that training reaches. Ours, rough.
DECODING_SLOWDOWN = 4.0


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
    critic: Literal["separate", "shared"] | None,
    is_continued: bool,
    sharing: int,
    beside: Mapping[str, Beside],
) -> dict[str, int]:
    """Bytes of weights by part: `is_continued` where the policy that PPO starts from is an adapter already; `sharing`
    reward models are adapters on its trunk, `beside` are the others by name, one for each trunk. Without a critic nothing
    is trained, and there is no reference either.

    Gradients, optimizer states, activations and caches come on top.
    """
    targets = None if tuning.targets == "all-linear" else tuning.targets
    adapter = shape.adapter_weights(tuning.rank, targets) * width
    held = {"trunk": shape.trunk_bytes(width, is_4bit=tuning.method == "qlora")}
    num_adapters = sharing
    headless = shape.trunk_bytes(width, is_4bit=False) - _language_head(shape, width)
    if tuning.method == "full" and critic is not None:
        held["policy's own weights"] = shape.trunk_bytes(width, is_4bit=False)
        if critic == "separate":
            held["critic's own weights"] = headless
    elif tuning.method != "full":
        num_adapters += 1 + is_continued + (critic == "separate")
    for name, model in beside.items():
        whole = model.shape.trunk_bytes(model.width, is_4bit=model.is_4bit)
        own = model.shape.adapter_weights(tuning.rank, targets) if model.has_adapter else 0
        head = _language_head(model.shape, model.width)
        held[f"{name} reward model beside the trunk"] = whole - head + (own + model.shape.hidden_size) * model.width
    value_head = 0 if critic is None else (shape.hidden_size + 1) * FULL_SIZE_HEAD
    held["adapters and heads"] = num_adapters * adapter + sharing * shape.hidden_size * width + value_head
    return held


def cache_bytes(shape: Shape, base: Base, rollout: Rollout) -> int:
    """Keys and values of all rows that are sampled at once, or what the recipe grants them; a server has its own."""
    if rollout.engine == "vllm":
        return 0
    if rollout.cache_gib != "auto":
        return round(rollout.cache_gib * 2**30)
    numbers = 2 * shape.layers * shape.key_value_size
    return min(2**30, CACHED_ROWS * base.max_tokens * numbers * BYTES[base.dtype])


def decoder_bytes(shape: Shape, base: Base, rollout: Rollout, gpu: Gpu | None, *, held: int) -> int:
    """The decoder's merged copy of the projections, where there is room for one beside what is `held`."""
    copy = shape.linear_weights * BYTES[base.dtype]
    if rollout.engine in ("hugging_face", "vllm"):
        return 0
    has_room = gpu is None or copy <= SHARE_FOR_DECODER * (gpu.usable_bytes - held)
    return copy if has_room else 0


def _language_head(shape: Shape, width: int) -> int:
    return 0 if shape.is_tied else shape.vocabulary * shape.hidden_size * width
