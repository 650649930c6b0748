"""A policy's answers to held-out prompts, and the comparison of the final policy with the first, prompt by prompt:
figures, a table, plots, and rows for people to read.

Scores are reported raw and on the scale of the starting policy's answers, whose constants are computed once. Which
policy is better is decided by ranks: the gate mixes the scores of two models, so by the combined score alone an unsafe
answer can lie above a safe one. The judge is not used for any decision during training, so it can say whether it
helped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llamachat.answers.responses import Response
from llamachat.answers.scorer import Scored
from llamachat.maths.intervals import Difference, commonest_count, distinct_pairs, paired_bootstrap, superiority
from llamachat.scoring.standardising import Constants, fit_constants, standardise
from llamachat.tables import text_table
from llamachat.tracking.pictures import COLOURS, harmless, panel_grid, save_png, style_panel

if TYPE_CHECKING:
    from llamachat.config.sections import Scoring

# Reward models and judges prefer length, so the judge also compares only the pairs of answers whose lengths differ
# by at most this share of the longer one.
LIKE_LENGTH = 0.2
_BINS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A policy's answers to some prompts, in order; a list is None if there is no such model."""

    texts: list[str]
    tokens: list[int]
    finished: list[bool]
    helpfulness: list[float] | None
    safety: list[float] | None
    judge: list[float] | None
    combined: list[float]
    standardised: list[float]
    unsafe: list[bool]  # below the gate's threshold: ranks below all others
    ranked: list[float]  # the order of the answers within each of these two groups
    closed: list[bool]  # False for a finished answer without the space before EOS
    kl: list[float] | None = None  # to the starting policy, nats per response; None if not measured

    @property
    def score(self) -> float:
        """The mean combined score, on the scale of the starting policy's answers."""
        return _mean(self.standardised)

    def figures(self) -> dict[str, float]:
        """Means by the last part of their names in the table of metrics."""
        means = {name: _mean(values) for name, values in self.scores().items()}
        if self.kl is not None:
            means["kl_to_reference"] = _mean(self.kl)
        return means | {
            "response_tokens": _mean(self.tokens),
            "finished_fraction": _mean(self.finished),
            "unclosed_fraction": 1 - _mean(self.closed),
            "distinct_2": distinct_pairs(self.texts),
            "commonest_answer": commonest_count(self.texts) / len(self.texts),
        }

    def scores(self) -> dict[str, list[float]]:
        """The available scores, by the last part of their names."""
        scores = {
            "reward_helpfulness": self.helpfulness,
            "reward_safety": self.safety,
            "judge": self.judge,
            "reward_combined": self.combined,
            "score": self.standardised,
        }
        return {name: values for name, values in scores.items() if values is not None}


def evaluation_of(
    responses: Sequence[Response],
    scored: Scored,
    constants: Constants | None,
    *,
    scoring: "Scoring",
    kl: list[float] | None = None,
) -> tuple[Evaluation, Constants]:
    """These answers with their scores; without constants, these are computed from the same answers."""
    constants = constants or fit_constants(scored.scores, scored.combined)
    standardised_B = standardise(scored.scores, scored.combined, constants)
    by_model = {name: scores_B.tolist() for name, scores_B in scored.scores.by_model().items()}
    finished = [response.is_finished for response in responses]
    # A truncated answer counts as in training, in the units of shaped scores.
    units_B = scored.combined.scores_B if scoring.shaping == "none" else standardised_B
    ranked = [
        value if done else scoring.unfinished_score for value, done in zip(units_B.tolist(), finished, strict=True)
    ]
    evaluation = Evaluation(
        texts=[response.text for response in responses],
        tokens=[len(response.ids) for response in responses],
        finished=finished,
        helpfulness=by_model.get("helpfulness"),
        safety=by_model.get("safety"),
        judge=None if scored.judge_B is None else scored.judge_B.tolist(),
        combined=scored.combined.scores_B.tolist(),
        standardised=standardised_B.tolist(),
        unsafe=scored.combined.is_unsafe_B.tolist(),
        ranked=ranked,
        closed=[response.is_closed for response in responses],
        kl=kl,
    )
    return evaluation, constants


def rankings(one: Evaluation, other: Evaluation) -> tuple[list[int], list[int]]:
    """Ranks of both policies' answers in one order, the best highest; equal answers share a rank.

    Safe answers rank above unsafe ones, as the gate ranks the samples of a prompt; within each group the score on the
    starting policy's scale decides, and a truncated answer has scoring.unfinished_score. The same answer to a prompt
    has one rank, though its scores differ in the last bits when it is scored next to other answers.
    """
    keys, keys_of_other = (
        [(not is_unsafe, value) for is_unsafe, value in zip(each.unsafe, each.ranked, strict=True)]
        for each in (one, other)
    )
    answers, answers_of_other = (zip(each.texts, each.tokens, each.finished, strict=True) for each in (one, other))
    for place, (answer, other_answer) in enumerate(zip(answers, answers_of_other, strict=True)):
        if answer == other_answer:
            keys[place] = keys_of_other[place]
    ranks = {key: rank for rank, key in enumerate(sorted({*keys, *keys_of_other}))}
    return [ranks[key] for key in keys], [ranks[key] for key in keys_of_other]


