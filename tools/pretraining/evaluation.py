"""Bits per byte of held-out text by source, which unlike the loss per token is comparable between tokenizers."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tools.pretraining.corpus import SOURCES
from tools.pretraining.model import token_losses

CHARACTERS_PER_SOURCE = 200_000  # enough for two digits, and minutes faster than all


@dataclass(frozen=True, slots=True)
class SourceBits:
    """Bits per byte of one source's held-out text, and the source's share of the training mix."""

    bits_per_byte: float
    tokens: int
    share: float


@torch.no_grad()
def bits_per_byte(model: nn.Module, run: Path, *, context: int) -> dict[str, SourceBits]:
    """Bits per byte by source, from `run/held_out.json`; documents are scored in windows of `context` tokens."""
    import sentencepiece

    encoder = sentencepiece.SentencePieceProcessor(model_file=str(run / "tokenizer.model"))  # type: ignore[call-arg]
    model.eval()
    shares = json.loads((run / "shares.json").read_text())
    report: dict[str, SourceBits] = {}
    for source, texts in json.loads((run / "held_out.json").read_text()).items():
        nats, size, tokens = 0.0, 0, 0
        for text in texts:
            if size > CHARACTERS_PER_SOURCE:
                break
            ids = [1, *encoder.encode(text)]  # type: ignore[attr-defined]
            nats += _nats(model, ids, context)
            size += len(text.encode())
            tokens += len(ids) - 1
        report[source] = SourceBits(nats / math.log(2) / size, tokens, shares[source])
    return report


def _nats(model: nn.Module, ids: list[int], context: int) -> float:
    """Total loss of `ids[1:]`; every window except the first includes the second half of the previous one."""
    total, seen = 0.0, 1
    while seen < len(ids):
        begin = max(0, seen - context // 2) if seen > 1 else 0
        window: Tensor = torch.tensor([ids[begin : begin + context]])
        losses_T = token_losses(model, window)[0]
        total += float(losses_T[seen - begin - 1 :].sum())
        seen = begin + window.shape[1]
    return total


def mix(report: dict[str, SourceBits]) -> float:
    """Mean over sources, weighted by their share of the training mix."""
    order = [source.name for source in SOURCES if source.name in report]
    weight = sum(report[name].share for name in order)
    return sum(report[name].bits_per_byte * report[name].share for name in order) / weight
