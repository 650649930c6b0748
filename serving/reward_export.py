"""Export a reward model as a folder that plain transformers loads: a merged model with its head, or a PEFT adapter.

Reads a reward-model artifact and, for an adapter, the weights of its base; writes the same files as `serving.export`.
The folder is reloaded as `AutoModelForSequenceClassification` and its scores of built-in answers are compared with the
artifact's. Merged weights are fp32 by default, since rounding them to 16 bits changes scores.
"""

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from llamachat.chat_format.dialog import DialogError, Message
from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.errors import ArtifactError
from llamachat.models import nf4
from llamachat.models.loading import dtype_of
from llamachat.models.reward_model import RewardModel, load_reward_model
from serving.export import (
    QUESTIONS,
    Request,
    load_plain,
    provenance_of,
    report_faults,
    write_notes,
    written_folder,
)
from serving.model_card import reward_card

log = logging.getLogger(__name__)

# Maximum score difference that rounding explains, relative to the largest score (at least 1). In fp32 only the order of
# sums differs; 16-bit weights have a relative error of up to 2^-9 (bf16) or 2^-12 (fp16) in every layer.
TOLERANCE = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.25}


@dataclass(frozen=True, slots=True)
class ScoreAgreement:
    """How closely the exported reward model matches the artifact."""

    max_score_difference: float
    largest_score: float
    answers: int


def export_reward_model(request: Request) -> ScoreAgreement:
    """Write the folder, compare its scores with the artifact's in fp32, and move it to its final path."""
    reward_model = load_reward_model(request.artifact.path, dtype="float32", device="auto")
    rows = _built_in_rows(reward_model)
    scores_N = reward_model.score_ids(rows)
    name = reward_model.name
    del reward_model  # free its memory for the shards and the exported model
    gc.collect()
    dtype = _dtype(request)
    with written_folder(request, dtype) as (side, base):
        exported_scores_N = _plain_scores(request, side, base, rows)
        # NaN counts as infinite, so that `max` does not hide it.
        difference = float((exported_scores_N - scores_N).abs().nan_to_num(nan=float("inf")).max())
        agreement = ScoreAgreement(difference, float(scores_N.abs().max()), len(rows))
        _judge(request, agreement, dtype)
        note = {"reward_model": name, **provenance_of(request, base, dtype), **asdict(agreement)}
        write_notes(request, side, base, note, reward_card, name=name)
    return agreement


def _built_in_rows(reward_model: RewardModel) -> list[tuple[int, ...]]:
    rows = []
    for question, answer in QUESTIONS:
        try:
            rows.append(reward_model.encode([Message("user", question), Message("assistant", answer)]))
        except DialogError:
            continue
    if not rows:
        raise ArtifactError(
            f"{reward_model.name}: none of the built-in answers fits into the {reward_model.max_tokens} tokens that it "
            "reads. An exported model is compared with it on them. Train with a larger base.max_tokens."
        )
    return rows


def _dtype(request: Request) -> torch.dtype:
    if request.dtype is not None:
        return dtype_of(request.dtype)
    if request.method != "full" or request.format == "adapter":
        return torch.float32
    return dtype_of(json.loads((request.artifact.path / "config.json").read_text(encoding="utf-8"))["dtype"])


@torch.no_grad()
def _plain_scores(request: Request, side: Path, base: Path, rows: Sequence[Sequence[int]]) -> Tensor:
    from transformers import AutoModelForSequenceClassification as Kind

    # If a base uses EOS as pad token, transformers would read the score one token too early.
    config = {"num_labels": 1, "pad_token_id": load_tokenizer(side).pad_id}
    model = load_plain(request, side, base, Kind, dtype=torch.float32, compute=torch.float32, **config)
    if request.format == "adapter" and request.method == "qlora":
        nf4.close_cpu_trap(model)
    return torch.cat([model(torch.tensor([row], device=model.device)).logits[0].float().cpu() for row in rows])


def _judge(request: Request, agreement: ScoreAgreement, dtype: torch.dtype) -> None:
    is_rounded = request.format == "merged" and (request.method != "full" or request.dtype is not None)
    limit = TOLERANCE[str(dtype).removeprefix("torch.") if is_rounded else "float32"]
    limit *= max(1.0, agreement.largest_score)
    difference = agreement.max_score_difference
    log.info(
        "scores of %d answers differ by at most %.6f (rounding explains %.4g)", agreement.answers, difference, limit
    )
    # On weights other than those of training, the difference is the user's choice and was logged above.
    if difference > limit and request.onto != "original":
        report_faults(request, [f"a score differs by {difference:.4g}, and {limit:.4g} is allowed"], difference)
