"""Memory of a role bank and a rollout, computed from shapes, and the rule for sharing weights among roles. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from llamachat.config.sections import Base, Rollout
from llamachat.memory.estimates import BYTES, NF4_BLOCK, SERVER, SLEEPING_SERVER, Setup, Shape

FULL_SIZE_HEAD = 4  # bytes per weight of the value head, which is fp32
PROMPT_TOKENS = 200.0  # ours, assumed if the prompts are unknown
# Mean answer length as a share of the maximum, if not measured. Ours: 0.31 and 0.37 with the bundled model.
ANSWER_SHARE = 0.4
# Answers sampled at once: the maximum on a CPU, and the number a GPU should have room for (it takes up to 512).
CPU_ROWS, CACHED_ROWS = 80, 64
PROMPT_TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 16384}  # prefilled at once by the decoder
SPARE_COLUMNS = 32  # decoding steps between two layouts: each layout copies the cache, each spare column is computed
PLAIN_SCORES = 2**24  # most scores per key-value head when prefilling prompts; with more, the fused kernel is used
CACHE, DECODER, STEP = "keys and values of the rollout", "rollout's copy of the projections", "the rollout's step"
ROLLOUT_PARTS = CACHE, DECODER, STEP, SERVER
# Memory of a sleeping server: the CUDA context and captured graphs. Ours, based on the 0.9 to 1.7 GB that users of vLLM
# report for single GPUs.
SLEEPING_BYTES = 2 * 2**30
# The decoder merges a copy of the projections if that takes at most this share of free memory; keys and values take at
# most this share of the rest.
SHARE_FOR_DECODER, SHARE_FOR_CACHE = 0.6, {"cpu": 0.25, "cuda": 0.8}
# Decoding reads all weights for each token of a batch, far below the arithmetic rate of training. Ours, rough.
DECODING_SLOWDOWN = 4.0

Name = TypeVar("Name")
Model = TypeVar("Model")
Trunk = TypeVar("Trunk")


def place_reward_models(
    models: Mapping[Name, Model],
    policy_trunk: Trunk,
    *,
    carries: Callable[[Trunk, Model], bool],
    share: Callable[[Name, Model, Trunk], None],
    load: Callable[[Name, Model], Trunk | None],
) -> None:
    """Decide which reward models share weights. Used both to open models and to count their bytes.

    In order, each model that is an adapter on loaded weights (`carries`) is added to these; any other loads its own
    weights. `load` returns them if later adapters can share them, else None.
    """
    trunks = [policy_trunk]
    for name, model in models.items():
        trunk = next((trunk for trunk in trunks if carries(trunk, model)), None)
        if trunk is not None:
            share(name, model, trunk)
        elif (own := load(name, model)) is not None:
            trunks.append(own)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of a prompt and of an answer; an answer of None was not measured."""

    prompt: float = PROMPT_TOKENS
    answer: float | None = None
    measured_by: str = ""  # the model whose answers were measured

    def of(self, base: Base, rollout: Rollout) -> tuple[float, float]:
        """Tokens of a prompt and an answer, capped so that together they fit the maximum sequence length."""
        answer = ANSWER_SHARE * rollout.max_new_tokens if self.answer is None else self.answer
        answer = min(answer, rollout.max_new_tokens)
        return min(self.prompt, max(1.0, base.max_tokens - answer)), answer

    def assumed(self, base: Base, rollout: Rollout) -> str:
        """The assumptions as text."""
        prompt, answer = self.of(base, rollout)
        of_whom = f"as of {self.measured_by}" if self.measured_by else f"{ANSWER_SHARE:g} of the longest"
        decoding = "decoding at a quarter of a forward pass's speed"
        return f"with prompts of {prompt:.0f} tokens, answers of {answer:.0f} ({of_whom}), {decoding}"


@dataclass(frozen=True, slots=True)
class Beside:
    """A reward model loaded separately, because its weights differ from the policy's."""

    shape: Shape
    width: int = BYTES["bfloat16"]  # bytes per weight
    is_4bit: bool = False
    has_adapter: bool = False  # of the recipe's rank


