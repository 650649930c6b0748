"""The policy on held-out prompts, always the same with the same seeds; and the final policy against the first.

Scores are told raw and, for what decides, on the scale of the starting policy's answers (mean 0, deviation 1), whose
constants are taken once. The judge decides nothing: what training has looked at cannot tell whether training was fair.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from llamachat.kl import response_kl
from llamachat.rollout.engine import LocalEngine, Sampling
from llamachat.scoring.standardising import Constants, fit_constants, standardise
from llamachat.statistics import distinct_pairs, paired_bootstrap
from ppo.batches import packed_rows
from ppo.experience import measure
from ppo.prompts import Question
from ppo.rollouts import sample
from ppo.scoring_step import Scorer

if TYPE_CHECKING:
    from llamachat.models.role_bank import RoleBank

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
    kl: list[float]  # to the starting policy, nats a response

    @property
    def score(self) -> float:
        """What decides: the mean combined score, in deviations of the starting policy's answers above its mean."""
        return _mean(self.standardised)

    @property
    def mean_kl(self) -> float:
        return _mean(self.kl)

    def figures(self) -> dict[str, float]:
        """Means by the last part of their names in the table of metrics."""
        found: dict[str, float] = {}
        for name, values in self.scores().items():
            found[name] = _mean(values)
        return found | {
            "kl_to_reference": self.mean_kl,
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


@dataclass(frozen=True, slots=True)
class Evaluator:
    """Whatever an evaluation needs beside the prompts."""

    bank: "RoleBank"
    engine: LocalEngine
    scorer: Scorer
    sampling: Sampling
    row_tokens: int

    def evaluate(self, questions: Sequence[Question], constants: Constants | None) -> tuple[Evaluation, Constants]:
        """The policy's answers to these prompts; without constants they are taken from these very answers."""
        responses = sample(self.engine, self.bank.chat_format, questions, self.sampling)
        scored = self.scorer.score(responses, with_judge=True)
        sequences = [response.sequence for response in responses]
        rows = packed_rows(sequences, range(len(sequences)), row_tokens=self.row_tokens, device=self.bank.device)
        measured = measure(self.bank, sequences, rows, temperature=self.sampling.temperature, with_values=False)
        kl_B = response_kl(measured.token_kl(), response_mask_BR=measured.response_mask_BR)
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
            kl=kl_B.tolist(),
        )
        return evaluation, constants


def heldout_figures(evaluation: Evaluation) -> dict[str, float]:
    """Figures on validation prompts under names of the table."""
    return {f"ppo/heldout/{name}": value for name, value in evaluation.figures().items()}


def test_figures(start: Evaluation, final: Evaluation) -> dict[str, float]:
    """Both policies on test prompts, and their differences with 95% intervals, prompt by prompt."""
    found: dict[str, float] = {}
    for which, evaluation in (("start", start), ("final", final)):
        found |= {f"ppo/test/{which}/{name}": value for name, value in evaluation.figures().items()}
    before = start.scores()
    for name, values in final.scores().items():
        found |= _difference(name, values, before[name])
    found["ppo/test/prompts"] = float(len(final.tokens))
    found["ppo/test/distinct_2_ratio"] = found["ppo/test/final/distinct_2"] / max(
        found["ppo/test/start/distinct_2"], 1e-9
    )
    if start.judge is not None and final.judge is not None:
        alike = [
            index
            for index, (one, other) in enumerate(zip(start.tokens, final.tokens, strict=True))
            if abs(one - other) <= LIKE_LENGTH * max(one, other)
        ]
        found["ppo/test/like_length_pairs"] = float(len(alike))
        if len(alike) > 1:
            found |= _difference(
                "judge_like_length", [final.judge[index] for index in alike], [start.judge[index] for index in alike]
            )
    return found


def test_table(figures: Mapping[str, float]) -> str:
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
        f"on {figures['ppo/test/prompts']:.0f} test prompts",
        f"  {'':<38} {'start':>9} {'final':>9}  difference (95% interval)",
    ]
    for name, meaning in names:
        start, final = (figures.get(f"ppo/test/{which}/{name}", math.nan) for which in ("start", "final"))
        line = f"  {meaning:<38} {_number(start)} {_number(final)}"
        gap = figures.get(f"ppo/test/difference/{name}")
        if gap is not None:
            low, high = (figures[f"ppo/test/difference/{name}_{bound}"] for bound in ("low", "high"))
            line += f"  {gap:+.3f} ({low:+.3f} to {high:+.3f})"
        if gap is not None or not math.isnan(final):
            lines.append(line)
    return "\n".join(lines)


def _difference(name: str, final: Sequence[float], start: Sequence[float]) -> dict[str, float]:
    gap = paired_bootstrap(final, start)
    place = f"ppo/test/difference/{name}"
    return {place: gap.value, f"{place}_low": gap.low, f"{place}_high": gap.high}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float) -> str:
    return f"{'':>9}" if math.isnan(value) else f"{value:>9.3f}"
