"""Problems of a training, found by rules on its logged metrics: PPO checks them while it runs, `llamachat diagnose`
afterwards.

A rule applies if the newest values of a series are past its bound, several in a row, so that a single noisy value does
not count; a series that has recovered is not reported. The bounds are ours, and docs/curves.md shows the curves.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamachat.runs.reader import Measure, read_run
from llamachat.runs.record import STEP, MetricsRecord

Points = Sequence[tuple[int, float]]  # of one metric by step, in order
Row = Mapping[str, float]

CURVES = "docs/curves.md"
_HIGH_KL, _RUNAWAY_KL = 10.0, 30.0  # nats per response: high if still growing, and high in any case
_GROWTH = 1.8  # ratio of the KL to that at half of the iterations; 2 is a straight line from 0
_OVERFIT = 1.02  # ratio of the held-out loss to its minimum


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem, described for people."""

    rule: str  # its title, and its heading in docs/curves.md
    since: str | None  # such as 'iteration 12'; None for a comparison after the training
    seen: str
    meaning: str
    change: str

    def lines(self) -> list[str]:
        """Title, observation, usual meaning, and what to change: one line each."""
        since = "" if self.since is None else f" (since {self.since})"
        parts = {"seen": self.seen, "usually": self.meaning, "change": self.change}
        return [f"{self.rule}{since}", *(f"  {name + ':':<9}{text}" for name, text in parts.items())]

    def sentence(self) -> str:
        """The same in one line, for the log of a training."""
        since = "" if self.since is None else f" since {self.since}"
        return f"{self.rule}{since}: {self.seen} {self.meaning} {self.change} See {CURVES}."


class Watch:
    """Findings of a running training, each reported once."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """`rows` are those that an earlier command logged, whose findings it has reported."""
        self._rows = list(rows)
        self._said = {finding.rule for finding in diagnose(self._rows)}

    def add(self, step: int, figures: Row) -> list[Finding]:
        """The findings that these figures add."""
        self._rows.append({STEP: step, **figures})
        new = [finding for finding in diagnose(self._rows) if finding.rule not in self._said]
        self._said |= {finding.rule for finding in new}
        return new


def diagnose(rows: Sequence[Row]) -> list[Finding]:
    """The findings of a record, in the order of docs/curves.md; metrics that were not logged are skipped."""
    series = _series(rows)
    findings = [_nan(series), _runaway_kl(series.get("ppo/kl_to_reference", []))]
    findings += [bound.finding(series.get(bound.metric, [])) for bound in _BOUNDS]
    findings.append(_judge_falls(series.get("ppo/heldout/score", []), series.get("ppo/heldout/judge", [])))
    findings += [_overfits(name, series) for name in series if name.endswith("/eval_loss")]
    return [finding for finding in findings if finding is not None]


def diagnose_run(run: Path) -> dict[str, list[Finding]]:
    """The findings of each step of a run that logged a training, by step name."""
    steps = read_run(run)
    evaluation = next((step.evaluation for step in reversed(steps.values()) if step.evaluation is not None), None)
    findings = {}
    for name, step in steps.items():
        rows = MetricsRecord(step.folder.metrics).read()
        if not rows or step.command in ("eval", "report"):
            continue
        measures = [step.measure(f"{step.command}/test/difference/{score}") for score in ("score", "judge")]
        if evaluation is not None and name in evaluation.policies:
            measures = [evaluation.measure(name, f"difference/{score}") for score in ("score", "judge")]
        disagreement = judge_disagrees(*measures)
        step_findings = diagnose(rows)
        if disagreement is not None:  # it is tested, so it replaces what the curves alone suggest
            step_findings = [*(one for one in step_findings if one.rule != disagreement.rule), disagreement]
        findings[name] = step_findings
    return findings


def judge_disagrees(score: Measure | None, judge: Measure | None) -> Finding | None:
    """The finding if the score rose and the judge's fell, both beyond their 95% intervals; differences to the start."""
    if score is None or judge is None or score.interval is None or judge.interval is None:
        return None
    if score.interval[0] <= 0 or judge.interval[1] >= 0:
        return None
    differences = (
        f"{name} changed by {one.value:+.2f} [{one.low:+.2f}, {one.high:+.2f}]"
        for name, one in (("the combined score", score), ("the judge's score", judge))
    )
    return _judge_finding(None, f"{' and '.join(differences)} on test prompts.")


# -- rules


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bound:
    """A rule on one metric: it applies if the newest `count` values are past the bound."""

    rule: str
    metric: str
    is_crossed: Callable[[float, float], bool]  # (value, first value)
    count: int = 3
    from_point: int = 1  # the first value that counts: earlier ones belong to a model with little training
    seen: str  # {value}, {first}, {step}
    meaning: str
    change: str

    def finding(self, points: Points) -> Finding | None:
        first = points[0][1] if points else 0.0
        since = _since(points[self.from_point :], lambda value: self.is_crossed(value, first), self.count)
        if since is None:
            return None
        step, value = points[-1]
        return Finding(
            self.rule,
            f"iteration {since}",
            self.seen.format(value=value, first=first, step=step),
            self.meaning,
            self.change,
        )


