"""What a card's data sheet allows at most: tokens a second of decoding by bandwidth, of training and scoring by arithmetic.

No program reaches these; they say how far a measured number is from what is possible.
"""

from collections.abc import Iterator

from llamachat.config.gpus import BANDWIDTH, Gpu
from llamachat.memory.estimates import BYTES, FORWARD, Shape, shape_of
from llamachat.memory.role_bytes import CACHED_ROWS, DECODER, Lengths
from pipelines.planning.fit import fits, presets
from pipelines.planning.plan import card
from pipelines.recipe.recipe import Recipe


def preset_limits() -> Iterator[tuple[str, ...]]:
    """A row for each preset whose card's data sheet is known, the first one being the head."""
    yield ("preset", "card", "GB/s", "TFLOP/s", "decoding", "training", "scoring")
    for path, recipe in presets():
        gpu, shape = card(recipe), shape_of(recipe.base.model)
        if gpu is None or gpu.name not in BANDWIDTH or gpu.tflops is None or shape is None:
            continue
        rates = (decoding_limit(recipe, shape, gpu), training_limit(recipe, shape, gpu), scoring_limit(shape, gpu))
        sheet = (str(BANDWIDTH[gpu.name]), f"{gpu.tflops:g}")
        yield (path.stem, str(gpu), *sheet, *(f"{rate:,.0f}" for rate in rates))


def decoding_limit(recipe: Recipe, shape: Shape, gpu: Gpu) -> float:
    """Tokens a second of so many answers at once, if a step takes no longer than reading all weights and the cache once."""
    width = BYTES[recipe.base.dtype]
    found = fits(recipe, gpu)
    has_copy = found is not None and any(step.estimate.memory.get(DECODER) for step in found.steps)
    weights = shape.trunk_bytes(width, is_4bit=recipe.tuning.method == "qlora" and not has_copy)
    weights -= shape.vocabulary * shape.hidden_size * width  # of the embeddings a row a token is read
    prompt, answer = Lengths().of(recipe.base, recipe.rollout)
    cache = 2 * shape.layers * shape.key_value_size * width * (prompt + answer / 2)
    return CACHED_ROWS * BANDWIDTH[gpu.name] * 1e9 / (weights + CACHED_ROWS * cache)


def training_limit(recipe: Recipe, shape: Shape, gpu: Gpu) -> float:
    """Tokens a second of supervised tuning on all cards at their peak."""
    assert gpu.tflops is not None, "the caller asks of known cards alone"
    passes = (3 if recipe.tuning.method == "full" else 2) + recipe.sft.gradient_checkpointing
    return gpu.count * gpu.tflops * 1e12 / (FORWARD * passes * shape.weights)


def scoring_limit(shape: Shape, gpu: Gpu) -> float:
    """Tokens a second that one reward model reads on one card at its peak."""
    assert gpu.tflops is not None, "the caller asks of known cards alone"
    return gpu.tflops * 1e12 / (FORWARD * shape.block_weights)
