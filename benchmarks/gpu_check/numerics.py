"""Results that must not depend on the card: 4-bit products, attention over packed rows, and the decoder's graphs.

Shapes: T positions of a packed row, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_check.figures import Figure
from benchmarks.gpu_check.sizes import Sizes
from llamachat.chat_format import TokenizedExample
from llamachat.config.sections import Base, Tuning
from llamachat.data.packing import collate_packed
from llamachat.models.loading import attach_adapter, load_base
from llamachat.rollout.decoder import LlamaEngine
from llamachat.rollout.engine import Completion, Sampling
from llamachat.rollout.graphs import CudaCapture, Step

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Root mean square differences relative to the reference. bf16 rounds by 0.002; ours.
MOST_ROUNDING = 0.01
MOST_MODEL_ROUNDING = 0.03  # of a whole model
# NF4 changes a normally distributed weight by about 0.095 of its standard deviation (Dettmers et al. 2023,
# arXiv:2305.14314).
QUANTISATION = (0.05, 0.12)
LEAST_SAME = 0.9  # share of identical answers: different rounding may occasionally change a token
MOST_LOGPROB_GAP = 0.1  # nats
ROWS = (1, 16, 512)  # bitsandbytes multiplies few rows without dequantizing the weights


def model_of(folder: Path, sizes: Sizes, *, is_nf4: bool) -> "LlamaForCausalLM":
    """The random base, on the card if there is one."""
    base = Base(model=str(folder / "base"), max_tokens=sizes.longest)
    return load_base(base, device="auto", is_nf4=is_nf4).eval().requires_grad_(False)


# -- 4-bit products


def nf4(folder: Path, sizes: Sizes) -> Iterator[Figure]:
    """Compare forward and backward of 4-bit layers with weights dequantized by hand on the CPU, and with bf16."""
    plain, packed = model_of(folder, sizes, is_nf4=False), model_of(folder, sizes, is_nf4=True)
    numbers = torch.Generator().manual_seed(0)
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer, full = (model.get_submodule(f"model.layers.0.{name}") for model in (packed, plain))
        weight = unpacked(layer)
        for rows in ROWS:
            x = torch.randn(rows, weight.shape[1], generator=numbers).to(torch.bfloat16)
            gradient = torch.randn(rows, weight.shape[0], generator=numbers).to(torch.bfloat16)
            y, back = _there_and_back(layer, x, gradient)
            which = f"{name} in 4 bits, {rows} rows"
            yield Figure(f"{which}: forward", error_of(y, x.float() @ weight.T), most=MOST_ROUNDING)
            yield Figure(f"{which}: backward", error_of(back, gradient.float() @ weight), most=MOST_ROUNDING)
            if rows == ROWS[-1]:
                y_full, back_full = _there_and_back(full, x, gradient)
                least, most = QUANTISATION
                yield Figure(f"{name}: 4 bits against bf16, forward", error_of(y, y_full), least=least, most=most)
                yield Figure(
                    f"{name}: 4 bits against bf16, backward", error_of(back, back_full), least=least, most=most
                )


def _there_and_back(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The layer's output for `x`, and the gradient of `x` for the output's `gradient`."""
    device = next(layer.parameters()).device
    x = x.to(device).requires_grad_()
    y = layer(x)
    y.backward(gradient.to(device))
    assert x.grad is not None
    return y, x.grad


def unpacked(layer: Any) -> Tensor:
    """A 4-bit layer's weights dequantized in fp32 on the CPU by definition: blocks of 64 with an 8-bit scale."""
    state = layer.weight.quant_state
    scales = state.absmax.cpu()
    if state.nested:
        second = state.state2
        groups = second.absmax.cpu().repeat_interleave(second.blocksize)[: len(scales)]
        scales = second.code.cpu()[scales.long()] * groups + state.offset.cpu()
    packed = layer.weight.data.detach().cpu().view(torch.uint8).flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()
    values = state.code.cpu()[codes.long()].view(-1, state.blocksize) * scales.unsqueeze(1)
    return values.view(state.shape).float()


def error_of(tensor: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of `expected`."""
    reference = expected.detach().float().cpu()
    return float((tensor.detach().float().cpu() - reference).norm() / reference.norm())


# -- packed rows


def packing(folder: Path, sizes: Sizes) -> Iterator[Figure]:
    """Check that packing does not change a sequence's logits, and that nothing leaks between sequences or backwards."""
    model = model_of(folder, sizes, is_nf4=False)
    sequences = [_random_ids(length, model.config.vocab_size, seed) for seed, length in enumerate(sizes.packed)]
    row = _on_device(collate_packed([_example(ids) for ids in sequences]), model)
    with torch.no_grad():
        together_TV = model(**row, use_cache=False).logits[0]
        alone_TV = torch.cat(
            [model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0] for ids in sequences]
        )
    name = f"packed rows ({model.config._attn_implementation})"
    yield Figure(
        f"{name}: logits against each sequence alone", error_of(together_TV, alone_TV), most=MOST_MODEL_ROUNDING
    )

    states_1TD = model.get_input_embeddings()(row["input_ids"]).detach().requires_grad_()
    logits_TV = model(inputs_embeds=states_1TD, position_ids=row["position_ids"], use_cache=False).logits[0]
    start, end = sizes.packed[0], sizes.packed[0] + sizes.packed[1] // 2
    direction_V = torch.randn(logits_TV.shape[1], generator=torch.Generator().manual_seed(0))
    (logits_TV[end].float() * direction_V.to(model.device)).sum().backward()
    assert states_1TD.grad is not None
    reached_T = states_1TD.grad[0].float().norm(dim=1).cpu()
    own = float(reached_T[start : end + 1].min() / reached_T.max())
    others = float(torch.cat([reached_T[:start], reached_T[end + 1 :]]).max() / reached_T.max())
    yield Figure(f"{name}: gradient of a token to each earlier one of its sequence", own, least=1e-6)
    yield Figure(f"{name}: gradient of a token to other sequences and later tokens", others, most=1e-9)


