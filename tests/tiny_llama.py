"""Random Llama models at toy size, and policies published from them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.tokenizer import write_tokenizer
from llamachat.config.sections import Base, Tuning
from llamachat.models.loading import policy_details, save_policy
from llamachat.runs.artifacts import Artifact, Manifest, StepFolder, publish

LORA = Tuning(method="lora", rank=4, alpha=8)


def tiny_llama(*, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    """Two layers with grouped heads; weights large enough that tokens differ in probability."""
    shape: dict[str, Any] = {
        "vocab_size": 420,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        # Not `.to(dtype)`: that would round the rotary frequencies too, which no loaded model has.
        return LlamaForCausalLM._from_config(LlamaConfig(**(shape | changes)), dtype=dtype).eval()


def scripted_llama(*chains: Sequence[int], **changes: Any) -> LlamaForCausalLM:
    """After the first id of a chain comes its second, and so on, whatever stood before; each id once in all chains.

    Embeddings are one-hot, the layers add nothing, and the head holds the table: other ids have e^-21 of the weight.
    """
    model = tiny_llama(hidden_size=448, num_hidden_layers=1, **changes)
    with torch.no_grad():
        for weight in (
            model.lm_head.weight,
            *(model.get_parameter(f"model.layers.0.{name}.weight") for name in ("self_attn.o_proj", "mlp.down_proj")),
        ):
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(420, 448))
        for chain in chains:
            for before, after in pairwise(chain):
                model.lm_head.weight[after, before] = 1.0
    return model


def move_adapter(model: torch.nn.Module) -> None:
    """Give the adapter weights that matter, as training would: a new one adds nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)


def nf4_by_transformers(compute: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """The 4 bits of QLoRA, as a user of transformers asks for them."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def base_section(folder: Path | str, **changes: Any) -> Base:
    """The base section of a recipe on this folder."""
    return Base(**({"model": str(folder), "dtype": "float32", "max_tokens": 96} | changes))


def publish_policy(
    step: Path, model: Any, chat_format: ChatFormat, *, base: str, max_tokens: int = 96, system: str | None = None
) -> Artifact:
    """Publish the model as the step's policy, as a stage does it."""

    def write(folder: Path) -> None:
        save_policy(model, folder)
        write_tokenizer(chat_format.tokenizer, folder, chat_format.chat_template)

    details = policy_details(model, base=base, chat_format=chat_format.name, max_tokens=max_tokens, system=system)
    manifest = Manifest(kind="policy", step=step.name, fingerprint="0" * 64, identity={}, seed=0, details=details)
    return publish(StepFolder(step), manifest, write)