_COLLAPSE = (
    "The policy repeats what the reward models prefer, and its answers lose diversity.",
    "Raise ppo.kl_coef or lower ppo.learning_rate; keep ppo.collapse_guard on, which publishes an earlier policy.",
)
_BOUNDS = (
    _Bound(
        rule="Entropy collapses",
        metric="ppo/entropy",
        is_crossed=lambda value, first: value < 0.5 * first,
        seen="entropy is {value:.2f} nats per token; at first it was {first:.2f}.",
        meaning="The policy has become certain of few answers and no longer explores others.",
        change="Raise ppo.kl_coef, lower ppo.learning_rate or ppo.epochs, and read the answers in samples.jsonl.",
    ),
    _Bound(
        rule="The critic explains nothing",
        metric="ppo/explained_variance",
        is_crossed=lambda value, _: value <= 0.0,
        count=5,
        from_point=5,
        seen="explained variance is {value:.2f} at iteration {step}: 0 is as good as a constant, 1 is exact.",
        meaning="The critic is no better than a constant, so advantages are noise and the policy learns slowly.",
        change="Raise ppo.critic_learning_rate, let ppo.critic_warmup train the critic first, set ppo.critic: separate"
        " or more ppo.responses_per_iteration.",
    ),
    _Bound(
        rule="Many tokens are clipped",
        metric="ppo/clip_fraction",
        is_crossed=lambda value, _: value > 0.3,
        seen="the ratio of {value:.0%} of the tokens is clipped at iteration {step}.",
        meaning="A step moves further than PPO's approximation is valid, so most of it is clipped and the rest is unreliable.",
        change="Lower ppo.learning_rate or ppo.epochs, or raise ppo.responses_per_minibatch.",
    ),
    _Bound(
        rule="Many answers are truncated",
        metric="ppo/truncated_fraction",
        is_crossed=lambda value, _: value > 0.3,
        seen="{value:.0%} of the answers reach the length limit at iteration {step}; at first it was {first:.0%}.",
        meaning="All truncated answers get the same score, so they only teach the policy to be shorter.",
        change="Raise rollout.max_new_tokens; if their number grows, lower scoring.unfinished_score, widen"
        " ppo.unfinished_ramp or set scoring.length; if it was high from the start, train sft longer.",
    ),
    _Bound(
        rule="Answers get shorter",
        metric="ppo/heldout/response_tokens",
        is_crossed=lambda value, first: value < 0.8 * first,
        count=2,
        seen="answers to validation prompts have {value:.0f} tokens; at iteration 0 it was {first:.0f}.",
        meaning="The reward models prefer short answers, which contain fewer errors.",
        change="Set scoring.length (such as {shortest: 0.8}), raise ppo.kl_coef, and look at the reward models'"
        " accuracy by length (make rm).",
    ),
    _Bound(
        rule="Answers get longer",
        metric="ppo/heldout/response_tokens",
        is_crossed=lambda value, first: value > 1.5 * first,
        count=2,
        seen="answers to validation prompts have {value:.0f} tokens; at iteration 0 it was {first:.0f}.",
        meaning="Reward models often prefer length itself; compare the judge on answers of similar length.",
        change="Set scoring.length (such as {longest: 1.5}) or raise ppo.kl_coef.",
    ),
    _Bound(
        rule="Answers lose variety",
        metric="ppo/heldout/distinct_2",
        is_crossed=lambda value, first: value < 0.85 * first,
        count=2,
        seen="distinct-2 on validation prompts is {value:.2f}; at iteration 0 it was {first:.2f}.",
        meaning=_COLLAPSE[0],
        change=_COLLAPSE[1],
    ),
    _Bound(
        rule="One answer is common",
        metric="ppo/heldout/commonest_answer",
        is_crossed=lambda value, first: value > first + 0.05,
        count=2,
        seen="{value:.0%} of the answers to validation prompts are identical; at iteration 0 it was {first:.0%}.",
        meaning=_COLLAPSE[0],
        change=_COLLAPSE[1],
    ),
    _Bound(
        rule="The gate is always open",
        metric="ppo/reward/gate_fraction",
        is_crossed=lambda value, _: value > 0.99,
        count=5,
        seen="{value:.0%} of the answers are scored by the safety model at iteration {step}.",
        meaning="The helpfulness model has no influence: all prompts are marked is_safety, or all answers look unsafe.",
        change="Add harmless prompts to data.prompts, check the safety model's labels (make rm), or lower"
        " scoring.safety_threshold.",
    ),
    _Bound(
        rule="The gate never opens",
        metric="ppo/reward/gate_fraction",
        is_crossed=lambda value, _: value < 0.01,
        count=5,
        seen="{value:.0%} of the answers are scored by the safety model at iteration {step}.",
        meaning="The safety model has no influence: no prompt is marked is_safety, and no answer looks unsafe.",
        change="Add data.adversarial, or raise scoring.safety_threshold; without unsafe prompts, scoring.combine: single"
        " is equivalent.",
    ),
)


