"""What a step costs before it runs, from a model's config.json alone: bytes by part, optimizer steps, seconds.

Torch-free, since `plan` answers in seconds. Measured constants are ours and say where they come from.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# Training throughput assumed for hours: 40% of a card's bf16 peak with 6 FLOP a weight and token (Kaplan et al. 2020,
# arXiv:2001.08361, section 2.1). A CPU core reaches about 0.1 TFLOP/s in bf16 with the bundled model (ours, measured).
CPU_FLOPS = 2.0e11


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama-architecture model."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    is_tied: bool = False

    @property
    def layer_weights(self) -> int:
        """Weights of one block."""
        head_size = self.hidden_size // self.heads
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * self.key_value_heads * head_size
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def weights(self) -> int:
        """All weights, embeddings and output head included."""
        embeddings = self.vocabulary * self.hidden_size * (1 if self.is_tied else 2)
        return self.layers * self.layer_weights + embeddings + self.hidden_size

    def adapter_weights(self, rank: int) -> int:
        """Weights of a LoRA adapter on all seven projections of every block."""
        head_size = self.hidden_size // self.heads
        key_value = self.key_value_heads * head_size
        widths = 2 * (2 * self.hidden_size) + 2 * (self.hidden_size + key_value)
        widths += 3 * (self.hidden_size + self.intermediate_size)
        return self.layers * rank * widths


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes by part at the peak, seconds, and optimizer steps where the step has any."""

    memory: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    optimizer_steps: int | None = None


def read_shape(folder: Path) -> Shape | None:
    """The shape of a local model folder; None where there is no config.json to read."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    return Shape(
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        key_value_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
        vocabulary=config["vocab_size"],
        is_tied=bool(config.get("tie_word_embeddings", False)),
    )
