"""The loss of supervised fine-tuning: cross-entropy on answer tokens and their EOS, zero elsewhere (Llama 2 section 3.1).

Shapes: 1 or B rows, T positions, N tokens in the loss, D hidden, V vocabulary.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llamachat.data.packing import IGNORED
from llamachat.maths import tokens_per_chunk
from llamachat.models.final_states import final_states

# PyTorch caches a CPU kernel for every shape: with arbitrary lengths, memory grew from 0.5 to 1.5 GiB in 200 rows.
# Lengths are padded to a multiple, which is also faster.
SHAPE_MULTIPLE = 64


def answer_token_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Negative log-likelihoods, in nats, of the tokens whose label counts, [N] in fp32.

    The output head only runs on those positions. `model` is a transformers causal language model, with or without a
    LoRA adapter; `batch` comes from the collator of `llamachat.data.packing`.
    """
    llama: Any = model  # methods of transformers and PEFT are reached through nn.Module.__getattr__
    labels_T = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()
    places_N = (labels_T != IGNORED).nonzero().squeeze(1)
    hidden_ND = final_states(
        llama.get_decoder(),
        places_N,
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=batch.get("attention_mask"),
    )
    labels_N = labels_T[places_N]
    count = len(labels_N)
    missing = -count % SHAPE_MULTIPLE
    hidden_ND = nn.functional.pad(hidden_ND, (0, 0, 0, missing))
    labels_N = nn.functional.pad(labels_N, (0, missing), value=IGNORED)
    head = llama.get_output_embeddings()
    chunk = tokens_per_chunk(on_cpu=hidden_ND.device.type == "cpu")
    chunks = zip(hidden_ND.split(chunk), labels_N.split(chunk), strict=True)
    losses = [nn.functional.cross_entropy(head(h).float(), y, reduction="none") for h, y in chunks]
    return torch.cat(losses)[:count]
