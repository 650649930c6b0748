"""The shape of the bundled base: Llama 2's architecture (RMSNorm, SwiGLU, RoPE, grouped-query attention), small."""

from pathlib import Path

import torch
from torch import Tensor, nn

from tools.pretraining.config import Config


def new_model(config: Config) -> nn.Module:
    """A randomly initialised `LlamaForCausalLM` in bf16; the same seed gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(config.seed)
    shape = LlamaConfig(
        vocab_size=config.pieces,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.key_value_heads,
        max_position_embeddings=config.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM._from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa")


def token_losses(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """Next-token losses in nats, [B, T-1]."""
    logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none")
    return losses.view(ids_BT.shape[0], -1)


def save_model(model: nn.Module, folder: Path) -> None:
    """Write config.json and model.safetensors so that plain transformers loads them."""
    model.save_pretrained(folder)  # type: ignore[operator]  # a transformers method, via nn.Module.__getattr__