@dataclass(slots=True)
class Seating:
    """The placement of the models in one role bank."""

    is_continued: bool = False  # whether training starts from a policy that is already an adapter
    sharing: int = 0  # reward models that are adapters on a trunk loaded for other roles
    beside: dict[str, Beside] = field(default_factory=dict)  # reward models on other trunks, by name

    @property
    def num_reward_models(self) -> int:
        return self.sharing + len(self.beside)


def role_bank_bytes(
    setup: Setup, seating: Seating, *, critic: Literal["separate", "shared", "none"] | None
) -> dict[str, int]:
    """Bytes of weights by part. With critic None nothing is trained, and there is no reference.

    Excludes gradients, optimizer states, activations and caches.
    """
    shape, tuning, width = setup.shape, setup.tuning, setup.width
    targets = None if tuning.targets == "all-linear" else tuning.targets
    adapter = shape.adapter_weights(tuning.rank, targets) * width
    parts = {"trunk": setup.trunk_bytes}
    num_adapters = seating.sharing
    if tuning.method == "full" and critic is not None:
        parts["policy's own weights"] = shape.trunk_bytes(width, is_4bit=False)
        if critic == "separate":
            parts["critic's own weights"] = parts["policy's own weights"] - _language_head(shape, width)
    elif tuning.method != "full":
        num_adapters += 1 + (0 if critic is None else seating.is_continued) + (critic == "separate")
    for name, model in seating.beside.items():
        whole = model.shape.trunk_bytes(model.width, is_4bit=model.is_4bit)
        own = model.shape.adapter_weights(tuning.rank, targets) if model.has_adapter else 0
        head = _language_head(model.shape, model.width)
        parts[f"{name} reward model next to the trunk"] = whole - head + (own + model.shape.hidden_size) * model.width
    value_head = 0 if critic in (None, "none") else (shape.hidden_size + 1) * FULL_SIZE_HEAD
    parts["adapters and heads"] = num_adapters * adapter + seating.sharing * shape.hidden_size * width + value_head
    return parts


def rollout_bytes(
    setup: Setup,
    rollout: Rollout,
    *,
    loaded_bytes: int,
    shares_plain: bool,
    has_copied_ends: bool = False,
    answers: int | None = None,
) -> dict[str, int]:
    """Bytes of sampling in addition to `loaded_bytes`: the copy of the projections, keys and values, one decoding step.

    `shares_plain`: frozen, unstacked projections without adapter (the outer two of each block) are read from the model.
    `has_copied_ends`: embeddings and head train, so the decoder copies them. `answers` is the total number to sample. A
    server on the same GPU uses `rollout.server_gib` for everything.
    """
    if rollout.engine == "vllm":
        return {} if rollout.server_gib is None else {SERVER: round(rollout.server_gib * 2**30)}
    shape, gpu = setup.shape, setup.gpu
    alone = shape.layers * (shape.hidden_size**2 + shape.hidden_size * shape.intermediate_size)
    merged = (shape.linear_weights - (alone if shares_plain else 0)) * setup.width
    merged += shape.embedding_weights * setup.width if has_copied_ends else 0
    copy = merged
    if rollout.engine == "hugging_face":
        copy = 0
    elif gpu and copy > SHARE_FOR_DECODER * (gpu.allocatable_bytes - loaded_bytes):
        copy = _unmerged_bytes(setup)
    rows = min(CACHED_ROWS if gpu else CPU_ROWS, answers or CACHED_ROWS)
    columns = setup.base.max_tokens + (SPARE_COLUMNS if gpu else 0)
    row = columns * 2 * shape.layers * shape.key_value_size * setup.width
    cache = rows * row
    if rollout.cache_gib != "auto":
        cache = min(cache, round(rollout.cache_gib * 2**30))
    elif gpu:
        room = gpu.allocatable_bytes - loaded_bytes - copy
        cache = min(
            cache, max(row, cache_budget(room, _reading_bytes(setup, rollout, rows=rows, is_merged=copy == merged)))
        )
    step = _step_bytes(setup, rollout, rows=rows, cache=cache, is_merged=copy == merged)
    return {CACHE: cache, DECODER: copy, STEP: step}


