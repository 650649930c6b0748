"""Estimates of a step's cost from the model's config.json: bytes by part, optimizer steps, seconds.

Imports no torch, since `plan` must answer in seconds. Each constant states its source.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from llamachat.config.gpus import ALLOCATOR_SHARE, Gpu
from llamachat.config.sections import Base, Tuning, split_revision
from llamachat.errors import ConfigError
from llamachat.runs.atomic import storage_errors

Attention = Literal["fused", "eager", "by_sequence"]
# Queries in one block of attention by sequence: later positions are not computed, and its scores fit in a core's
# cache.
QUERY_BLOCK = 256
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# A CPU core reaches about 0.15 TFLOP/s in bf16 with the bundled model (ours, measured on two: 11.6 thousand tokens/s
# for SFT, 15.3 thousand for a reward model); two cores are assumed.
CPU_FLOPS = 3.0e11
# Model FLOPs utilization: the share of a GPU's peak that the model's arithmetic reaches. Recomputation by activation
# checkpointing adds time. Ours, assumed, not measured on any GPU. A 4-bit base unpacks each matrix before use.
ASSUMED_MFU = {"full": 0.40, "lora": 0.40, "qlora": 0.30}
# NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314, section 3): 4 bits a weight, 8 bits per block of
# 64 for its constant, 32 bits per group of 256 blocks for the constant of the constants.
NF4_BLOCK = 64
NF4_BYTES = 0.5 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * 256)
# Memory of a block's backward pass on a CPU beyond its saved activations, as shares of these: without the scores,
# and of the scores. Ours, measured (tests/pipelines/planning/test_allocated_bytes.py).
GRADIENTS_OF_A_BLOCK, GRADIENTS_OF_SCORES = 0.8, {"eager": 0.15, "fused": 0.0, "by_sequence": 0.0}
STEPPED_AT_ONCE = (
    2**27
)  # weights with fp32 gradients at once in the optimizer's step: 512 MiB; a single matrix may be larger
FORWARD = 2.0  # FLOPs per weight and token in a forward pass
# Parts of the training memory that exist once the model is loaded.
BASE_WEIGHTS, TRAINED_WEIGHTS, GATHERED = "base weights", "trained weights", "gathered blocks"
OPTIMIZER = "optimizer (fp32 masters and two moments)"
BETWEEN_CARDS = "gradients between cards"
ALLOCATOR = "kept by the allocator"
SERVER, SLEEPING_SERVER = "vLLM server", "vLLM server, asleep"  # separate processes
LOADED = frozenset((BASE_WEIGHTS, TRAINED_WEIGHTS))


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a Llama-architecture model."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    is_tied: bool = False  # embeddings and output head share one matrix
    head_size: int = 0  # 0 means hidden_size / heads

    @property
    def query_size(self) -> int:
        """Width of a token's queries over all heads, and of the attention output."""
        return self.heads * self.head_size or self.hidden_size

    @property
    def key_value_size(self) -> int:
        """Width of a token's keys over all heads, and of its values."""
        return self.key_value_heads * (self.query_size // self.heads)

    @property
    def projections(self) -> Mapping[str, tuple[int, int]]:
        """The seven projections of a block: name -> (inputs, outputs)."""
        hidden, inner, key_value = self.hidden_size, self.intermediate_size, self.key_value_size
        return {
            "q_proj": (hidden, self.query_size),
            "k_proj": (hidden, key_value),
            "v_proj": (hidden, key_value),
            "o_proj": (self.query_size, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Weights of one block."""
        return sum(inputs * outputs for inputs, outputs in self.projections.values()) + 2 * self.hidden_size

    @property
    def linear_weights(self) -> int:
        """Weights of the projections of all blocks, which a 4-bit base stores in 4 bits."""
        return self.layers * (self.layer_weights - 2 * self.hidden_size)

    @property
    def embedding_weights(self) -> int:
        """Weights of the embeddings and the output head."""
        return self.vocabulary * self.hidden_size * (1 if self.is_tied else 2)

    @property
    def weights(self) -> int:
        """All weights, including embeddings and output head."""
        return self.layers * self.layer_weights + self.embedding_weights + self.hidden_size

    @property
    def block_weights(self) -> int:
        """Weights that each token of a reward model is multiplied by."""
        return self.weights - self.embedding_weights

    def headless(self) -> "Shape":
        """The shape of a reward model: the same blocks and embeddings without a language-model head."""
        return replace(self, is_tied=True)

    def trained_weights(self, tuning: Tuning) -> int:
        """The number of trained weights."""
        if tuning.method == "full":
            return self.weights
        return self.adapter_weights(tuning.rank, None if tuning.targets == "all-linear" else tuning.targets)

    def largest_weights(self, tuning: Tuning) -> int:
        """Weights of the largest trained matrix."""
        if tuning.method == "full":
            return self.vocabulary * self.hidden_size
        names = self.projections if tuning.targets == "all-linear" else tuning.targets
        return tuning.rank * max(max(self.projections[name]) for name in names)

    def adapter_weights(self, rank: int, targets: Sequence[str] | None = None) -> int:
        """Weights of a LoRA adapter on these projections of every block (None: all seven)."""
        chosen = self.projections if targets is None else {name: self.projections[name] for name in targets}
        return self.layers * rank * sum(inputs + outputs for inputs, outputs in chosen.values())

    def trunk_bytes(self, width: int, *, is_4bit: bool) -> int:
        """Bytes of the model at `width` bytes per weight; in a 4-bit model only embeddings, head and norms have it."""
        if not is_4bit:
            return self.weights * width
        return round(self.linear_weights * NF4_BYTES) + (self.weights - self.linear_weights) * width

    def block_activations(self, width: int, row_tokens: int, *, attention: Attention, adapter_rank: int | None) -> int:
        """Bytes per token that a block saves for its backward pass; `adapter_rank` None if all weights train.

        Counted for transformers' Llama: both norms save their input in fp32, their output and, if norms train, the
        normalized input; attention saves q, k, v and its output; SwiGLU saves four tensors; an adapter seven of its
        rank. Eager attention also saves its scores in fp32 and in `width`, and keys and values repeated for every head;
        training by sequence (llamachat/models/sequence_attention.py) saves each query block's weights, in `width`.
        """
        hidden, query = self.hidden_size, self.query_size
        key_value = query if attention == "eager" else self.key_value_size
        numbers = 2 * hidden + 2 * query + 2 * key_value + 4 * self.intermediate_size
        numbers += 2 * hidden if adapter_rank is None else 7 * adapter_rank
        seen = {"eager": row_tokens * (4 + width), "fused": 0, "by_sequence": (row_tokens + QUERY_BLOCK) // 2 * width}
        scores = self.heads * seen[attention]
        return numbers * width + 2 * hidden * 4 + scores


@dataclass(frozen=True, slots=True)
class KnownBase:
    """A Hub model whose requirements are known without reading its files."""

    shape: Shape
    is_gated: bool
    file_width: int = 2  # bytes per weight in its safetensors files


# Copied from each model's config.json.
_LLAMA_2_7B = Shape(4096, 11008, 32, 32, 32, 32000)
_LLAMA_2_13B = Shape(5120, 13824, 40, 40, 40, 32000)
_LLAMA_2_70B = Shape(8192, 28672, 80, 64, 8, 32000)
_TINYLLAMA = Shape(2048, 5632, 22, 32, 4, 32000)
KNOWN_BASES = {
    "meta-llama/Llama-2-7b-hf": KnownBase(_LLAMA_2_7B, is_gated=True),
    "meta-llama/Llama-2-13b-hf": KnownBase(_LLAMA_2_13B, is_gated=True),
    "meta-llama/Llama-2-70b-hf": KnownBase(_LLAMA_2_70B, is_gated=True),
    "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T": KnownBase(_TINYLLAMA, is_gated=False, file_width=4),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": KnownBase(_TINYLLAMA, is_gated=False),
}


@dataclass(frozen=True, slots=True)
class Setup:
    """Input of all estimates: the model, how it is trained, and the GPU."""

    shape: Shape
    base: Base
    tuning: Tuning
    gpu: Gpu | None = None  # None means two CPU cores

    @property
    def width(self) -> int:
        """Bytes per weight that is not in 4 bits."""
        return BYTES[self.base.dtype]

    @property
    def trained_weights(self) -> int:
        return self.shape.trained_weights(self.tuning)

    @property
    def trunk_bytes(self) -> int:
        """Bytes of the base as loaded for this tuning method."""
        return self.shape.trunk_bytes(self.width, is_4bit=self.tuning.method == "qlora")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Peak bytes by part (on one GPU), seconds with their assumptions, and optimizer steps, if there are any.

    `loaded` names the parts that exist as soon as the models are loaded; the others grow while the step runs.
    """

    memory: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    optimizer_steps: int | None = None
    assumed: str = ""
    loaded: frozenset[str] = frozenset()

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def grown_bytes(self) -> int:
        """Growth from after loading to the peak."""
        return sum(size for name, size in self.memory.items() if name not in self.loaded)


def shape_of(model: str) -> Shape | None:
    """The shape of a model folder or a known Hub model, else None. Does not use the network."""
    known = KNOWN_BASES.get(split_revision(model)[0])
    return read_shape(Path(model)) or (known.shape if known else None)


def read_shape(folder: Path) -> Shape | None:
    """The shape of a local model folder; None without a readable config.json of the Llama architecture."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        with storage_errors(path):
            config = json.loads(path.read_text(encoding="utf-8"))
        if config.get("model_type", "llama") != "llama":
            return None  # the step itself reports the unsupported architecture
        hidden, heads, head_size = config["hidden_size"], config["num_attention_heads"], config.get("head_dim")
        return Shape(
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            vocabulary=config["vocab_size"],
            is_tied=bool(config.get("tie_word_embeddings", False)),
            head_size=0 if head_size in (None, hidden // heads) else head_size,
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: is no whole configuration of a Llama model ({type(error).__name__}: {error}). It says how large the"
            " model is. Fetch it again, or take another base."
        ) from error


def training_memory(
    setup: Setup,
    *,
    tokens: int,
    optimizer: str,
    gradient_checkpointing: bool,
    logits: int,
    attention: Attention | None = None,
) -> dict[str, int]:
    """Peak bytes by part on one GPU in an optimizer step whose forward passes have `tokens` tokens.

    `attention` overrides `base.attention`. The peak is the largest of three phases: the loss with a chunk's logits,
    the backward pass of one block, the optimizer's step. The parts add up to it. Gradients exist in all of them, as
    they are kept from one micro-batch to the next.
    """
    shape, tuning, width, trained = setup.shape, setup.tuning, setup.width, setup.trained_weights
    cards = setup.gpu.count if setup.gpu else 1
    is_full = tuning.method == "full"
    is_cut = is_full and cards > 1
    # FSDP shards the blocks with their gradients and optimizer states; embeddings, head and adapters are replicated.
    weights_per_card = -(-(trained - shape.embedding_weights) // cards) + shape.embedding_weights if is_cut else trained
    moments = 8 if optimizer == "adamw" else 2  # bytes per weight: two in fp32, or two in 8 bits
    attention = attention or ("eager" if setup.base.attention == "eager" else "fused")
    block = tokens * _block_bytes_per_token(setup, attention=attention)
    plain = tokens * _block_bytes_per_token(setup, attention="fused")
    inputs = shape.layers * tokens * shape.hidden_size * width
    saved = inputs if gradient_checkpointing else shape.layers * block
    matrix = max(a * b for a, b in shape.projections.values()) * width
    if setup.gpu is None:
        backward = round(GRADIENTS_OF_A_BLOCK * plain + GRADIENTS_OF_SCORES[attention] * (block - plain))
        # Accumulating into a gradient briefly needs a second one; the head's comes while all activations are saved.
        backward += shape.largest_weights(tuning) * width
    else:
        backward = _backward_on_gpu(setup, tokens, matrix=0 if tuning.method == "lora" else matrix)
    backward += block if gradient_checkpointing else 0
    stepping = _stepping_bytes(setup, weights_per_card, has_all_roots=setup.gpu is not None and not is_cut)
    return {
        BASE_WEIGHTS: weights_per_card * width if is_cut else setup.trunk_bytes,
        # The weights of two blocks, the gradients of one, and these in fp32 while they are reduced to their shards.
        GATHERED: shape.layer_weights * (3 * width + 4) if is_cut else 0,
        BETWEEN_CARDS: 4 * trained if cards > 1 and not is_full else 0,
        # On a GPU it is part of the block's backward pass.
        "one unpacked matrix": matrix if tuning.method == "qlora" and setup.gpu is None else 0,
        TRAINED_WEIGHTS: 0 if is_full else trained * width,
        "gradients": weights_per_card * width,
        OPTIMIZER: weights_per_card * (moments + (0 if width == 4 else 4)),
        "activations": saved,
        "logits of a chunk": logits,
        "a block's backward, beyond the logits": max(0, backward - logits),
        "the optimizer's step, beyond activations": max(0, stepping - saved - max(logits, backward)),
    }


def _backward_on_gpu(setup: Setup, tokens: int, *, matrix: int) -> int:
    """Memory of a block's backward pass beyond the block's saved activations.

    The larger of two phases in its MLP, counted on the stand-in of a GPU: the gradients of gate times up with
    those of its factors; or a projection's gradient with `matrix` bytes of its unpacked weight or weight gradient.
    """
    hidden, inner = setup.shape.hidden_size, setup.shape.intermediate_size
    return max(
        (2 * hidden + 4 * inner) * setup.width * tokens, (2 * hidden + 2 * inner) * setup.width * tokens + matrix
    )


def _stepping_bytes(setup: Setup, weights_per_card: int, *, has_all_roots: bool) -> int:
    """Memory of the optimizer's step only: fp32 gradients and AdamW's square roots for a part of the weights.

    On a GPU torch computes the roots of the whole part at once; on a CPU or with sharded weights, of one matrix, with
    a copy.
    """
    largest = setup.shape.largest_weights(setup.tuning)
    part = min(weights_per_card, max(STEPPED_AT_ONCE, largest))
    gradients = 4 * part if setup.width < 4 else 0
    return gradients + (4 * part if has_all_roots else 8 * largest)


def _block_bytes_per_token(setup: Setup, *, attention: Attention) -> int:
    """Bytes per token of activations that one block saves."""
    shape, tuning, is_full = setup.shape, setup.tuning, setup.tuning.method == "full"
    rank = None if is_full else tuning.rank
    block = shape.block_activations(setup.width, setup.base.max_tokens, attention=attention, adapter_rank=rank)
    if not is_full and tuning.dropout:  # each projection then saves its own input and a mask of one byte per value
        block += sum(inputs for inputs, _ in shape.projections.values()) * (setup.width + 1)
    return block


def with_allocator(memory: Mapping[str, int], setup: Setup, work: str) -> dict[str, int]:
    """Add what torch's allocator reserves on a GPU, by the kind of work (ALLOCATOR_SHARE)."""
    own = sum(size for name, size in memory.items() if name not in (SERVER, SLEEPING_SERVER))
    reserved = int(ALLOCATOR_SHARE[work] * own) if setup.gpu else 0
    return {**memory, **({ALLOCATOR: reserved} if reserved else {})}


def training_time(setup: Setup, weights: int, *, tokens: float, gradient_checkpointing: bool) -> float:
    """Seconds to train on this many tokens; `weights` are those that every token is multiplied by."""
    # FLOPs per weight and token: 2 forward, 2 backward for the inputs and 2 for trained weights (Kaplan et al. 2020,
    # arXiv:2001.08361, section 2.1). Attention's own, a few percent at 4096 tokens, are ignored.
    per_weight = (3 if setup.tuning.method == "full" else 2) * FORWARD
    operations = per_weight * weights * tokens
    if gradient_checkpointing:
        operations *= (per_weight + FORWARD) / per_weight
    return _seconds(operations, setup)


def forward_time(setup: Setup, products: float) -> float:
    """Seconds of forward passes with `products` multiplications of a weight with a token's value."""
    return _seconds(FORWARD * products, setup)


def _seconds(operations: float, setup: Setup) -> float:
    if setup.gpu is None:
        return operations / CPU_FLOPS
    return operations / (setup.gpu.count * setup.gpu.timed[0] * 1e12 * ASSUMED_MFU[setup.tuning.method])


def assumed_speed(gpu: Gpu | None, method: str) -> str:
    """The speed that all times are computed with, as text."""
    if gpu is None:
        return f"2 CPU cores at {CPU_FLOPS / 2e12:g} TFLOP/s each"
    tflops, whose = gpu.timed
    return f"{gpu}, {ASSUMED_MFU[method]:.0%} of {whose} {tflops:g} TFLOP/s (MFU)"
