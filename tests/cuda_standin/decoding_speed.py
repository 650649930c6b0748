"""Projected tokens a second of the decoder at the sizes of Llama 2: kernels of the stand-in on a roofline.

    python -m tests.cuda_standin.decoding_speed [--models 7b 13b] [--cards rtx-4090 a100-80gb]

Each kernel takes 2 us and the larger of its operations at 60% of the card's peak and its bytes at 80% of the card's
bandwidth; the host takes 10 us to launch one. Nothing is computed, no weights are read. Good for ratios, not for hours.
"""

import argparse
import gc
import logging
from typing import TYPE_CHECKING, Any

from llamachat.memory.estimates import KNOWN_BASES, Shape
from tests.cuda_standin.device import GIB, Device, load

if TYPE_CHECKING:
    from llamachat.rollout.decoder import LlamaEngine

# bf16 TFLOP/s without sparsity, GB/s, GiB, multiprocessors, compute capability: vendors' data sheets.
CARDS: dict[str, tuple[float, float, float, int, tuple[int, int]]] = {
    "rtx-3090": (71, 936, 24.0, 82, (8, 6)),
    "rtx-4090": (165, 1008, 24.0, 128, (8, 9)),
    "a100-80gb": (312, 1935, 80.0, 108, (8, 0)),
    "h100": (989, 3350, 79.6, 132, (9, 0)),
}
MODELS = {size: f"meta-llama/Llama-2-{size}-hf" for size in ("7b", "13b", "70b")}
PEAK_SHARE, BANDWIDTH_SHARE = 0.6, 0.8
PROMPT, ANSWER = 200, 256  # tokens


def project(device: Device, card: str, size: str, *, is_4bit: bool, steps: int = 48) -> dict[str, Any]:
    """Rows that fit next to the model, launches and seconds of a decode step, tokens a second."""
    from llamachat.rollout.decoder import LlamaEngine
    from llamachat.rollout.weights import Dense
    from tests.cuda_standin.torch_cuda import PROPERTIES

    tflops, bandwidth, gib, processors, capability = CARDS[card]
    PROPERTIES.update(multi_processor_count=processors, major=capability[0], minor=capability[1])
    device.resize(gib)
    device.roofline(flops=tflops * 1e12 * PEAK_SHARE, bandwidth=bandwidth * 1e9 * BANDWIDTH_SHARE)
    device.shape_mode(True)
    model = _model(KNOWN_BASES[MODELS[size]].shape, is_4bit=is_4bit)
    plain = _steps(device, LlamaEngine(model, (), capture=lambda step: step), steps=4)
    engine = LlamaEngine(model, ())
    recorded = _steps(device, engine, steps=steps)
    rows, launches, seconds = recorded[-1]
    return {
        "merged": isinstance(engine._network.weights.layers[0].down, Dense),
        "rows": rows,
        "launches": plain[-1][1],
        "recorded launches": launches,
        "ms": 1e3 * seconds,
        "tokens/s": rows / seconds,
        "peak GiB": device.peak_allocated / GIB,
    }


def _steps(device: Device, engine: "LlamaEngine", *, steps: int) -> list[tuple[int, int, float]]:
    """Rows, launches and seconds of decode steps, with as many rows as the card has room for, 128 at most."""
    from llamachat.rollout.engine import Sampling
    from llamachat.rollout.live_rows import LiveRows

    taken: list[tuple[int, int, float]] = []
    plain = LiveRows.step

    def step(self: LiveRows) -> Any:
        device.reset_statistics()
        rows = self.live
        done = plain(self)
        statistics = device.statistics()
        taken.append((rows, statistics["kernels"], statistics["seconds"]))
        if len(taken) == steps:
            raise StopIteration
        return done

    LiveRows.step = step  # type: ignore[method-assign]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=ANSWER, seed=0)
    prompts = [[1, *range(3, PROMPT + 2)]] * 128
    try:
        engine.generate(prompts, samples_per_prompt=1, sampling=sampling)
    except RuntimeError as error:  # a generator's StopIteration
        if not isinstance(error.__cause__, StopIteration):
            raise
    finally:
        LiveRows.step = plain  # type: ignore[method-assign]
        engine.release()
        gc.collect()  # a step that is not recorded, but kept as a recording, holds its batch
    return taken


def _model(shape: Shape, *, is_4bit: bool) -> Any:
    """A language model of this shape with an adapter of rank 64 on the device, its weights without values."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers import LlamaConfig, LlamaForCausalLM

    from llamachat.config.sections import Tuning
    from llamachat.models.loading import SEVEN_PROJECTIONS, attach_adapter
    from llamachat.models.nf4 import quantization_config

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=4096,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    pack: Any = Params4bit  # its types know fewer arguments
    rotary = type(model.model.rotary_emb)(config).to("cuda")
    if is_4bit:
        for name, layer in list(model.named_modules()):
            if name.rpartition(".")[2] in SEVEN_PROJECTIONS:
                weight = torch.empty(layer.weight.shape, dtype=torch.bfloat16, device="cuda")
                packed = Linear4bit(
                    *reversed(weight.shape), bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
                )
                packed.weight = pack(weight, requires_grad=False, quant_type="nf4")._quantize("cuda")
                model.set_submodule(name, packed)
        model.config.quantization_config = quantization_config(torch.bfloat16)
        model.is_loaded_in_4bit = True
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, own = name.rpartition(".")
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
            setattr(model.get_submodule(owner), own, torch.nn.Parameter(empty, requires_grad=False))
    model.model.rotary_emb = rotary
    tuning = Tuning(method="qlora" if is_4bit else "lora", rank=64)
    return attach_adapter(model, tuning, seed=0).eval().requires_grad_(False)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description="Projected decoding speed by card.")
    parser.add_argument("--models", nargs="*", default=["7b"], choices=MODELS, help="Sizes of Llama 2.")
    parser.add_argument("--cards", nargs="*", default=list(CARDS), choices=CARDS, help="Cards.")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    device = load()
    device.expandable(True)  # as `llamachat` sets it
    print(
        "| model | card | weights | rows | launches, recorded | ms a step | tokens/s |\n|---|---|---|---|---|---|---|"
    )
    for size in options.models:
        for card in options.cards:
            projection = project(device, card, size, is_4bit=True)
            weights = "merged copy" if projection["merged"] else "4 bits"
            launches = f"{projection['launches']}, {projection['recorded launches']}"
            print(
                f"| {size} | {card} | {weights} | {projection['rows']} | {launches} | {projection['ms']:.1f} | {projection['tokens/s']:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
