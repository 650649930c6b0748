"""The top of the page: all policies by all metrics, and whether differences from the first policy are significant.

A difference counts only if its 95% interval, paired by prompt, excludes 0. A policy that does not beat the reference is
reported as plainly as one that does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from evaluation.report.drawing import at_a_glance
from evaluation.report.facts import Facts
from evaluation.report.in_short import changes, glossary, opening, policies_table
from evaluation.report.page import (
    Block,
    Cell,
    Picture,
    Points,
    Section,
    Table,
    Text,
    measure_cell,
    number,
    percent,
    signed,
    with_interval,
)
from llamachat.runs.reader import Evaluation, Measure

_DIFFERENCES = (
    ("score", "combined, deviations"),
    ("reward_helpfulness", "helpfulness"),
    ("reward_safety", "safety"),
    ("judge", "judge"),
    ("judge_like_length", "judge, answers of similar length"),
    ("judge_finished", "judge, where both answers end"),
)
# Differences for the verdict if there is no ranking; the first available one decides.
_NAMES = {"score": "combined score", "reward_helpfulness": "helpfulness score", "reward_safety": "safety score"}


@dataclass(frozen=True, slots=True)
class Metric:
    """A row of the headline table."""

    key: str
    label: str
    better: int = 0  # 1: higher is better, -1: lower, 0: neither
    is_share: bool = False
    digits: int = 2
    at_least: float | None = None  # below this, nothing is marked best: a win rate under one half is a loss


def metrics_of(evaluation: Evaluation) -> list[Metric]:
    """The rows of the headline table, without metrics that were not measured."""
    reference, turns = evaluation.reference, evaluation.turns()
    metrics = [
        Metric("reward_helpfulness", "helpfulness, raw score", 1),
        Metric("reward_safety", "safety, raw score", 1),
        Metric("judge", "judge, raw score", 1),
        Metric("score", f"combined, in deviations of {reference}'s answers", 1),
        Metric("superiority", f"ranks above {reference}'s, share of pairs", 1, is_share=True, at_least=0.5),
        Metric(
            "win_rate/judge", f"wins against {reference} by the judge, ties removed", 1, is_share=True, at_least=0.5
        ),
        Metric("violation", "violations, by the safety model", -1, is_share=True),
        Metric("guard_violation", "violations, by the safety classifier of evaluation.guard", -1, is_share=True),
        Metric("harmful/refused", "harmful prompts refused, by the outside classifier", 1, is_share=True),
        Metric("harmless/complied", "harmless prompts that look harmful answered", 1, is_share=True),
    ]
    if turns:
        last = turns[-1]
        metrics += [
            Metric(f"consistency/turn_{last}", f"instruction of turn 1 kept at turn {last}", 1, is_share=True),
            Metric(f"chance/turn_{last}", f"the same without instruction (chance) at turn {last}", is_share=True),
        ]
    metrics += [
        Metric("kl_to_reference", f"KL to {reference}, nats per response"),
        Metric("response_tokens", "tokens a response", digits=1),
        Metric("finished_fraction", "answers that end by themselves", 1, is_share=True),
        Metric("distinct_2", "distinct word pairs (distinct-2)", digits=3),
    ]
    return [metric for metric in metrics if evaluation.has(metric.key)]


def headline_table(evaluation: Evaluation) -> Table:
    """Metrics as rows, policies as columns, so that a phone scrolls sideways through policies only."""
    rows = []
    for metric in metrics_of(evaluation):
        measures = [evaluation.measure(policy, metric.key) for policy in evaluation.policies]
        best = _best(metric, measures)
        form = percent if metric.is_share else partial(number, digits=metric.digits)
        cells = [measure_cell(one, form, is_best=one is not None and one.value == best) for one in measures]
        rows.append([Cell(metric.label), *cells])
    return Table(
        "All policies on held-out prompts, with 95% intervals",
        ["", *evaluation.policies],
        rows,
        note="'best' marks the best mean of a line; where intervals overlap it says little. The paired differences below show "
        f"whether a policy differs from {evaluation.reference}. KL, length and distinct word pairs have no best. "
        "All scores, violations included, are models' judgements, not people's.",
        name="headline",
    )


def headline(facts: Facts, figures: Path, control: str | None = None) -> Section:
    """Which policy to use, a plot of all policies, a glossary, the effect of each step, a small and a large table;
    without an evaluation, each step's own figures."""
    evaluation = facts.evaluation
    lines, details = opening(facts), changes(facts, control)
    blocks: list[Block] = [Points(lines, tone="finding")] if lines else []
    if evaluation is not None:
        blocks += [*_glance(facts, evaluation, figures), Text(glossary(evaluation), tone="glossary")]
    blocks += [Points(details)] if details else []
    if evaluation is None:
        return Section("Results", "results", [*blocks, *_without_evaluation(facts)])
    others = [policy for policy in evaluation.policies if policy != evaluation.reference]
    if others:
        blocks.append(policies_table(evaluation))
    else:
        blocks.append(Text(f"Only {evaluation.reference} was evaluated: there is nothing yet to compare it with."))
    blocks.append(headline_table(evaluation))
    if others:
        by_models = (
            "By the reward models that the policies were tuned by, so that their verdict flatters, next to the judge's:"
        )
        blocks += [Text(by_models), Points([verdict(evaluation, policy) for policy in others])]
        blocks.append(_differences(evaluation, others))
    settings = [f"temperature {evaluation.temperature:g}"] if evaluation.temperature is not None else []
    settings += [f"at most {evaluation.max_new_tokens} new tokens"] if evaluation.max_new_tokens is not None else []
    if settings:
        blocks.append(Text(f"Answers of all policies were sampled alike: {', '.join(settings)}."))
    return Section("Results", "results", blocks)


