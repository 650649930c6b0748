"""What PPO would cost: memory by part, optimizer steps, seconds. Reads no data and no weights.

The trunk counts once, whatever roles share it. Nothing here was measured on a GPU; `plan` calls it an estimate.
"""

from dataclasses import dataclass

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Rollout, Tuning
from llamachat.models.estimates import BYTES, Estimate, Shape, training_memory, training_time
from ppo.config import Config

LOGITS_PER_CHUNK = 2048  # tokens whose logits exist at once (llamachat.logprobs)
PROMPT_TOKENS = 200.0  # ours, assumed where nothing is known of the prompts
CACHED_ROWS = 64  # responses that are sampled at once at most
# A forward pass of policy, reference, critic and each reward model before the update, beside the update's own.
SCORING_PASSES = 3
# Decoding reads all weights for each token of a batch: far from the arithmetic that training reaches. Ours, rough.
DECODING_SLOWDOWN = 4.0


@dataclass(frozen=True, slots=True)
class Workload:
    """What the planner knows of one PPO step."""

    shape: Shape
    base: Base
    tuning: Tuning
    rollout: Rollout
    reward_models: int  # that share the trunk
    beside: int = 0  # bytes of reward models on trunks of their own
    gpu: Gpu | None = None  # None for two CPU cores


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of an optimizer step, and seconds for all iterations."""
    shape, tuning, width = work.shape, work.tuning, BYTES[work.base.dtype]
    longest = work.base.max_tokens
    tokens = longest if config.tokens_per_microbatch == "auto" else max(longest, config.tokens_per_microbatch)
    memory = training_memory(
        shape,
        work.base,
        tuning,
        tokens=tokens,
        optimizer="adamw",
        gradient_checkpointing=config.gradient_checkpointing,
        gpu=work.gpu,
        logits=3 * min(tokens, LOGITS_PER_CHUNK) * shape.vocabulary * 4,
    )
    memory |= other_roles(config, work)
    memory["keys and values of the rollout"] = cache_bytes(shape, work, width)
    memory["reward models beside the trunk"] = work.beside
    steps = config.iterations * config.epochs * (config.responses_per_iteration // config.responses_per_minibatch)
    responses = config.iterations * config.responses_per_iteration
    per_response = min(float(longest), PROMPT_TOKENS + work.rollout.max_new_tokens)
    # The update trains policy and critic; a forward pass is a third of one's training or so.
    trained = config.epochs * (1 if config.critic == "shared" else 2)
    passes = trained + (SCORING_PASSES + work.reward_models) / 3
    passes += DECODING_SLOWDOWN * work.rollout.max_new_tokens / per_response / 3
    seconds, assumed = training_time(
        shape,
        tuning,
        tokens=responses * per_response * passes,
        gradient_checkpointing=config.gradient_checkpointing,
        gpu=work.gpu,
        told=f"{per_response:.0f} tokens a prompt with its response, decoding at a quarter of training's speed",
    )
    return Estimate(memory, seconds, steps, assumed)


def other_roles(config: Config, work: Workload) -> dict[str, int]:
    """Bytes of reference, critic and reward models: adapters, or whole copies where all weights train."""
    shape, tuning, width = work.shape, work.tuning, BYTES[work.base.dtype]
    trained = shape.trained_weights(tuning)
    state = 8 + width + (0 if width == 4 else 4)  # moments, gradient, master
    has_critic = config.critic == "separate"
    if tuning.method == "full":
        return {
            "reference": shape.weights * width,
            "critic with its optimizer": shape.headless().weights * (width + state) if has_critic else 0,
            "reward models": work.reward_models * shape.headless().weights * width,
        }
    return {
        "reference's adapter": trained * width,
        "critic's adapter with its optimizer": trained * (width + state) if has_critic else 0,
        "reward models' adapters": work.reward_models * trained * width,
    }


def cache_bytes(shape: Shape, work: Workload, width: int) -> int:
    """Keys and values of all rows that are sampled at once, or what the recipe grants them."""
    if work.rollout.cache_gib != "auto":
        return round(work.rollout.cache_gib * 2**30)
    return min(2**30, CACHED_ROWS * work.base.max_tokens * 2 * shape.layers * shape.key_value_size * width)
