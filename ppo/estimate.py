"""What PPO would cost: memory by part, optimizer steps, seconds. Reads no data and no weights.

The trunk counts once, whatever roles share it; several cards have all weights each, and share the work. Nothing here was
measured on a GPU; `plan` calls it an estimate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from llamachat.config.gpus import Gpu
from llamachat.config.sections import Base, Rollout, Tuning
from llamachat.memory.estimates import (
    BASE_WEIGHTS,
    BYTES,
    GATHERED,
    OPTIMIZER,
    TRAINED_WEIGHTS,
    Estimate,
    Shape,
    forward_time,
    training_memory,
    training_time,
)
from llamachat.memory.role_bytes import (
    DECODER,
    DECODING_SLOWDOWN,
    Beside,
    Lengths,
    role_bank_bytes,
    rollout_bytes,
)
from ppo.config import Config

LOGITS_PER_CHUNK = 2048  # tokens whose logits exist at once (llamachat.maths.logprobs)
# A logit in fp32 with what its backward pass makes of it (ours, measured on a CPU), and how many of a row's tokens have
# logits, those of answers (ours, assumed).
LOGIT_BYTES, SHARE_OF_ANSWERS = 20, 0.6
CPU_ROW_TOKENS = 1024  # as ppo/train.py has it (which imports torch)
IN_BANK = (BASE_WEIGHTS, GATHERED, TRAINED_WEIGHTS)  # parts of a training that the bank's count has


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
    lengths: Lengths = field(default_factory=Lengths)


def estimate(config: Config, work: Workload) -> Estimate:
    """Bytes at the peak of an optimizer step, and seconds for all iterations."""
    steps = config.iterations * config.epochs * (config.responses_per_iteration // config.responses_per_minibatch)
    responses = config.iterations * config.responses_per_iteration
    evaluated = (1 + config.iterations // config.validation_every) * config.validation_prompts + 2 * config.test_prompts
    prompt, answer = work.lengths.of(work.base, work.rollout)
    per_response, models = prompt + answer, work.sharing + len(work.beside)
    networks = 1 if config.critic == "shared" else 2
    # Of an answer that is evaluated: drawn, read by policy and reference, scored. One that is learnt from has values, too.
    evaluating = (DECODING_SLOWDOWN * answer + prompt + 2 * per_response) * work.shape.weights
    evaluating += models * per_response * work.shape.block_weights
    values = (networks - 1) * per_response * work.shape.block_weights
    told = work.lengths.told(work.base, work.rollout)
    products = responses * (evaluating + values) + evaluated * evaluating
    sampled, assumed = forward_time(products, work.tuning, gpu=work.gpu, told=told)
    trained, _ = training_time(
        work.shape.weights,
        work.tuning,
        tokens=responses * per_response * config.epochs * networks,
        gradient_checkpointing=config.gradient_checkpointing,
        gpu=work.gpu,
        told="",
    )
    held = frozenset(bank_bytes(config, work))
    return Estimate(memory_by_part(config, work), sampled + trained, steps, assumed, held)


def row_tokens(config: Config, base: Base, gpu: Gpu | None) -> int:
    """Tokens of the longest forward pass of an update: a row, or the longest response with its prompt."""
    auto = CPU_ROW_TOKENS if gpu is None else 2 * base.max_tokens
    return max(auto if config.tokens_per_microbatch == "auto" else config.tokens_per_microbatch, base.max_tokens)


def memory_by_part(config: Config, work: Workload) -> dict[str, int]:
    """Bytes on the card at the worst moment of an iteration: while it samples, or in an optimizer step.

    Weights, optimizers and the decoder's copy are there all the time; the other parts are those of the worse of the two.
    """
    held = bank_bytes(config, work) | optimizer_bytes(config, work)
    if work.gpu is None:  # on a machine with a card it lies in the host's memory
        held["best policy so far"] = work.shape.trained_weights(work.tuning) * BYTES[work.base.dtype]
    sampling = rollout_bytes(
        work.shape,
        work.base,
        work.rollout,
        work.gpu,
        held=sum(held.values()),
        shares_plain=False,
        has_copied_ends=work.tuning.method == "full",
        answers=config.responses_per_iteration,
    )
    held[DECODER] = sampling.pop(DECODER, 0)
    return held | max(sampling, updating_bytes(config, work), key=lambda parts: sum(parts.values()))


def optimizer_bytes(config: Config, work: Workload) -> dict[str, int]:
    """Moments and fp32 masters of what policy and critic train; the critic's head is fp32 and its own master."""
    shape, tuning, each = work.shape, work.tuning, 8 + (0 if BYTES[work.base.dtype] == 4 else 4)
    critic = _critic_weights(config, shape, tuning) * each + 8 * (shape.hidden_size + 1)
    return {OPTIMIZER: shape.trained_weights(tuning) * each, "critic's optimizer": critic}


def updating_bytes(config: Config, work: Workload) -> dict[str, int]:
    """What an optimizer step needs beside weights and optimizers: of the policy, whose logits make it the worse one."""
    tokens, width = row_tokens(config, work.base, work.gpu), BYTES[work.base.dtype]
    parts = training_memory(
        work.shape,
        work.base,
        work.tuning,
        tokens=tokens,
        optimizer="adamw",
        gradient_checkpointing=config.gradient_checkpointing,
        gpu=work.gpu and replace(work.gpu, count=1),
        logits=LOGIT_BYTES * round(min(SHARE_OF_ANSWERS * tokens, LOGITS_PER_CHUNK)) * work.shape.vocabulary,
        is_eager=work.gpu is None,  # a CPU attends a sequence at a time, without a fused kernel
    )
    if work.gpu and work.gpu.count > 1:
        parts["gradients between cards"] = 4 * work.shape.trained_weights(work.tuning)
    head = 4 * (work.shape.hidden_size + 1)
    parts["critic's gradients"] = _critic_weights(config, work.shape, work.tuning) * width + head
    return {name: size for name, size in parts.items() if name not in IN_BANK and name != OPTIMIZER}


def _critic_weights(config: Config, shape: Shape, tuning: Tuning) -> int:
    """Weights that the critic trains beside its head."""
    if config.critic == "shared":
        return 0
    return shape.headless().weights if tuning.method == "full" else shape.trained_weights(tuning)


def bank_bytes(config: Config, work: Workload) -> dict[str, int]:
    """The weights of all roles."""
    return role_bank_bytes(
        work.shape,
        work.tuning,
        width=BYTES[work.base.dtype],
        critic=config.critic,
        is_continued=work.is_continued,
        sharing=work.sharing,
        beside=work.beside,
    )