def sleeping_bytes(rollout: Rollout) -> dict[str, int]:
    """Bytes of a sleeping server on the same GPU."""
    return (
        {} if rollout.server_gib is None else {SLEEPING_SERVER: min(SLEEPING_BYTES, round(rollout.server_gib * 2**30))}
    )


def _unmerged_bytes(setup: Setup) -> int:
    """Bytes of the decoder for projections that it does not copy: 4-bit scales in fp32 and the stacked adapters."""
    shape, rank = setup.shape, setup.tuning.rank
    if setup.tuning.method != "qlora":
        return 0
    scales = 4 * shape.linear_weights // NF4_BLOCK
    query_key_value = shape.query_size + 2 * shape.key_value_size
    # The second adapter matrices of stacked projections form a block diagonal as wide as the sum of their ranks.
    up = 3 * query_key_value + shape.hidden_size + 2 * 2 * shape.intermediate_size + shape.hidden_size
    down = sum(inputs for inputs, _ in shape.projections.values())
    return scales + shape.layers * rank * (up + down) * setup.width


def _step_bytes(setup: Setup, rollout: Rollout, *, rows: int, cache: int, is_merged: bool) -> int:
    """The largest of prefilling (block activations, scores), drawing tokens (logits of all rows) and merging (a matrix
    in fp32, to which its adapter is added)."""
    shape, width = setup.shape, setup.width
    states = _reading_bytes(setup, rollout, rows=rows, is_merged=is_merged)
    # A new layout copies one layer's keys and values. A logit is kept in its own width, in fp32 and as a probability.
    drawing = max(2 * cache // shape.layers // 2, rows * shape.vocabulary * (width + 8))
    merging = 0
    if setup.gpu and is_merged and setup.tuning.method != "full":
        unpacked = width if setup.tuning.method == "qlora" else 0
        merging = max(inputs * outputs for inputs, outputs in shape.projections.values()) * (4 + unpacked)
    return max(states, drawing, merging)


def _reading_bytes(setup: Setup, rollout: Rollout, *, rows: int, is_merged: bool) -> int:
    """Activations of one block, and scores, while prefilling prompts."""
    shape, width = setup.shape, setup.width
    prompt = max(1, setup.base.max_tokens - rollout.max_new_tokens)
    tokens = min(rows * prompt, max(prompt, PROMPT_TOKENS_AT_ONCE["cpu" if setup.gpu is None else "cuda"]))
    if setup.gpu:
        sizes = (shape.hidden_size, shape.query_size, shape.key_value_size, shape.intermediate_size)
        return reading_bytes(tokens, *sizes, width=width, is_4bit=setup.tuning.method == "qlora" and not is_merged)
    states = tokens * (4 * shape.hidden_size + 3 * shape.intermediate_size) * width
    # Scores and their softmax, up to a bound per key-value head.
    scores = min(tokens * prompt * shape.heads, PLAIN_SCORES * shape.key_value_heads) * 2 * width
    return max(states, tokens * 6 * shape.hidden_size * width + scores)


def reading_bytes(
    tokens: int, hidden: int, query: int, key_value: int, intermediate: int, *, width: int, is_4bit: bool
) -> int:
    """Activations of one block while the decoder prefills this many tokens on a GPU, counted on its stand-in.

    At the MLP's last product: its input with gate and up, residuals before and after, queries, keys and values before
    and after rotation, the attention output, and the unpacked matrix.
    """
    numbers = 3 * hidden + 3 * query + 3 * key_value + 3 * intermediate
    return tokens * numbers * width + (hidden * intermediate * width if is_4bit else 0)


def cache_budget(free_bytes: float, reading_bytes: int) -> int:
    """The cache size for `rollout.cache_gib: auto`: a share of free GPU memory that leaves room for prefilling."""
    return int(min(SHARE_FOR_CACHE["cuda"] * free_bytes, free_bytes - reading_bytes))


def _language_head(shape: Shape, width: int) -> int:
    return 0 if shape.is_tied else shape.vocabulary * shape.hidden_size * width