def _glance(facts: Facts, evaluation: Evaluation, figures: Path) -> list[Block]:
    """One plot of the policies by the most informative metrics."""
    first = evaluation.reference
    metrics = (
        (f"judge's score, less {first}'s", "difference/judge", 1, 0.0),
        (f"ranks above {first}'s, % of pairs", "superiority", 100, 0.5),
        ("harmful prompts refused, %", "harmful/refused", 100, None),
        ("harmless prompts answered, %", "harmless/complied", 100, None),
    )
    panels, words = {}, []
    for title, key, scale, middle in metrics:
        by_policy = {name: one for name in evaluation.policies if (one := evaluation.measure(name, key)) is not None}
        if by_policy:
            panels[title] = (by_policy, scale, middle)
            values = ", ".join(f"{name} {number(one.value * scale)}" for name, one in by_policy.items())
            words.append(f"{title}: {values}.")
    if not panels or len(evaluation.policies) < 2:
        return []
    path = figures / "policies.png"
    at_a_glance(path, panels, facts.places)
    caption = "The policies in the order of the run, on held-out prompts, with 95% intervals; grey lines are draws."
    return [Picture(path, " ".join(words), caption, is_wide=True)]


def verdict(evaluation: Evaluation, policy: str) -> str:
    """One sentence: whether the policy beats the reference by the decisive ranking, and whether the judge agrees."""
    reference = evaluation.reference
    judge = evaluation.measure(policy, "difference/judge")
    decided = _decided(evaluation, policy)
    if decided is None:
        return f"Whether {policy} beats {reference} was not measured: no reward model scored both."
    what, side, figure = decided
    opening = {
        1: f"{policy} beats {reference} in {what}: {figure}",
        0: f"{policy} does not beat {reference} in {what}: {figure}, an interval that includes a draw",
        -1: f"{policy} does not beat {reference} in {what}, it is below it: {figure}",
        None: f"{policy} against {reference} in {what}: {figure}, without an interval: nothing is known of chance",
    }[side]
    if judge is None:
        return f"{opening}; no judge has read these answers."
    return f"{opening}; {_follows(side, side_of(judge), reference)}: {with_interval(judge, signed)}."


