"""A reward model as a folder that plain transformers loads: one merged model with its head, or the adapter for PEFT.

Reads a reward-model artifact and, for an adapter, the weights of its base; writes what `serving.export` writes of a
policy. The folder is loaded again as `AutoModelForSequenceClassification` and its scores of built-in answers are held
against the artifact's. Merged weights are fp32 unless another format is asked for, since rounding
them to 16 bits moves scores.
"""

import gc
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamachat.chat_format.dialog import DialogError, Message
from llamachat.errors import ArtifactError
from llamachat.models.loading import dtype_of
from llamachat.models.reward_model import RewardModel, load_reward_model
from llamachat.runs.artifacts import library_versions
from llamachat.runs.atomic import incoming_folder, write_json
from serving.export import (
    NOTE,
    QUESTIONS,
    ExportError,
    Request,
    base_folder,
    copy_tokenizer,
    nf4_config,
    provenance_of,
    write_adapter,
    write_merged,
)
from serving.model_card import Facts, reward_card

log = logging.getLogger(__name__)

# Largest difference of a score that rounding explains, relative to the largest score (1 at least). In fp32 only the
# order of sums differs; a 16-bit weight is off by up to 2^-9 (bf16) or 2^-12 (fp16) of its size, through all layers.
TOLERANCE = {"float32": 1e-4, "float16": 0.03, "bfloat16": 0.25}


@dataclass(frozen=True, slots=True)
class ScoreAgreement:
    """How far the exported reward model is from the artifact."""

    max_score_difference: float
    largest_score: float
    answers: int


def export_reward_model(request: Request) -> ScoreAgreement:
    """Write the folder, hold its scores against the artifact's in fp32, and give it its name."""
    reward_model = load_reward_model(request.artifact.path, dtype="float32", device="auto")
    rows = _built_in_rows(reward_model)
    scores_N = reward_model.score_ids(rows)
    name = reward_model.name
    del reward_model  # its memory is for the shards, and then for the exported model
    gc.collect()
    with incoming_folder(request.out) as side:
        base = base_folder(request)
        dtype = _dtype(request, base)
        log.info("writing %s", request.out)
        write = write_adapter if request.format == "adapter" else write_merged
        write(request, side, base, dtype)
        copy_tokenizer(request, side)
        log.info("loading it again with transformers alone")
        found_N = _plain_scores(request, side, base, rows)
        # As one that is not a number says nothing, so nothing is hidden by `max`.
        difference = float((found_N - scores_N).abs().nan_to_num(nan=float("inf")).max())
        agreement = ScoreAgreement(difference, float(scores_N.abs().max()), len(rows))
        _judge(request, agreement, dtype)
        _write_notes(request, side, base, dtype, agreement, name=name)
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
            "reads. An exported model is held against it on them. Train with a larger base.max_tokens."
        )
    return rows


def _dtype(request: Request, base: Path) -> torch.dtype:
    if request.dtype is not None:
        return dtype_of(request.dtype)
    if request.method != "full" or request.format == "adapter":
        return torch.float32
    return dtype_of(json.loads((base / "config.json").read_text(encoding="utf-8"))["dtype"])


@torch.no_grad()
def _plain_scores(request: Request, side: Path, base: Path, rows: Sequence[Sequence[int]]) -> Tensor:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    # More than one GPU holds goes in part to the CPU.
    arguments: dict[str, Any] = {"dtype": torch.float32}
    if torch.cuda.is_available():
        arguments["device_map"] = "auto"
    if request.format == "adapter":
        from peft import PeftModel

        from llamachat.models import nf4

        config = AutoConfig.from_pretrained(str(base), num_labels=1)
        config.rope_parameters = request.artifact.manifest.details["rope_parameters"]
        if request.method == "qlora":
            arguments["quantization_config"] = nf4_config(torch.float32)
        trunk = AutoModelForSequenceClassification.from_pretrained(str(base), config=config, **arguments)
        model: Any = PeftModel.from_pretrained(trunk, str(side))
        if request.method == "qlora":
            nf4.close_cpu_trap(model)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(str(side), **arguments)
    model.eval()
    return torch.cat([model(torch.tensor([row], device=model.device)).logits[0].float().cpu() for row in rows])


def _judge(request: Request, agreement: ScoreAgreement, dtype: torch.dtype) -> None:
    is_rounded = request.format == "merged" and (request.method != "full" or request.dtype is not None)
    limit = TOLERANCE[str(dtype).removeprefix("torch.") if is_rounded else "float32"]
    limit *= max(1.0, agreement.largest_score)
    difference = agreement.max_score_difference
    log.info(
        "scores of %d answers differ by at most %.6f (rounding explains %.4g)", agreement.answers, difference, limit
    )
    # On other weights than those of training the difference is the user's choice, and told.
    if difference <= limit or request.onto == "original":
        return
    wrong = f"a score differs by {difference:.4g}, and {limit:.4g} is allowed"
    if not request.may_differ or difference == float("inf"):
        raise ExportError(
            f"{request.out}: {wrong}. The exported reward model has to give the artifact's scores, up to the rounding "
            "of its weights; nothing was written. Look for a base that changed since training; where the difference is "
            "known and small, write it all the same with --allow-difference, or export with --dtype float32."
        )
    log.warning("%s", wrong)


def _write_notes(
    request: Request, side: Path, base: Path, dtype: torch.dtype, agreement: ScoreAgreement, *, name: str
) -> None:
    note: dict[str, Any] = {
        "reward_model": name,
        **provenance_of(request, base, dtype),
        **asdict(agreement),
        "versions": library_versions(),
    }
    write_json(side / NOTE, note)
    (side / "README.md").write_text(reward_card(Facts(request.artifact, name, base, note)), encoding="utf-8")
