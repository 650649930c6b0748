"""Training rows on the device: attention within the sequences of a packed row, and the memory of an optimizer's step."""

from pathlib import Path
from typing import Any

from tests.cuda_standin.device import Device
from tests.cuda_standin.process import on_standin

MIB = 2**20


def test_packed_rows_attend_within_their_sequences_and_have_no_mask(tmp_path: Path) -> None:
    result = on_standin(_attended, tmp_path)
    assert result["attention"] == {"auto": "varlen", "sdpa": "sdpa"}
    assert result["packed"] < 0.05  # bf16 logits of about 5
    assert result["gradient"] < 0.02
    assert result["padded"] < 0.05
    assert result["sampled"] == result["sampled on a CPU"]
    # A mask of 2048 x 2048 takes 8 MiB in bf16, and each layer keeps its own.
    assert result["grown"]["auto"] < result["grown"]["sdpa"] - 2 * 8 * MIB


def _attended(device: Device, folder: str) -> dict[str, Any]:
    import torch

    from llamachat.data.packing import collate_packed
    from llamachat.models.loading import load_base
    from tests.llamachat.data.test_packing import example
    from tests.tiny_llama import base_section, tiny_llama

    tiny_llama(max_position_embeddings=2048, initializer_range=0.1).bfloat16().save_pretrained(folder)

    def load(attention: str = "auto", place: str = "cuda") -> Any:
        return load_base(base_section(folder, dtype="bfloat16", attention=attention), device=place)

    models = {"auto": load(), "sdpa": load("sdpa")}
    plain = load("eager", "cpu")
    examples = [example(10, 9), example(50, 3), example(90, 6)]
    batch = collate_packed(examples)
    del batch["labels"]
    logits = {}
    gradients = {}
    for name, model in (("auto", models["auto"]), ("plain", plain)):
        inputs = {key: tensor.to(model.device) for key, tensor in batch.items()}
        output = model(**inputs, use_cache=False).logits
        output.float().pow(2).mean().backward()
        logits[name] = output.detach().float().cpu()
        gradients[name] = model.model.layers[0].self_attn.k_proj.weight.grad.float().cpu()
    padded = torch.tensor([[1, 40, 41, 42, 43], [1, 50, 51, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        rows = [
            model(padded.to(model.device), attention_mask=mask.to(model.device)).logits[1, :3].float().cpu()
            for model in (models["auto"], plain)
        ]
    prompt = torch.tensor([[1, 40, 41, 42]])
    sampled = [
        model.generate(prompt.to(model.device), do_sample=False, max_new_tokens=6, use_cache=True).tolist()
        for model in (models["auto"], plain)
    ]
    grown = {}
    row = {
        "input_ids": torch.ones((1, 2048), dtype=torch.long, device="cuda"),
        "position_ids": torch.arange(128, device="cuda").repeat(16).unsqueeze(0),
    }
    for name, model in models.items():
        device.reset_peaks()
        allocated_before = device.allocated
        model(**row, use_cache=False, logits_to_keep=1).logits.sum().backward()
        model.zero_grad()
        grown[name] = device.peak_allocated - allocated_before
    return {
        "attention": {name: model.config._attn_implementation for name, model in models.items()},
        "packed": (logits["auto"] - logits["plain"]).abs().max().item(),
        "gradient": ((gradients["auto"] - gradients["plain"]).norm() / gradients["plain"].norm()).item(),
        "padded": (rows[0] - rows[1]).abs().max().item(),
        "sampled": sampled[0],
        "sampled on a CPU": sampled[1],
        "grown": grown,
    }


def test_a_step_of_adamw_holds_few_gradients_in_fp32() -> None:
    # 8 weights of 2 MiB in bf16; a part is two of them, whose gradients and square roots are 8 MiB each.
    assert 8 * MIB <= on_standin(_stepped) <= 2 * 8 * MIB


def _stepped(device: Device) -> int:
    import torch

    from llamachat.training import master_weights

    master_weights.STEPPED_AT_ONCE = 2 * MIB  # type: ignore[misc]
    params = [torch.nn.Parameter(torch.ones(1024, 1024, dtype=torch.bfloat16, device="cuda")) for _ in range(8)]
    optimizer = master_weights.adamw(params, learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8)
    allocated_before = 0
    for _ in range(2):  # the first step makes the moments
        for param in params:
            param.grad = torch.ones_like(param)
        device.reset_peaks()
        allocated_before = device.allocated
        optimizer.step()
    return device.peak_allocated - allocated_before