def _example(ids: Sequence[int]) -> TokenizedExample:
    return TokenizedExample(tuple(ids), (True,) * len(ids))


def _on_device(row: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in row.items() if name != "labels"}


def _random_ids(length: int, vocabulary: int, seed: int) -> list[int]:
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# -- the decoder


class Recorder:
    """Captures decode steps as graphs and counts them; without CUDA, a capture runs the step eagerly."""

    def __init__(self) -> None:
        self.count = 0
        self._capture = CudaCapture() if torch.cuda.is_available() else run_plainly

    def __call__(self, step: Step) -> Step:
        self.count += 1
        return self._capture(step)


def run_plainly(step: Step) -> Step:
    return step


def decoding(folder: Path, sizes: Sizes, *, is_nf4: bool, bandwidth: float | None) -> Iterator[Figure]:
    """Compare captured decode steps with eager ones and log-probabilities with the forward pass; measure speed.

    16-bit weights are merged with the adapter; 4-bit weights run with it. `bandwidth` is the card's, in bytes per
    second.
    """
    name = "decoding over 4 bits" if is_nf4 else "decoding, merged bf16"
    model = model_of(folder, sizes, is_nf4=is_nf4)
    adapted: Any = attach_adapter(model, Tuning(method="qlora" if is_nf4 else "lora", rank=16), seed=0).eval()
    for weight_name, weight in adapted.named_parameters():
        if ".lora_B." in weight_name:  # B is zero, which would have no effect
            nn.init.normal_(weight.requires_grad_(False), std=0.02)
    prompts = [_random_ids(2 + number % sizes.prompt, model.config.vocab_size, number) for number in range(sizes.rows)]
    sampling = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=sizes.new_tokens, seed=0)
    recorder = Recorder()
    recorded, plain = (
        LlamaEngine(adapted, (), capture=capture, is_merged=not is_nf4) for capture in (recorder, run_plainly)
    )
    answers = [_completions(engine, prompts, sampling) for engine in (recorded, plain)]
    same, gap = agreement(*answers)
    yield Figure(f"{name}: steps recorded", recorder.count, least=1)
    yield Figure(f"{name}: answers of recorded steps that are those of plain ones", same, least=LEAST_SAME)
    yield Figure(f"{name}: largest gap of their log-probabilities", gap, "nats", most=MOST_LOGPROB_GAP)
    forward = max(_forward_gap(adapted, *pair) for pair in list(zip(prompts, answers[0], strict=True))[:8])
    yield Figure(f"{name}: mean gap to the forward pass", forward, "nats/token", most=MOST_LOGPROB_GAP)

    seconds = _seconds(lambda: _completions(recorded, prompts, sampling))
    yield Figure(f"{name}: {sizes.rows} rows", sizes.rows * sizes.new_tokens / seconds, "tokens/s")
    if bandwidth is not None:
        weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
        embeddings: Any = model.get_input_embeddings().weight
        read = weights - embeddings.numel() * embeddings.element_size()
        share = sizes.new_tokens * read / seconds / bandwidth
        yield Figure(f"{name}: share of the bandwidth that reads the weights once a step", share)


def _completions(engine: LlamaEngine, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
    return [group[0] for group in engine.generate(prompts, samples_per_prompt=1, sampling=sampling)]


def agreement(answers: Sequence[Completion], others: Sequence[Completion]) -> tuple[float, float]:
    """Share of identical answers, and the maximum gap of log-probabilities before the first difference."""
    same, gap = 0, 0.0
    for one, other in zip(answers, others, strict=True):
        same += one.token_ids == other.token_ids
        for token, its, here, there in zip(one.token_ids, other.token_ids, one.logprobs, other.logprobs, strict=False):
            if token != its:
                break
            gap = max(gap, abs(here - there))
    return same / len(answers), gap


@torch.no_grad()
def _forward_gap(model: nn.Module, prompt: Sequence[int], answer: Completion) -> float:
    """Mean gap between the answer's log-probabilities and those of one forward pass."""
    ids_1T = torch.tensor([[*prompt, *answer.token_ids]], device=next(model.parameters()).device)
    logits_1TV = model(input_ids=ids_1T[:, :-1], use_cache=False).logits.float()
    scores_1T1 = logits_1TV.log_softmax(dim=2).gather(2, ids_1T[:, 1:, None])
    return float((scores_1T1.flatten()[len(prompt) - 1 :].cpu() - torch.tensor(answer.logprobs)).abs().mean())


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
