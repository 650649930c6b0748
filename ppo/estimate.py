"""What PPO would cost: memory by part, optimizer steps, seconds. Reads no data and no weights.

The trunk counts once, whatever roles share it; PPO runs on one card. Nothing here was measured on a GPU; `plan` calls it
an estimate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Rollout, Tuning
from llamachat.models.estimates import BYTES, Estimate, Shape, training_memory, training_time
from llamachat.models.role_bytes import Beside, role_bank_bytes
from ppo.config import Config

LOGITS_PER_CHUNK = 2048  # tokens whose logits exist at once (llamachat.logprobs)
PROMPT_TOKENS = 200.0  # ours, assumed where nothing is known of the prompts
CACHED_ROWS = 64  # responses that are sampled at once at most
# The decoder makes a merged copy of the projections where it takes at most this share of what is free.
SHARE_FOR_DECODER = 0.6
# Decoding reads all weights for each token of a batch: far from the arithmetic that training reaches. Ours, rough.
DECODING_SLOWDOWN = 4.0
IN_BANK = ("base weights", "gathered blocks", "trained weights")  # parts of a training that the bank's count has


@dataclass(frozen=True, slots=True)
class Workload:
    """What the planner knows of one PPO step."""

    shape: Shape
    base: Base
    tuning: Tuning
    rollout: Rollout
    is_continued: bool = False  # whether the policy that it starts from is an adapter
    sharing: int = 0  # reward models that are one more adapter
    beside: Mapping[str, Beside] = field(default_factory=dict)  # reward models on other trunks, by name
    gpu: Gpu | None = None  # None for two CPU cores


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of an optimizer step, and seconds for all iterations."""
    steps = config.iterations * config.epochs * (config.responses_per_iteration // config.responses_per_minibatch)
    responses = config.iterations * config.responses_per_iteration
    per_response = min(float(work.base.max_tokens), PROMPT_TOKENS + work.rollout.max_new_tokens)
    # The update trains policy and critic; a forward pass is a third of one's training or so. Before it there is one of
    # policy, reference, critic and each reward model.
    networks = 1 if config.critic == "shared" else 2
    passes = config.epochs * networks + (networks + 1 + work.sharing + len(work.beside)) / 3
    passes += DECODING_SLOWDOWN * work.rollout.max_new_tokens / per_response / 3
    seconds, assumed = training_time(
        work.shape.weights,
        work.tuning,
        tokens=responses * per_response * passes,
        gradient_checkpointing=config.gradient_checkpointing,
        gpu=replace(work.gpu, count=1) if work.gpu else None,
        told=f"{per_response:.0f} tokens a prompt with its response, decoding at a quarter of training's speed",
    )
    return Estimate(memory_by_part(config, work), seconds, steps, assumed)


def memory_by_part(config: Config, work: Workload) -> dict[str, int]:
    """Bytes on the card at the worst moment of an optimizer step."""
    shape, tuning, width = work.shape, work.tuning, BYTES[work.base.dtype]
    longest = work.base.max_tokens
    tokens = longest if config.tokens_per_microbatch == "auto" else max(longest, config.tokens_per_microbatch)
    held = role_bank_bytes(
        shape,
        tuning,
        width=width,
        critic=config.critic,
        is_continued=work.is_continued,
        sharing=work.sharing,
        beside=work.beside,
    )
    training = training_memory(
        shape,
        work.base,
        tuning,
        tokens=tokens,
        optimizer="adamw",
        gradient_checkpointing=config.gradient_checkpointing,
        gpu=None,
        logits=3 * min(tokens, LOGITS_PER_CHUNK) * shape.vocabulary * 4,
    )
    held |= {name: size for name, size in training.items() if name not in IN_BANK}
    held["critic's gradients and optimizer"] = critic_state_bytes(config, shape, tuning, width)
    held["keys and values of the rollout"] = cache_bytes(work, width)
    held["rollout's copy of the projections"] = decoder_bytes(work, width, held=sum(held.values()))
    return held


def critic_state_bytes(config: Config, shape: Shape, tuning: Tuning, width: int) -> int:
    """Gradients, two moments and fp32 masters of what the critic trains; its head is fp32 and its own master."""
    head = (shape.hidden_size + 1) * (4 + 8)
    if config.critic == "shared":
        return head
    trained = shape.headless().weights if tuning.method == "full" else shape.trained_weights(tuning)
    return trained * (width + 8 + (0 if width == 4 else 4)) + head


def cache_bytes(work: Workload, width: int) -> int:
    """Keys and values of all rows that are sampled at once, or what the recipe grants them; a server has its own."""
    if work.rollout.engine == "vllm":
        return 0
    if work.rollout.cache_gib != "auto":
        return round(work.rollout.cache_gib * 2**30)
    numbers = 2 * work.shape.layers * work.shape.key_value_size
    return min(2**30, CACHED_ROWS * work.base.max_tokens * numbers * width)


def decoder_bytes(work: Workload, width: int, *, held: int) -> int:
    """The decoder's merged copy of the projections, where there is room for one."""
    copy = work.shape.linear_weights * width
    if work.rollout.engine in ("hugging_face", "vllm"):
        return 0
    has_room = work.gpu is None or copy <= SHARE_FOR_DECODER * (work.gpu.usable_bytes - held)
    return copy if has_room else 0
