"""The order of the K samples of a prompt, best first (rejection sampling, Llama 2 section 3.2.3).

Shapes: N prompts, K samples of each, B = N * K answers, the samples of a prompt side by side.
"""

from torch import Tensor

from llamachat.scoring.scores import Combined


def ranking(combined: Combined, *, samples_per_prompt: int) -> Tensor:
    """Indices of each prompt's samples, best first, [N, K]; of equal ones the earlier is first.

    Differs from the paper: it is silent on how the gate ranks samples of one prompt. Its two models' scales differ, so by
    the gated score alone an unsafe answer (with the safety model's score) could beat a safe one (with the helpfulness
    model's). So what is under the threshold ranks below all others, and within each of the two groups the combined
    score decides, which for one prompt then comes from one model.
    """
    assert len(combined.scores_B) % samples_per_prompt == 0, "K samples of every prompt"
    scores_NK = combined.scores_B.view(-1, samples_per_prompt)
    is_unsafe_NK = combined.is_unsafe_B.view(-1, samples_per_prompt)
    # Two stable sorts, the more important key last.
    by_score_NK = scores_NK.sort(dim=1, descending=True, stable=True).indices
    by_group_NK = is_unsafe_NK.gather(1, by_score_NK).int().sort(dim=1, stable=True).indices
    return by_score_NK.gather(1, by_group_NK)