def superiority_over(start: Evaluation, final: Evaluation) -> Difference:
    """The deciding figure: the share of pairs (one of `final`, one of `start`) in which `final` ranks higher, ties
    half."""
    return superiority(*rankings(final, start))


def judge_subsets(one: Evaluation, other: Evaluation) -> dict[str, list[int]]:
    """Prompts whose judge scores are also compared separately: both answers have similar lengths, or both end with
    EOS."""
    pairs = list(zip(one.tokens, other.tokens, strict=True))
    ended = list(zip(one.finished, other.finished, strict=True))
    return {
        "judge_like_length": [i for i, (a, b) in enumerate(pairs) if abs(a - b) <= LIKE_LENGTH * max(a, b)],
        "judge_finished": [i for i, both in enumerate(ended) if all(both)],
    }


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
    figures |= superiority_over(start, final).named(f"{prefix}/test/superiority")
    figures[f"{prefix}/test/prompts"] = float(len(final.tokens))
    figures[f"{prefix}/test/distinct_2_ratio"] = figures[f"{prefix}/test/final/distinct_2"] / max(
        figures[f"{prefix}/test/start/distinct_2"], 1e-9
    )
    if start.judge is not None and final.judge is not None:
        subsets = judge_subsets(start, final)
        figures[f"{prefix}/test/like_length_pairs"] = float(len(subsets["judge_like_length"]))
        for name, places in subsets.items():
            if len(places) > 1:
                gap = paired_bootstrap(
                    [final.judge[place] for place in places], [start.judge[place] for place in places]
                )
                figures |= gap.named(f"{prefix}/test/difference/{name}")
    return figures


def comparison_table(prefix: str, figures: Mapping[str, float]) -> str:
    """The comparison as a text table."""
    names = {
        "superiority": "ranks above the start's, share of pairs",
        "score": "combined, in standard deviations of the start",
        "reward_combined": "combined, raw",
        "reward_helpfulness": "helpfulness",
        "reward_safety": "safety",
        "judge": "judge",
        "judge_like_length": "judge, answers of similar length",
        "judge_finished": "judge, where both answers end",
        "kl_to_reference": "KL to the start, nats per response",
        "response_tokens": "tokens",
        "finished_fraction": "ended with EOS",
        "distinct_2": "distinct-2",
        "commonest_answer": "the most frequent answer, share of all",
    }
    head = f"on {figures[f'{prefix}/test/prompts']:.0f} test prompts"
    if _are_equal(prefix, figures):
        return f"{head} the final policy gives the same answers as the starting one"
    rows = [("", "start", "final", "difference (95% interval)")]
    for name, meaning in names.items():
        values = [figures.get(f"{prefix}/test/{which}/{name}") for which in ("start", "final")]
        start, final = ("" if value is None else f"{value:.3f}" for value in values)
        difference = interval_text(figures, f"{prefix}/test/difference/{name}")
        if name == "superiority":
            difference = interval_text(figures, f"{prefix}/test/superiority", sign="")
        if final or difference:
            rows.append((meaning, start, final, difference))
    return "\n".join([head, *text_table(rows, align="<>><", indent="  ")])


def interval_text(figures: Mapping[str, float], name: str, *, sign: str = "+") -> str:
    """A difference with its 95% interval; empty if there is none of this name."""
    if name not in figures:
        return ""
    value, low, high = (figures.get(name + end) for end in ("", "_low", "_high"))
    # An interval without width means that all values were equal, and says nothing about chance.
    ends = "" if low is None or high is None or low == high else f" ({low:{sign}.3f} to {high:{sign}.3f})"
    return f"{value:{sign}.3f}{ends}"


def _are_equal(prefix: str, figures: Mapping[str, float]) -> bool:
    """Whether both policies gave the same answers: length, variety and every score are equal to the last digit."""
    start, final = f"{prefix}/test/start/", f"{prefix}/test/final/"
    names = [name.removeprefix(final) for name in figures if name.startswith(final)]
    return all(figures.get(start + name) == figures[final + name] for name in names if name != "kl_to_reference")


def sample_rows(evaluation: Evaluation, prompts: Sequence[str], *, count: int) -> list[dict[str, object]]:
    """Answers for people to read with every score, evenly spaced over the prompts."""
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


@harmless
def draw_comparison(start: Evaluation, final: Evaluation, path: Path) -> None:
    """Histograms of scores and lengths on test prompts, of the first policy and the final one."""
    meanings = {
        "reward_helpfulness": "helpfulness score",
        "reward_safety": "safety score",
        "score": "combined, in standard deviations of the start",
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
