"""The losses of a reward model: binary ranking with a margin, safety classification, centring (Llama 2 section 3.2.2).

Shapes: B pairs, N responses or tokens, V vocabulary, D hidden. Scores are 1-D, since `[B, 1]` minus `[B]` would
silently broadcast to `[B, B]`.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from llamachat.data.records import Rating
from llamachat.maths.logprobs import token_logprobs

# Llama 2 Table 27: margins between scores, by how much better the annotator rated the chosen answer.
MARGINS: Mapping[Literal["none", "small", "large"], Mapping[Rating, float]] = {
    "none": {"significantly_better": 0.0, "better": 0.0, "slightly_better": 0.0, "negligibly_better": 0.0},
    "small": {"significantly_better": 1.0, "better": 2 / 3, "slightly_better": 1 / 3, "negligibly_better": 0.0},
    "large": {"significantly_better": 3.0, "better": 2.0, "slightly_better": 1.0, "negligibly_better": 0.0},
}


def ranking_losses(chosen_B: Tensor, rejected_B: Tensor, *, margin_B: Tensor) -> Tensor:
    """-log sigmoid(chosen - rejected - margin), [B] in nats (Llama 2 Eq. 2)."""
    assert chosen_B.dim() == 1 and chosen_B.shape == rejected_B.shape == margin_B.shape
    return -nn.functional.logsigmoid(chosen_B - rejected_B - margin_B)


def safety_auxiliary_losses(scores_N: Tensor, *, is_safe_N: Tensor) -> Tensor:
    """Binary cross-entropy of sigmoid(score) against the safety label (1 for safe), [N] in nats (section 3.2.2)."""
    assert scores_N.dim() == 1 and scores_N.shape == is_safe_N.shape
    return nn.functional.binary_cross_entropy_with_logits(scores_N, is_safe_N, reduction="none")


def language_losses(hidden_ND: Tensor, token_ids_N: Tensor, *, head_VD: Tensor) -> Tensor:
    """-log p of the tokens that follow these hidden states, [N] in nats (Yang et al. 2024, arXiv:2406.10216)."""
    weight_VD = head_VD.to(hidden_ND.dtype)
    return -token_logprobs(hidden_ND, token_ids_N, head=lambda hidden: nn.functional.linear(hidden, weight_VD)).logprobs


def centring_losses(chosen_B: Tensor, rejected_B: Tensor) -> Tensor:
    """(chosen + rejected)^2, [B]: centres a pair's scores on 0 (Eisenstein et al. 2023, arXiv:2312.09244, Eq. 2)."""
    assert chosen_B.dim() == 1 and chosen_B.shape == rejected_B.shape
    return (chosen_B + rejected_B) ** 2
