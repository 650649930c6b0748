"""What each stage would cost: memory by part, optimizer steps, seconds. Reads neither data nor weights.

The memory is that of one card at the peak of the step. Nothing here was measured on a GPU; comments
say what was measured on a CPU.
"""

import math
from dataclasses import replace

from dpo import Config as DpoConfig
from dpo.config import CPU_ROW_TOKENS as DPO_ROW_TOKENS
from evaluation.report import Config as ReportConfig
from llamachat.config.sections import Rollout
from llamachat.maths import TOKENS_PER_CHUNK, tokens_per_chunk
from llamachat.memory.estimates import (
    ALLOCATOR,
    BASE_WEIGHTS,
    BETWEEN_CARDS,
    GATHERED,
    LOADED,
    OPTIMIZER,
    TRAINED_WEIGHTS,
    Estimate,
    Setup,
    forward_time,
    training_memory,
    training_time,
    with_allocator,
)
from llamachat.memory.role_bytes import (
    DECODER,
    DECODING_SLOWDOWN,
    ROLLOUT_PARTS,
    Lengths,
    Seating,
    role_bank_bytes,
    rollout_bytes,
    sleeping_bytes,
)
from ppo import Config as PpoConfig
from ppo.config import CPU_ROW_TOKENS as PPO_ROW_TOKENS
from ppo.config import critic_kind
from reward import Config as RewardConfig
from reward.config import CPU_ROW_TOKENS as REWARD_ROW_TOKENS
from sft import Config as SftConfig
from sft.config import CPU_ROW_TOKENS as SFT_ROW_TOKENS

# Bytes per logit on a CPU. Supervised tuning, and a reward model's language loss: fp32, its logarithm and its gradient
# exist together for a moment. PPO:
# fp32, and what its backward pass makes of it (ours, measured on a CPU and counted on the simulated GPU).
LOGIT_BYTES, PPO_LOGIT_BYTES = 12, {"cpu": 20, "cuda": 16}
TRL_TOKENS, TRL_PIECES = 4096, 32768  # TRL's loss, used on a GPU, computes this many logits at once
SHARE_OF_ANSWERS = 0.6  # share of a row's tokens in PPO and DPO that belong to answers and have logits; ours, assumed
IN_BANK = (BASE_WEIGHTS, GATHERED, TRAINED_WEIGHTS)  # parts of a training that the role bank counts
# A report's seconds on one CPU core, including loading matplotlib. Ours, measured: nine steps with 75 pictures took 16
# s.
REPORT_SECONDS, REPORT_SECONDS_OF_CURVES = 5.0, 1.2


