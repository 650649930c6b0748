"""Figures of an iteration by their names in the table of metrics, and pictures of scores and lengths.

Shapes: B responses, R response positions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llamachat.kl import k3, response_kl
from llamachat.masked import masked_mean, masked_variance
from llamachat.tracking.curves import save_png
from ppo.evaluation import Evaluation
from ppo.experience import Experience, Measured
from ppo.rollouts import Response
from ppo.scoring_step import Scored

_BINS = 30
_MEANINGS = {
    "reward_helpfulness": "helpfulness score",
    "reward_safety": "safety score",
    "score": "combined, in deviations of the start",
    "judge": "judge's score",
}


def iteration_figures(
    responses: Sequence[Response], measured: Measured, scored: Scored, experience: Experience, *, kl_coef: float
) -> dict[str, float]:
    """What one iteration was like, before its update."""
    mask_BR = measured.response_mask_BR
    kl_B = response_kl(measured.token_kl(), response_mask_BR=mask_BR)
    k3_BR = k3(measured.logprobs_BR, measured.ref_logprobs_BR, response_mask_BR=mask_BR)
    found = {f"ppo/reward/{name}": float(scores_B.mean()) for name, scores_B in scored.scores.by_model().items()}
    if scored.combined.has_gate:
        found["ppo/reward/gate_fraction"] = float(scored.combined.is_gated_B.float().mean())
    return found | {
        "ppo/reward/combined": float(scored.combined.scores_B.mean()),
        "ppo/reward/shaped": float(experience.rewards_BR.sum(dim=1).mean()),
        "ppo/kl_to_reference": float(kl_B.mean()),
        "ppo/kl_k3": float(response_kl(k3_BR, response_mask_BR=mask_BR).mean()),
        "ppo/kl_coef": kl_coef,
        "ppo/entropy": float(masked_mean(measured.entropy_BR, mask_BR)),
        "ppo/explained_variance": explained_variance(experience),
        "ppo/response_tokens": float(mask_BR.sum(dim=1).float().mean()),
        "ppo/truncated_fraction": sum(not response.is_finished for response in responses) / len(responses),
        "ppo/engine_gap": engine_gap(responses, measured),
    }


def explained_variance(experience: Experience) -> float:
    """1 - Var(return - value) / Var(return) over the iteration's tokens; 0 where all returns are alike."""
    mask_BR = experience.response_mask_BR
    spread = float(masked_variance(experience.returns_BR, mask_BR))
    left = float(masked_variance(experience.returns_BR - experience.old_values_BR, mask_BR))
    return 1.0 - left / spread if spread > 0 else 0.0


def engine_gap(responses: Sequence[Response], measured: Measured) -> float:
    """Mean distance of the engine's log-probabilities from those that training takes, nats a token."""
    mask_BR = measured.response_mask_BR
    sampled_BR = torch.zeros(mask_BR.shape)
    for index, response in enumerate(responses):
        sampled_BR[index, : len(response.logprobs)] = torch.tensor(response.logprobs)
    return float(masked_mean((sampled_BR.to(mask_BR.device) - measured.logprobs_BR).abs(), mask_BR))


def sample_rows(evaluation: Evaluation, prompts: Sequence[str], *, count: int) -> list[dict[str, object]]:
    """Answers for people to read with every score, at even distances over the prompts."""
    stride = max(1, len(prompts) // count)
    scores = evaluation.scores()
    return [
        {
            "prompt": prompts[index],
            "answer": evaluation.texts[index],
            "tokens": evaluation.tokens[index],
            "finished": evaluation.finished[index],
            **{name: round(values[index], 4) for name, values in scores.items()},
        }
        for index in range(0, len(prompts), stride)[:count]
    ]


def histograms(evaluation: Evaluation) -> Mapping[str, Sequence[float]]:
    """Scores and lengths of held-out answers, by the names of their histograms."""
    return {**evaluation.scores(), "response_tokens": evaluation.tokens}


def draw_comparison(start: Evaluation, final: Evaluation, path: Path) -> None:
    """Histograms of scores and lengths on test prompts, of the first policy and the final one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    before, after = start.scores(), final.scores()
    panels = [(_MEANINGS[name], before[name], after[name]) for name in _MEANINGS if name in after]
    panels.append(("tokens", [float(n) for n in start.tokens], [float(n) for n in final.tokens]))
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False).flatten()
    for place, (meaning, old, new) in zip(axes, panels, strict=True):
        low, high = min(*old, *new), max(*old, *new)
        bins = [low + (high - low) * step / _BINS for step in range(_BINS + 1)] if high > low else 1
        place.hist(old, bins=bins, alpha=0.55, color="#5c5f66", label=f"start, mean {_mean(old):.2f}")
        place.hist(new, bins=bins, alpha=0.55, color="#1f5fa8", label=f"final, mean {_mean(new):.2f}")
        place.set_title(meaning, fontsize=10, loc="left")
        place.set_ylabel("answers", fontsize=8)
        place.tick_params(labelsize=8)
        place.spines[["top", "right"]].set_visible(False)
        place.legend(fontsize=7.5, frameon=False)
    save_png(figure, path)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