def _runaway_kl(points: Points) -> Finding | None:
    """KL that is high and still grows linearly with the iterations or faster, or that is very high."""

    def is_running(place: int) -> bool:
        value, half = points[place][1], points[place // 2][1]
        return value > _RUNAWAY_KL or (value > _HIGH_KL and value > _GROWTH * half)

    places = [(place, float(is_running(place))) for place in range(len(points))]
    since = _since(places, bool, 3)
    if since is None:
        return None
    (step, value), (half_step, half) = points[-1], points[(len(points) - 1) // 2]
    return Finding(
        "KL runs away",
        f"iteration {points[since][0]}",
        f"KL to the starting policy is {value:.1f} nats per answer at iteration {step}; at iteration {half_step} it was {half:.1f}.",
        "The policy keeps moving away from the start, towards answers on which the reward models are wrong.",
        "Raise ppo.kl_coef, lower ppo.learning_rate, or set ppo.kl_control: adaptive; ppo.kl_guard ends such a training.",
    )


def _judge_falls(score: Points, judge: Points) -> Finding | None:
    """The judge falls at each of three evaluations to below iteration 0, while the score is above iteration 0."""
    if len(judge) < 4 or len(score) < 4:
        return None
    values = [value for _, value in judge]
    is_falling = values[-4] > values[-3] > values[-2] > values[-1] and values[-1] < values[0]
    if not is_falling or score[-1][1] <= score[0][1]:
        return None
    return _judge_finding(
        f"iteration {judge[-4][0]}",
        f"the score on validation prompts went from {score[0][1]:+.2f} to {score[-1][1]:+.2f}, the judge's from"
        f" {values[0]:+.2f} to {values[-1]:+.2f}.",
    )


def _judge_finding(since: str | None, seen: str) -> Finding:
    return Finding(
        "Score up, judge down",
        since,
        seen,
        "The policy exploits the reward models that it is trained on, but an independent one disagrees: overoptimisation.",
        "Use fewer ppo.iterations or a higher ppo.kl_coef; better reward models (more pairs, the probe of make rm) allow"
        " longer training.",
    )


def _overfits(name: str, series: Mapping[str, Points]) -> Finding | None:
    """A held-out loss that rises after its minimum while the training loss falls."""
    held_out, training = series[name], series.get(name.replace("eval_loss", "loss"), [])
    if not held_out:
        return None
    lowest_step, lowest = min(held_out, key=lambda point: (point[1], point[0]))
    since = _since(held_out, lambda value: value > _OVERFIT * lowest, 2)
    before = [value for step, value in training if step <= lowest_step]
    after = [value for step, value in training if step > lowest_step]
    if since is None or since < lowest_step or not before or not after or _mean(after) >= _mean(before):
        return None
    command = name.partition("/")[0]
    section = "reward" if command == "rm" else command
    return Finding(
        f"Overfitting of {name.removesuffix('/eval_loss')}",
        f"step {since}",
        f"{name} is {held_out[-1][1]:.3f} at step {held_out[-1][0]}; at step {lowest_step} it was {lowest:.3f}, while the"
        " training loss fell.",
        "The model memorises the training records and gets worse on others.",
        f"Lower {section}.epochs or {section}.learning_rate, or add data.",
    )


def _nan(series: Mapping[str, Points]) -> Finding | None:
    """A loss or gradient norm that is NaN or infinite."""
    for name, points in series.items():
        steps = [step for step, value in points if math.isnan(value)]
        if steps and name.endswith(("loss", "grad_norm")):
            return Finding(
                "No number",
                f"step {steps[0]}",
                f"{name} is NaN or infinite.",
                "The training has diverged, and all later weights are useless.",
                "Lower the learning rate, set base.dtype: bfloat16 instead of float16, and rerun the step with"
                " --overwrite.",
            )
    return None


# -- series


def _since(points: Points, is_crossed: Callable[[float], bool], count: int) -> int | None:
    """The step of the first of the newest values that are all past a bound; None if there are fewer than `count`."""
    start = len(points)
    while start > 0 and is_crossed(points[start - 1][1]):
        start -= 1
    return points[start][0] if len(points) - start >= count else None


def _series(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """The values of each metric by step; of two lines at one step the later wins."""
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        for name, value in row.items():
            if "/" in name:
                values.setdefault(name, {})[int(row[STEP])] = value
    return {name: sorted(by_step.items()) for name, by_step in values.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
