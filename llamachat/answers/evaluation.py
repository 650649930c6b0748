"""A policy's answers to held-out prompts, and the final policy against the first, prompt by prompt: figures, a table,
pictures, and rows for people to read.

Scores are reported raw and, for decisions, on the scale of the starting policy's answers (mean 0, deviation 1), whose
constants are taken once. The judge decides nothing: a model that training optimised cannot say whether it helped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamachat.answers.responses import Response
from llamachat.answers.scorer import Scored
from llamachat.maths.intervals import distinct_pairs, paired_bootstrap
from llamachat.scoring.standardising import Constants, fit_constants, standardise
from llamachat.tables import text_table
from llamachat.tracking.pictures import COLOURS, panel_grid, save_png, style_panel

# Reward models and judges like length, so that the judge also compares those pairs of answers alone whose lengths differ
# by at most this share of the longer one.
LIKE_LENGTH = 0.2
_BINS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A policy's answers to some prompts, in their order; a list is None where there is no such model."""

    texts: list[str]
    tokens: list[int]
    finished: list[bool]
    helpfulness: list[float] | None
    safety: list[float] | None
    judge: list[float] | None
    combined: list[float]
    standardised: list[float]
    kl: list[float] | None = None  # to the starting policy, nats a response; None where nothing measured it

    @property
    def score(self) -> float:
        """What decides: the mean combined score, in deviations of the starting policy's answers above its mean."""
        return _mean(self.standardised)

    def figures(self) -> dict[str, float]:
        """Means by the last part of their names in the table of metrics."""
        means = {name: _mean(values) for name, values in self.scores().items()}
        if self.kl is not None:
            means["kl_to_reference"] = _mean(self.kl)
        return means | {
            "response_tokens": _mean(self.tokens),
            "finished_fraction": _mean(self.finished),
            "distinct_2": distinct_pairs(self.texts),
        }

    def scores(self) -> dict[str, list[float]]:
        """The scores there are, by the last part of their names."""
        scores = {
            "reward_helpfulness": self.helpfulness,
            "reward_safety": self.safety,
            "judge": self.judge,
            "reward_combined": self.combined,
            "score": self.standardised,
        }
        return {name: values for name, values in scores.items() if values is not None}


def evaluation_of(
    responses: Sequence[Response], scored: Scored, constants: Constants | None, *, kl: list[float] | None = None
) -> tuple[Evaluation, Constants]:
    """These answers with their scores; without constants they are taken from these very answers."""
    constants = constants or fit_constants(scored.scores, scored.combined)
    standardised_B = standardise(scored.scores, scored.combined, constants)
    by_model = {name: scores_B.tolist() for name, scores_B in scored.scores.by_model().items()}
    evaluation = Evaluation(
        texts=[response.text for response in responses],
        tokens=[len(response.ids) for response in responses],
        finished=[response.is_finished for response in responses],
        helpfulness=by_model.get("helpfulness"),
        safety=by_model.get("safety"),
        judge=None if scored.judge_B is None else scored.judge_B.tolist(),
        combined=scored.combined.scores_B.tolist(),
        standardised=standardised_B.tolist(),
        kl=kl,
    )
    return evaluation, constants


def like_length_pairs(one: Evaluation, other: Evaluation) -> list[int]:
    """The prompts to which both answers have similar lengths."""
    pairs = zip(one.tokens, other.tokens, strict=True)
    return [index for index, (a, b) in enumerate(pairs) if abs(a - b) <= LIKE_LENGTH * max(a, b)]


def comparison(prefix: str, start: Evaluation, final: Evaluation) -> dict[str, float]:
    """Both policies on test prompts, and their differences with 95% intervals, prompt by prompt.

    `prefix` is that of the stage's metrics ('ppo'): the names begin with `<prefix>/test/`.
    """
    figures: dict[str, float] = {}
    for which, evaluation in (("start", start), ("final", final)):
        figures |= {f"{prefix}/test/{which}/{name}": value for name, value in evaluation.figures().items()}
    before = start.scores()
    for name, values in final.scores().items():
        figures |= paired_bootstrap(values, before[name]).named(f"{prefix}/test/difference/{name}")
    figures[f"{prefix}/test/prompts"] = float(len(final.tokens))
    figures[f"{prefix}/test/distinct_2_ratio"] = figures[f"{prefix}/test/final/distinct_2"] / max(
        figures[f"{prefix}/test/start/distinct_2"], 1e-9
    )
    if start.judge is not None and final.judge is not None:
        alike = like_length_pairs(start, final)
        figures[f"{prefix}/test/like_length_pairs"] = float(len(alike))
        if len(alike) > 1:
            gap = paired_bootstrap([final.judge[index] for index in alike], [start.judge[index] for index in alike])
            figures |= gap.named(f"{prefix}/test/difference/judge_like_length")
    return figures


def comparison_table(prefix: str, figures: Mapping[str, float]) -> str:
    """The comparison for people."""
    names = {
        "score": "combined, in deviations of the start",
        "reward_combined": "combined, raw",
        "reward_helpfulness": "helpfulness",
        "reward_safety": "safety",
        "judge": "judge",
        "judge_like_length": "judge, answers of similar length",
        "kl_to_reference": "KL to the start, nats a response",
        "response_tokens": "tokens",
        "finished_fraction": "ended with EOS",
        "distinct_2": "distinct-2",
    }
    rows = [("", "start", "final", "difference (95% interval)")]
    for name, meaning in names.items():
        values = [figures.get(f"{prefix}/test/{which}/{name}") for which in ("start", "final")]
        start, final = ("" if value is None else f"{value:.3f}" for value in values)
        difference = interval_text(figures, f"{prefix}/test/difference/{name}")
        if final or difference:
            rows.append((meaning, start, final, difference))
    head = f"on {figures[f'{prefix}/test/prompts']:.0f} test prompts"
    return "\n".join([head, *text_table(rows, align="<>><", indent="  ")])


def interval_text(figures: Mapping[str, float], name: str) -> str:
    """A difference with its 95% interval; empty where there is none of this name."""
    if name not in figures:
        return ""
    return f"{figures[name]:+.3f} ({figures[f'{name}_low']:+.3f} to {figures[f'{name}_high']:+.3f})"


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


def draw_comparison(start: Evaluation, final: Evaluation, path: Path) -> None:
    """Histograms of scores and lengths on test prompts, of the first policy and the final one."""
    meanings = {
        "reward_helpfulness": "helpfulness score",
        "reward_safety": "safety score",
        "score": "combined, in deviations of the start",
        "judge": "judge's score",
    }
    before, after = start.scores(), final.scores()
    panels = [(meanings[name], before[name], after[name]) for name in meanings if name in after]
    panels.append(("tokens", [float(n) for n in start.tokens], [float(n) for n in final.tokens]))
    figure, places = panel_grid(len(panels), panel=(4.2, 3.2))
    for place, (meaning, old, new) in zip(places, panels, strict=True):
        low, high = min(*old, *new), max(*old, *new)
        bins = [low + (high - low) * step / _BINS for step in range(_BINS + 1)] if high > low else 1
        place.hist(old, bins=bins, alpha=0.55, color=COLOURS[-1], label=f"start, mean {_mean(old):.2f}")
        place.hist(new, bins=bins, alpha=0.55, color=COLOURS[0], label=f"final, mean {_mean(new):.2f}")
        style_panel(place, meaning, y="answers", has_grid=False, has_legend=True)
    save_png(figure, path)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
