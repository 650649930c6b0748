"""Train the bundled base: texts -> tokenizer -> token stream -> model, resumable at any time.

Reads the folder of texts; writes `<run>/{tokenizer.model, stream.npy, shares.json, held_out.json, checkpoint.pt}`.
Checkpoints are written atomically, so a killed run resumes from the last complete one.
"""

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llamachat.training.master_weights import MasterWeightOptimizer, ParamGroups
from tools.pretraining.config import Config
from tools.pretraining.corpus import Document, read_documents, training_stream
from tools.pretraining.model import new_model, token_losses
from tools.pretraining.vocabulary import train_vocabulary

log = logging.getLogger(__name__)


def prepare(config: Config, texts: Path, run: Path) -> None:
    """Create the tokenizer, the token stream and the held-out documents if they do not exist."""
    run.mkdir(parents=True, exist_ok=True)
    if (run / "held_out.json").exists():
        return
    documents = list(read_documents(texts))
    trained = [document for document in documents if not document.is_held_out]
    stream = training_stream(trained, seed=config.seed)
    if not (run / "tokenizer.model").exists():
        train_vocabulary((document.text for document in stream[::3]), run, pieces=config.pieces)
    np.save(run / "stream.npy", _encode_stream(config, trained, run))
    sizes: dict[str, int] = {}
    for document in stream:
        sizes[document.source] = sizes.get(document.source, 0) + len(document.text)
    total = sum(sizes.values())
    (run / "shares.json").write_text(json.dumps({source: size / total for source, size in sizes.items()}, indent=1))
    held_out: dict[str, list[str]] = {}
    for document in documents:
        if document.is_held_out:
            held_out.setdefault(document.source, []).append(document.text)
    (run / "held_out.json").write_text(json.dumps(held_out))


def _encode_stream(config: Config, trained: list[Document], run: Path) -> np.ndarray:
    """Token ids of shuffled passes over the mix, at least `config.tokens` of them, as uint16 [tokens]."""
    import sentencepiece

    encoder = sentencepiece.SentencePieceProcessor(model_file=str(run / "tokenizer.model"))  # type: ignore[call-arg]
    texts = [document.text for document in trained]
    ids = {
        id(d): np.array(i, dtype=np.uint16) for d, i in zip(trained, encoder.encode(texts, num_threads=2), strict=True)
    }  # type: ignore[attr-defined]
    bos, eos, nothing = (np.array(a, dtype=np.uint16) for a in ([1], [2], []))
    parts: list[np.ndarray] = []
    total, lap = 0, 0
    while total < config.tokens + config.context * config.rows_per_step:
        for document in training_stream(trained, seed=config.seed + lap):
            parts += [bos, ids[id(document)], eos if document.is_end else nothing]
        total = sum(len(part) for part in parts)
        lap += 1
    log.info("one pass over the mix: %d tokens; number of passes: %d", total // lap, lap)
    return np.concatenate(parts)


def optimizer(model: torch.nn.Module, config: Config) -> MasterWeightOptimizer:
    """Muon for the blocks' matrices, AdamW for embeddings, head and norms, both with fp32 master copies."""
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]

    def build(groups: ParamGroups) -> list[torch.optim.Optimizer]:
        muon = torch.optim.Muon(
            groups[0]["params"],
            lr=config.matrix_learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        adamw = torch.optim.AdamW(groups[1]["params"], lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
        return [muon, adamw]

    return MasterWeightOptimizer([{"params": matrices}, {"params": others}], build)


def rate_factor(step: int, steps: int, config: Config) -> float:
    """Fraction of the peak learning rate at `step`: linear warm-up, constant, linear decay to 2%."""
    warmup = max(1, round(steps * config.warmup_fraction))
    decay = max(1, round(steps * config.decay_fraction))
    rising = min(1.0, (step + 1) / warmup)
    falling = min(1.0, 0.02 + 0.98 * (steps - step) / decay)
    return rising * falling


def _batch(stream: np.ndarray, step: int, config: Config) -> Tensor:
    """Rows of this step, each one token longer than the context: [rows_per_step, context + 1]."""
    size = config.rows_per_step * config.context
    part = stream[step * size : (step + 1) * size + 1].astype(np.int64)
    rows = [part[r * config.context : (r + 1) * config.context + 1] for r in range(config.rows_per_step)]
    return torch.from_numpy(np.stack(rows))


def _save(path: Path, state: dict[str, Any]) -> None:
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    beside.replace(path)


def train(config: Config, run: Path) -> Iterator[dict[str, float]]:
    """Train from the last checkpoint to the end and yield each step's figures; writes `run/checkpoint.pt`."""
    stream = np.load(run / "stream.npy", mmap_mode="r")
    steps = config.tokens // (config.rows_per_step * config.context)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = new_model(config).to(device)
    adjust = optimizer(model, config)
    peaks = [group["lr"] for group in adjust.param_groups]
    first = 0
    if (run / "checkpoint.pt").exists():
        state = torch.load(run / "checkpoint.pt", weights_only=True, map_location=device)
        model.load_state_dict(state["model"])
        adjust.load_state_dict(state["optimizer"])
        first = state["step"]
    saved = time.monotonic()
    for step in range(first, steps):
        started = time.monotonic()
        for group, peak in zip(adjust.param_groups, peaks, strict=True):
            group["lr"] = peak * rate_factor(step, steps, config)
        total = 0.0
        for rows_BT in _batch(stream, step, config).split(config.rows_per_microbatch):
            loss = token_losses(model, rows_BT.to(device)).sum() / (config.rows_per_step * config.context)
            loss.backward()
            total += loss.item()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        adjust.step()
        adjust.zero_grad()
        seconds = time.monotonic() - started
        speed = config.rows_per_step * config.context / seconds
        yield {"step": step + 1, "steps": steps, "loss": total, "grad_norm": norm, "tokens_per_s": speed}
        if time.monotonic() - saved > config.save_seconds or step + 1 == steps:
            _save(
                run / "checkpoint.pt", {"model": model.state_dict(), "optimizer": adjust.state_dict(), "step": step + 1}
            )
            saved = time.monotonic()
