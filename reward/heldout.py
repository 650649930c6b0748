"""A reward model on pairs that it did not learn from: during training, and at the end on both domains' test pairs."""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from llamachat import distributed
from llamachat.data.records import first_user_turn
from llamachat.errors import DivergedError
from llamachat.models.scoring_head import score_rows
from llamachat.runs.folder import StepFolder
from llamachat.runs.inputs import Which
from llamachat.tracking.tracker import Tracker
from reward.baselines import fit_tfidf
from reward.evaluation import ScoredPair, ScoredResponse, evaluate
from reward.figures import draw_figures
from reward.loss import ranking_losses
from reward.pairs import Examples, PairExample

log = logging.getLogger(__name__)


def pair_scores(model: nn.Module, pairs: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and of the rejected answers, [B] each, fp32 on the CPU."""
    scores_N = _scores(model, [ids for pair in pairs for ids in (pair.chosen, pair.rejected)])
    return scores_N[0::2], scores_N[1::2]


def _scores(model: nn.Module, rows: Sequence[tuple[int, ...]]) -> Tensor:
    """`score_rows`, divided among the processes."""
    return torch.tensor(distributed.scatter_map(rows, lambda part: score_rows(model, part).tolist(), model=model))


def held_out_figures(model: nn.Module, pairs: Sequence[PairExample]) -> tuple[float, float]:
    """Ranking loss without margin, in nats a pair, and the share of pairs in the right order; a tie is half right."""
    chosen_B, rejected_B = pair_scores(model, pairs)
    losses_B = ranking_losses(chosen_B, rejected_B, margin_B=torch.zeros(len(pairs)))
    right_B = (chosen_B > rejected_B).double() + 0.5 * (chosen_B == rejected_B).double()
    return float(losses_B.double().mean()), float(right_B.mean())


def check_finite(loss: float, what: str) -> None:
    """A model whose loss is no number is neither saved nor published."""
    if not math.isfinite(loss):
        raise DivergedError(
            f"{what} is {loss}. Its weights cannot be mended by more steps, and its scores say nothing. Set a lower "
            "reward.learning_rate or a longer reward.warmup_fraction, and start the step again with `--overwrite`."
        )


def test_figures(
    model: nn.Module, which: Which, examples: Examples, *, folder: StepFolder, tracker: Tracker
) -> dict[str, float]:
    """Figures on the test pairs and labelled answers, beside baselines trained on the pairs of its own kind; draws the pictures."""
    if not examples.test:
        log.warning("rm/%s: no test pairs (data.split.test), so nothing says how good it is on unseen ones", which)
        return {}
    pairs, responses = score_tests(model, examples)
    # On the model's own kind of pairs: with the others of its mix the baseline would be the weaker for it.
    own = [example for example in examples.train if which in ("judge", example.domain)]
    baseline = fit_tfidf([example.preference for example in own])
    differences = baseline.differences([example.preference for example in examples.test]) if baseline else None
    found = evaluate(which, pairs, responses, tfidf_differences=differences)
    for picture in draw_figures(found, folder.figures):
        tracker.figure(picture.stem, picture)
    return found.figures


def score_tests(model: nn.Module, examples: Examples) -> tuple[list[ScoredPair], list[ScoredResponse]]:
    """The test pairs with their scores, and each labelled test answer once, those of labelled pairs included."""
    chosen_B, rejected_B = pair_scores(model, examples.test)
    pairs: list[ScoredPair] = []
    responses: dict[tuple[int, ...], ScoredResponse] = {}
    for example, chosen, rejected in zip(examples.test, chosen_B.tolist(), rejected_B.tolist(), strict=True):
        assert example.domain != "open", "open sets are learnt from, not tested with"
        preference = example.preference
        pairs.append(
            ScoredPair(
                domain=example.domain,
                source=example.source,
                prompt=first_user_turn(preference),
                chosen=chosen,
                rejected=rejected,
                chosen_tokens=example.chosen_tokens,
                rejected_tokens=example.rejected_tokens,
                rating=preference.rating,
                chosen_is_safe=preference.chosen_is_safe,
                rejected_is_safe=preference.rejected_is_safe,
            )
        )
        labels = (preference.chosen_is_safe, preference.rejected_is_safe)
        for ids, score, is_safe in zip((example.chosen, example.rejected), (chosen, rejected), labels, strict=True):
            if is_safe is not None:
                responses[ids] = ScoredResponse(score=score, is_safe=is_safe, source=example.source)
    scores_N = _scores(model, [label.ids for label in examples.test_labels]).tolist()
    for label, score in zip(examples.test_labels, scores_N, strict=True):
        responses[label.ids] = ScoredResponse(score=score, is_safe=label.is_safe, source=label.source)
    return pairs, list(responses.values())