def sft_cost(config: SftConfig, setup: Setup, *, dialogs: int | None, tokens_per_dialog: float = 200.0) -> Estimate:
    """Cost of supervised tuning on this many dialogs (None: unknown)."""
    tokens = (1 if config.packing else config.rows_per_microbatch) * setup.base.max_tokens
    if setup.gpu is None and config.packing and config.row_tokens == "auto":
        tokens = max(tokens, SFT_ROW_TOKENS)
    logits = min(tokens, TOKENS_PER_CHUNK) * setup.shape.vocabulary * LOGIT_BYTES
    memory = training_memory(
        setup,
        tokens=tokens,
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        logits=_trl_loss_bytes(setup, tokens) if setup.gpu else logits,
        attention="by_sequence" if setup.gpu is None and config.packing else None,
    )
    if setup.gpu and setup.gpu.count > 1 and setup.tuning.method == "full" and config.sample_prompts:
        # Weights are sharded over the cards: answers are sampled from the gathered weights, with only the optimizer in
        # memory.
        resident = {name: memory[name] for name in (BASE_WEIGHTS, OPTIMIZER)}
        sampling = resident | {"weights gathered to sample": setup.shape.weights * setup.width}
        memory = max(memory, sampling, key=lambda parts: sum(parts.values()))
    memory = with_allocator(memory, setup, "training")
    if dialogs is None:
        return Estimate(memory, loaded=LOADED)
    seconds = training_time(
        setup,
        setup.shape.weights,
        tokens=dialogs * config.epochs * tokens_per_dialog,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    assumed = f"at {tokens_per_dialog:.0f} tokens per dialog"
    return Estimate(memory, seconds, _steps(dialogs, config.epochs, config.examples_per_step), assumed, LOADED)


def _ppo_logit_bytes(setup: Setup) -> int:
    return PPO_LOGIT_BYTES["cuda" if setup.gpu else "cpu"]


def _trl_loss_bytes(setup: Setup, tokens: int) -> int:
    """Bytes of TRL's loss: logits of a tile, hidden states and their gradients in fp32 and the model's format, and the
    same for the head."""
    shape, width = setup.shape, setup.width
    tile = min(tokens, TRL_TOKENS) * min(shape.vocabulary, TRL_PIECES) * width
    head = shape.vocabulary * shape.hidden_size * (4 + width) if setup.tuning.method == "full" else 0
    return tile + tokens * shape.hidden_size * (4 + 2 * width) + head


def reward_cost(
    config: RewardConfig,
    setup: Setup,
    *,
    pairs: int | None,
    tokens_per_pair: float = 600.0,
    held_out_tokens: float = 0.0,
    tested_tokens: float = 0.0,
    eval_every: int = 1,
) -> Estimate:
    """Cost of a reward model that learns from this many pairs (None: unknown).

    `held_out_tokens` are scored every `eval_every` steps, before the first step and after the last, `tested_tokens` at
    the end.

    As for supervised tuning but without logits: a reward model reads one position of each answer, unless it also
    learns the chosen answers as language. Its longest forward pass is a row, or one pair, both answers of
    `base.max_tokens`.
    """
    auto = REWARD_ROW_TOKENS if setup.gpu is None else 0
    tokens = max(auto if config.row_tokens == "auto" else config.row_tokens, 2 * setup.base.max_tokens)
    chunk = min(tokens // 2, tokens_per_chunk(on_cpu=setup.gpu is None))
    logits = (PPO_LOGIT_BYTES["cuda"] if setup.gpu else LOGIT_BYTES) * chunk * setup.shape.vocabulary
    memory = training_memory(
        replace(setup, shape=setup.shape.headless()),
        tokens=tokens,
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        logits=logits if config.language_weight else 0,
        attention="by_sequence" if setup.gpu is None else None,
    )
    memory = with_allocator(memory, setup, "training")
    if pairs is None:
        return Estimate(memory, loaded=LOADED)
    seconds = training_time(
        setup,
        setup.shape.block_weights,
        tokens=pairs * config.epochs * tokens_per_pair,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    assumed = f"at {tokens_per_pair:.0f} tokens per pair"
    steps = _steps(pairs, config.epochs, config.pairs_per_step)
    scored = (1 + math.ceil(steps / eval_every)) * held_out_tokens + tested_tokens
    scoring = forward_time(setup, scored * setup.shape.block_weights)
    return Estimate(memory, seconds + scoring, steps, assumed, LOADED)


def dpo_cost(
    config: DpoConfig,
    setup: Setup,
    *,
    pairs: int | None,
    held_out_pairs: float,
    tokens_per_pair: float,
    eval_every: int,
) -> Estimate:
    """Cost of DPO on this many pairs (None: unknown), with an evaluation every `eval_every` steps.

    Its longest forward pass is a row, or one pair, both answers of `base.max_tokens`. There is no reference model: the
    starting policy reads all pairs once, before the first step.
    """
    auto = DPO_ROW_TOKENS if setup.gpu is None else 0
    tokens = max(auto if config.row_tokens == "auto" else config.row_tokens, 2 * setup.base.max_tokens)
    chunk = min(SHARE_OF_ANSWERS * tokens, tokens_per_chunk(on_cpu=setup.gpu is None))
    memory = training_memory(
        setup,
        tokens=tokens,
        optimizer=config.optimizer,
        gradient_checkpointing=config.gradient_checkpointing,
        logits=_ppo_logit_bytes(setup) * round(chunk) * setup.shape.vocabulary,
        attention="fused" if setup.gpu is None else None,
    )
    memory = with_allocator(memory, setup, "training")
    if pairs is None:
        return Estimate(memory, loaded=LOADED)
    seconds = training_time(
        setup,
        setup.shape.weights,
        tokens=pairs * config.epochs * tokens_per_pair,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    assumed = f"at {tokens_per_pair:.0f} tokens per pair"
    steps = _steps(pairs, config.epochs, config.pairs_per_step)
    read = pairs + (2 + math.ceil(steps / eval_every)) * held_out_pairs
    reading = forward_time(setup, read * tokens_per_pair * setup.shape.weights)
    return Estimate(memory, seconds + reading, steps, assumed, LOADED)


def _steps(examples: int, epochs: float, per_step: int) -> int:
    return math.ceil(max(1, int(examples * epochs + 0.5)) / per_step)


def sampling_cost(
    setup: Setup,
    rollout: Rollout,
    seating: Seating,
    lengths: Lengths,
    *,
    answers: int | None,
    samples_per_prompt: int = 1,
    tuned: Estimate | None = None,
) -> Estimate:
    """Cost of a step that samples this many answers (None: unknown), scores them and tunes on some of them.

    Sampling and tuning run in sequence, and the memory of the first is freed before the second: the larger one
    counts.
    """
    tuned = tuned or Estimate()
    tuned = replace(tuned, memory=tuned.memory | sleeping_bytes(rollout))
    memory = sampling_memory(setup, rollout, seating)
    worst = Estimate(memory, loaded=frozenset(memory) - {*ROLLOUT_PARTS, ALLOCATOR})
    worst = max(worst, tuned, key=lambda estimate: estimate.peak_bytes)
    if answers is None:
        return Estimate(worst.memory, loaded=worst.loaded)
    prompt, answer = lengths.of(setup.base, rollout)
    # Forward passes: one per prompt for all its answers, one per answer's tokens, and one of both per reward model.
    generated = (prompt / samples_per_prompt + DECODING_SLOWDOWN * answer) * setup.shape.weights
    scored = seating.num_reward_models * (prompt + answer) * setup.shape.block_weights
    seconds = forward_time(setup, answers * (generated + scored))
    assumed = lengths.assumed(setup.base, rollout)
    return Estimate(worst.memory, seconds + tuned.seconds, tuned.optimizer_steps, assumed, worst.loaded)


def sampling_memory(
    setup: Setup, rollout: Rollout, seating: Seating, *, answers_at_once: int | None = None
) -> dict[str, int]:
    """Bytes on the card while answers are sampled and scored, with the engine's full batch unless there are fewer
    answers."""
    loaded = role_bank_bytes(setup, seating, critic=None)
    sampling = rollout_bytes(
        setup,
        rollout,
        loaded_bytes=sum(loaded.values()),
        shares_plain=setup.tuning.method == "full",
        answers=answers_at_once,
    )
    return with_allocator(loaded | sampling, setup, "sampling")


def ppo_cost(config: PpoConfig, setup: Setup, rollout: Rollout, seating: Seating, lengths: Lengths) -> Estimate:
    """Cost of all iterations of PPO."""
    shape = setup.shape
    steps = config.iterations * config.epochs * (config.responses_per_iteration // config.responses_per_minibatch)
    responses = config.iterations * config.responses_per_iteration
    evaluated = (1 + config.iterations // config.validation_every) * config.validation_prompts + 2 * config.test_prompts
    prompt, answer = lengths.of(setup.base, rollout)
    per_response = prompt + answer
    networks = 2 if critic_kind(config) == "separate" else 1
    # Per evaluated answer: sampled, read by policy and reference, scored. A training answer also gets values.
    evaluating = (DECODING_SLOWDOWN * answer + prompt + 2 * per_response) * shape.weights
    evaluating += seating.num_reward_models * per_response * shape.block_weights
    values = (networks - 1) * per_response * shape.block_weights
    products = responses * (evaluating + values) + evaluated * evaluating
    sampled = forward_time(setup, products)
    trained = training_time(
        setup,
        shape.weights,
        tokens=responses * per_response * config.epochs * networks,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    loaded = frozenset(role_bank_bytes(setup, seating, critic=critic_kind(config)))
    return Estimate(
        ppo_memory(config, setup, rollout, seating),
        sampled + trained,
        steps,
        lengths.assumed(setup.base, rollout),
        loaded,
    )


def ppo_memory(config: PpoConfig, setup: Setup, rollout: Rollout, seating: Seating) -> dict[str, int]:
    """Bytes on the card at the peak of an iteration: while it samples, or in an optimizer step.

    Weights, optimizers and the decoder's copy are always present; the other parts are those of the larger of the two.
    The trunk counts once, however many roles share it; with several cards each one holds all weights.
    """
    each = 8 + (0 if setup.width == 4 else 4)  # two moments in fp32, and an fp32 master unless the weights are fp32
    loaded = role_bank_bytes(setup, seating, critic=critic_kind(config))
    loaded[OPTIMIZER] = setup.trained_weights * each
    # The critic's head is fp32 and is its own master copy.
    loaded["critic's optimizer"] = _critic_weights(config, setup) * each + 2 * _value_head_bytes(config, setup)
    if setup.gpu is None:  # on a machine with a card it is in the host's memory
        loaded["best policy so far"] = setup.trained_weights * setup.width
    sampling = rollout_bytes(
        setup,
        rollout,
        loaded_bytes=sum(loaded.values()),
        shares_plain=False,
        has_copied_ends=setup.tuning.method == "full",
        answers=config.responses_per_iteration,
    )
    loaded[DECODER] = sampling.pop(DECODER, 0)
    updating = ppo_updating_bytes(config, setup) | sleeping_bytes(rollout)
    return with_allocator(loaded | max(sampling, updating, key=lambda parts: sum(parts.values())), setup, "ppo")


def ppo_updating_bytes(config: PpoConfig, setup: Setup) -> dict[str, int]:
    """What an optimizer step needs in addition to weights and optimizers: the policy's step, whose logits make it the
    larger one."""
    gpu, longest = setup.gpu, setup.base.max_tokens
    auto = PPO_ROW_TOKENS if gpu is None else 2 * longest
    # Of the longest forward pass: a row, or the longest response with its prompt.
    tokens = max(auto if config.tokens_per_microbatch == "auto" else config.tokens_per_microbatch, longest)
    parts = training_memory(
        replace(setup, gpu=gpu and replace(gpu, count=1)),
        tokens=tokens,
        optimizer="adamw",
        gradient_checkpointing=config.gradient_checkpointing,
        logits=_ppo_logit_bytes(setup)
        * round(min(SHARE_OF_ANSWERS * tokens, tokens_per_chunk(on_cpu=gpu is None)))
        * setup.shape.vocabulary,
        attention="fused" if gpu is None else None,
    )
    if gpu and gpu.count > 1:
        parts[BETWEEN_CARDS] = 4 * setup.trained_weights
    parts["critic's gradients"] = _critic_weights(config, setup) * setup.width + _value_head_bytes(config, setup)
    return {name: size for name, size in parts.items() if name not in IN_BANK and name != OPTIMIZER}


def _critic_weights(config: PpoConfig, setup: Setup) -> int:
    """Weights that the critic trains in addition to its head."""
    if critic_kind(config) != "separate":
        return 0
    return setup.shape.headless().weights if setup.tuning.method == "full" else setup.trained_weights


def _value_head_bytes(config: PpoConfig, setup: Setup) -> int:
    """Bytes of the critic's head, which is in fp32."""
    return 0 if critic_kind(config) == "none" else 4 * (setup.shape.hidden_size + 1)


def report_cost(config: ReportConfig, *, steps: int) -> Estimate:
    """Cost of drawing the page for this many steps; no device memory, no optimizer steps."""
    seconds = REPORT_SECONDS + (REPORT_SECONDS_OF_CURVES * steps if config.shows_curves else 0.0)
    return Estimate(seconds=seconds, assumed="of drawing on one CPU core")