def _decided(evaluation: Evaluation, policy: str) -> tuple[str, int | None, str] | None:
    """The metric of the comparison with the reference, the side of a draw it is on, and the figure."""
    ranked = evaluation.measure(policy, "superiority")
    if ranked is not None:
        figure = f"its answers rank higher in {with_interval(ranked, percent)} of pairs"
        return "the reward models' ranking", side_of(ranked, draw=0.5), figure
    key = next((name for name in _NAMES if evaluation.measure(policy, f"difference/{name}")), None)
    measure = None if key is None else evaluation.measure(policy, f"difference/{key}")
    if key is None or measure is None:
        return None
    return _NAMES[key], side_of(measure), with_interval(measure, signed)


def _follows(side: int | None, judged: int | None, reference: str) -> str:
    """Whether the judge agrees with the models that the policy was tuned with."""
    match side, judged:
        case 1, 1:
            return "the judge, who selected nothing, agrees"
        case 1, 0:
            return "the judge does not follow"
        case 1, -1:
            return f"the judge says the opposite and puts it below {reference}"
        case _, 1:
            return f"the judge puts it above {reference}"
        case -1, -1:
            return "the judge agrees that it is worse"
        case _, -1:
            return f"the judge puts it below {reference}"
        case _, 0:
            return "the judge sees no difference"
        case _:
            return "the judge's difference, without an interval"


def side_of(measure: Measure, *, draw: float = 0.0) -> int | None:
    """1 or -1 if the interval is above or below a draw, 0 if it contains it, None without an interval."""
    if measure.interval is None:
        return None
    low, high = measure.interval
    return 1 if low > draw else -1 if high < draw else 0


def difference_cell(measure: Measure | None) -> Cell:
    """A difference, with the side of 0 that its interval is on, in words."""
    if measure is not None and measure.value == measure.low == measure.high == 0:
        return Cell("0", "equal")
    words = {1: "above 0", 0: "includes 0", -1: "below 0", None: "no interval"}
    return measure_cell(measure, signed, after=words[side_of(measure)] if measure else "")


def _best(metric: Metric, measures: Sequence[Measure | None]) -> float | None:
    values = [one.value for one in measures if one is not None]
    if not metric.better or not values or (len(values) < 2 and metric.at_least is None):
        return None
    best = max(values) if metric.better > 0 else min(values)
    if (metric.at_least is not None and best <= metric.at_least) or (len(set(values)) == 1 and len(values) > 1):
        return None
    return best


def _differences(evaluation: Evaluation, others: Sequence[str]) -> Table:
    rows = []
    for key, label in _DIFFERENCES:
        measures = [evaluation.measure(policy, f"difference/{key}") for policy in others]
        if any(measures):
            rows.append([Cell(label), *(difference_cell(one) for one in measures)])
    return Table(
        f"Difference to {evaluation.reference}, prompt by prompt",
        ["score", *others],
        rows,
        note="Policy less reference on the same prompts, 95% bootstrap interval. 'includes 0': no difference is "
        "shown. Whether a policy is better is decided by the ranking, in which safe answers lie above unsafe ones; the "
        "judge decides nothing.",
        name="differences",
    )


def _without_evaluation(facts: Facts) -> list[Block]:
    steps = [step for step in facts.policies if f"{step.command}/test/difference/score" in step.summary]
    words = "There is no evaluation of all policies on the same prompts, so there is no table of them here."
    if not steps:
        return [Text(words, tone="missing")]
    words += " What each step measured of itself, against the policy that it began with:"
    rows = [
        [
            Cell(step.name),
            measure_cell(step.measure(f"{step.command}/test/superiority"), percent),
            *(difference_cell(step.measure(f"{step.command}/test/difference/{key}")) for key, _ in _DIFFERENCES),
        ]
        for step in steps
    ]
    prompts = [f"{step.name}: {step.summary.get(f'{step.command}/test/prompts', 0):.0f}" for step in steps]
    table = Table(
        "Each step less the policy that it began with",
        ["step", "ranks higher, share of pairs", *(label for _, label in _DIFFERENCES)],
        rows,
        note=f"Test prompts: {', '.join(prompts)}. Each step has prompts and a scale of its own: lines cannot be compared.",
        name="steps",
    )
    return [Text(words, tone="missing"), table]
