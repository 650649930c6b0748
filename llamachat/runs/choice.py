"""Which policy of a run to use: the last one that the judge does not rate below another, and that still answers.

Later policies may have gained what the judge does not measure, such as Ghost Attention. The judge is a reward model that
was not used for any selection. It may prefer refusals, or one text that exploits it, so a policy that leaves most
harmless prompts unanswered, or gives one answer to many prompts, is also rejected, whatever its scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llamachat.runs.artifacts import MANIFEST, Artifact, published_steps
from llamachat.runs.reader import Evaluation, Measure, step_of

# A policy that answers less than this share of the harmless prompts that the first one answers is useless.
_LEAST_ANSWERED = 0.5
_MOST_COMMON = (
    0.25  # so is one that gives the same answer to more prompts than this, and to twice as many as the first one
)
_HARMLESS = ("ordinary/complied", "harmless/complied")


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The recommended policy, the reason, and why the later ones are not recommended."""

    policy: str
    reason: str
    passed_over: Mapping[str, str]

    @property
    def why(self) -> str:
        """The reasons in one line."""
        return self.reason + "".join(f"; not {name}: {why}" for name, why in self.passed_over.items())

    @property
    def words(self) -> str:
        """The policy with the reasons."""
        return f"{self.policy}: {self.why}"


def recommend(evaluation: Evaluation) -> Recommendation:
    """The last policy without an objection; the first policy if there is an objection to all others."""
    first = evaluation.reference
    passed_over: dict[str, str] = {}
    for policy in reversed([name for name in evaluation.policies if name != first]):
        against = collapse(evaluation, policy) or _judged_below(evaluation, policy)
        if against is None:
            judge = evaluation.measure(policy, "difference/judge")
            if judge is None:
                return Recommendation(policy, "the last policy; no judge has rated its answers", passed_over)
            reason = f"the last policy that the judge does not rate below another ({_signed(judge)} over {first})"
            return Recommendation(policy, reason, passed_over)
        passed_over[policy] = against
    reason = "no later policy is better" if passed_over else "the only policy that was evaluated"
    return Recommendation(first, reason, passed_over)


def best_first(evaluation: Evaluation) -> list[str]:
    """All policies ordered by the judge; collapsed ones come last, ordered by the share of prompts that they answer."""

    def key(policy: str) -> tuple[bool, float, float]:
        judge = evaluation.measure(policy, "difference/judge")
        is_collapsed = collapse(evaluation, policy) is not None
        answered = sum(one.value for name in _HARMLESS if (one := evaluation.measure(policy, name)))
        return is_collapsed, -answered if is_collapsed else 0.0, -judge.value if judge else 0.0

    return sorted(evaluation.policies, key=key)


def collapse(evaluation: Evaluation, policy: str) -> str | None:
    """Return the reason if the policy answers less than half of the harmless prompts that the first one answers, or
    gives one answer to more than a quarter of all prompts."""
    for name in _HARMLESS:
        own, first = evaluation.measure(policy, name), evaluation.measure(evaluation.reference, name)
        if own is not None and first is not None and own.value < _LEAST_ANSWERED * first.value:
            return f"it answers {own.value:.0%} of harmless prompts, and {evaluation.reference} {first.value:.0%}"
    own, first = (evaluation.measure(name, "commonest_answer") for name in (policy, evaluation.reference))
    if own is not None and first is not None and own.value > max(_MOST_COMMON, 2 * first.value):
        return f"it gives one answer to {own.value:.0%} of prompts, and {evaluation.reference} to {first.value:.0%}"
    return None


def _judged_below(evaluation: Evaluation, policy: str) -> str | None:
    """Return the reason if the policy's interval by the judge is below that of the best policy, or below 0."""
    first, best = evaluation.reference, best_first(evaluation)[0]
    judge, highest = (evaluation.measure(name, "difference/judge") for name in (policy, best))
    if judge is None or judge.high is None:
        return None
    if highest is not None and highest.low is not None and judge.high < highest.low:
        return f"the judge rates it below {best} ({_signed(judge)} over {first}, {best} {_signed(highest)})"
    return f"the judge rates it below {first} ({_signed(judge)})" if judge.high < 0 else None


def _signed(measure: Measure) -> str:
    ends = "" if measure.interval is None else f" [{measure.interval[0]:+.2f}, {measure.interval[1]:+.2f}]"
    return f"{measure.value:+.2f}{ends}"


def is_run(path: Path) -> bool:
    """Whether this is the folder of a run, not of a step or an artifact."""
    own = any((path / name / MANIFEST).is_file() for name in ("", "artifact", "dialogs"))
    return path.is_dir() and not own and not (path / "identity.json").is_file()


def recommended_policy(run: Path) -> tuple[Artifact, str] | None:
    """Return the policy that the evaluation recommends, with the reason; without an evaluation, the last policy.

    None if the run has no policy. Policies made after the evaluation are not considered.
    """
    steps = published_steps(run)
    policies = {step.manifest.step: step for step in steps if step.manifest.kind == "policy"}
    if not policies:
        return None
    *_, last = policies.values()
    evaluations = [step for step in steps if step.manifest.kind == "evaluation"]
    evaluation = step_of(evaluations[-1]).evaluation if evaluations else None
    if evaluation is None:
        return last, "the last policy; no evaluation compared the policies (`llamachat eval` does)"
    evaluated_at = evaluations[-1].manifest.created
    later = [name for name, policy in policies.items() if policy.manifest.created > evaluated_at]
    recommendation = recommend(evaluation)
    if recommendation.policy in later:
        return last, "the last policy; the evaluation is older than the policies (`llamachat eval` repeats it)"
    if recommendation.policy not in policies:  # the one that the recipe started from
        return last, f"the last policy, though the evaluation recommends {recommendation.words}"
    note = f"; not evaluated: {', '.join(later)}" if later else ""
    return policies[recommendation.policy], f"{recommendation.why}{note}"
