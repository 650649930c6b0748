"""A policy's answers to held-out prompts, and the final policy against the first, prompt by prompt.

Scores are told raw and, for what decides, on the scale of the starting policy's answers (mean 0, deviation 1), whose
constants are taken once. The judge decides nothing: what training has looked at cannot tell whether training was fair.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llamachat.answers.responses import Response
from llamachat.answers.scorer import Scored
from llamachat.maths.intervals import distinct_pairs, paired_bootstrap
from llamachat.scoring.standardising import Constants, fit_constants, standardise

# Pairs of answers whose lengths differ by this share of the longer one at most are told apart by the judge once more:
# reward models and judges like length.
LIKE_LENGTH = 0.2


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
        found: dict[str, float] = {}
        for name, values in self.scores().items():
            found[name] = _mean(values)
        if self.kl is not None:
            found["kl_to_reference"] = _mean(self.kl)
        return found | {
            "response_tokens": _mean(self.tokens),
            "finished_fraction": _mean(self.finished),
            "distinct_2": distinct_pairs(self.texts),
        }

    def scores(self) -> dict[str, list[float]]:
        """The scores there are, by the last part of their names."""
        found = {
            "reward_helpfulness": self.helpfulness,
            "reward_safety": self.safety,
            "judge": self.judge,
            "reward_combined": self.combined,
            "score": self.standardised,
        }
        return {name: values for name, values in found.items() if values is not None}

    def to_plain(self) -> dict[str, Any]:
        """As JSON values, for a checkpoint."""
        return asdict(self)

    @staticmethod
    def from_plain(values: Mapping[str, Any]) -> "Evaluation":
        return Evaluation(**values)


def evaluation_of(
    responses: Sequence[Response], scored: Scored, constants: Constants | None, *, kl: list[float] | None = None
) -> tuple[Evaluation, Constants]:
    """These answers with their scores; without constants they are taken from these very answers."""
    constants = constants or fit_constants(scored.scores, scored.combined)
    on_scale = standardise(scored.scores, scored.combined, constants)
    by_model = {name: scores_B.tolist() for name, scores_B in scored.scores.by_model().items()}
    evaluation = Evaluation(
        texts=[response.text for response in responses],
        tokens=[len(response.ids) for response in responses],
        finished=[response.is_finished for response in responses],
        helpfulness=by_model.get("helpfulness"),
        safety=by_model.get("safety"),
        judge=None if scored.judge_B is None else scored.judge_B.tolist(),
        combined=scored.combined.scores_B.tolist(),
        standardised=on_scale.combined_B.tolist(),
        kl=kl,
    )
    return evaluation, constants


def comparison(prefix: str, start: Evaluation, final: Evaluation) -> dict[str, float]:
    """Both policies on test prompts, and their differences with 95% intervals, prompt by prompt.

    `prefix` is that of the stage's metrics ('ppo'): the names begin with `<prefix>/test/`.
    """
    found: dict[str, float] = {}
    for which, evaluation in (("start", start), ("final", final)):
        found |= {f"{prefix}/test/{which}/{name}": value for name, value in evaluation.figures().items()}
    before = start.scores()
    for name, values in final.scores().items():
        found |= _difference(prefix, name, values, before[name])
    found[f"{prefix}/test/prompts"] = float(len(final.tokens))
    found[f"{prefix}/test/distinct_2_ratio"] = found[f"{prefix}/test/final/distinct_2"] / max(
        found[f"{prefix}/test/start/distinct_2"], 1e-9
    )
    if start.judge is not None and final.judge is not None:
        alike = [
            index
            for index, (one, other) in enumerate(zip(start.tokens, final.tokens, strict=True))
            if abs(one - other) <= LIKE_LENGTH * max(one, other)
        ]
        found[f"{prefix}/test/like_length_pairs"] = float(len(alike))
        if len(alike) > 1:
            found |= _difference(
                prefix,
                "judge_like_length",
                [final.judge[index] for index in alike],
                [start.judge[index] for index in alike],
            )
    return found


def comparison_table(prefix: str, figures: Mapping[str, float]) -> str:
    """The comparison for people."""
    names = [
        ("score", "combined, in deviations of the start"),
        ("reward_combined", "combined, raw"),
        ("reward_helpfulness", "helpfulness"),
        ("reward_safety", "safety"),
        ("judge", "judge"),
        ("judge_like_length", "judge, answers of like length"),
        ("kl_to_reference", "KL to the start, nats a response"),
        ("response_tokens", "tokens"),
        ("finished_fraction", "ended with EOS"),
        ("distinct_2", "distinct-2"),
    ]
    lines = [
        f"on {figures[f'{prefix}/test/prompts']:.0f} test prompts",
        f"  {'':<38} {'start':>9} {'final':>9}  difference (95% interval)",
    ]
    for name, meaning in names:
        start, final = (figures.get(f"{prefix}/test/{which}/{name}", math.nan) for which in ("start", "final"))
        line = f"  {meaning:<38} {_number(start)} {_number(final)}"
        gap = figures.get(f"{prefix}/test/difference/{name}")
        if gap is not None:
            low, high = (figures[f"{prefix}/test/difference/{name}_{bound}"] for bound in ("low", "high"))
            line += f"  {gap:+.3f} ({low:+.3f} to {high:+.3f})"
        if gap is not None or not math.isnan(final):
            lines.append(line)
    return "\n".join(lines)


def _difference(prefix: str, name: str, final: Sequence[float], start: Sequence[float]) -> dict[str, float]:
    gap = paired_bootstrap(final, start)
    place = f"{prefix}/test/difference/{name}"
    return {place: gap.value, f"{place}_low": gap.low, f"{place}_high": gap.high}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float) -> str:
    return f"{'':>9}" if math.isnan(value) else f"{value:>9.3f}"
