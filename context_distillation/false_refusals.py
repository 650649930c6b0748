"""Refusals before and after: of harmless prompts that look unsafe, where each is a false one, and of adversarial ones.

Llama 2, arXiv:2307.09288, section 4.2.3 and appendix A.4.5: more safety training makes models refuse harmless prompts too.
"""

import logging
from collections.abc import Mapping, Sequence

from context_distillation.config import Config
from llamachat.answers.desk import Desk
from llamachat.answers.refusals import everyday_answers, labelled_answers, train_classifier
from llamachat.answers.responses import sample
from llamachat.answers.scorer import longest_prompt
from llamachat.answers.store import Store
from llamachat.data.prompts import load_borderline
from llamachat.maths.intervals import paired_bootstrap, wilson
from llamachat.runs.inputs import StepInputs

log = logging.getLogger(__name__)

MOMENTS = ("start", "final")


def answer_borderline(moment: str, config: Config, inputs: StepInputs, desk: Desk, store: Store) -> list[str]:
    """The answers of the policy at the desk to borderline prompts; none where there are no such prompts."""

    def make() -> list[str]:
        prompts = load_borderline(
            inputs.data,
            desk.bank.chat_format,
            system=inputs.base.system,
            max_tokens=longest_prompt(inputs.base, inputs.rollout, desk.bank),
            count=config.borderline_prompts,
        )
        if not prompts:
            return []
        return [one.text for one in sample(desk.engine, desk.bank.chat_format, prompts, desk.sampling(0))]

    return store.kept(f"borderline-{moment}", make)


def refusal_figures(
    borderline: Mapping[str, Sequence[str]], adversarial: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Shares of refusals by moment with 95% intervals, and what tells them; answers are listed by moment."""
    classifier = train_classifier(labelled_answers(), everyday_answers())
    found = {
        "distill/refusal_classifier_accuracy": classifier.accuracy,
        "distill/refusal_classifier_accuracy_low": classifier.low,
        "distill/refusal_classifier_accuracy_high": classifier.high,
    }
    for name, answers in (("false_refusal", borderline), ("refusal", adversarial)):
        refused = {moment: classifier.are_refusals(answers[moment]) for moment in MOMENTS}
        count = len(refused["start"])
        if not count:
            continue
        found[f"distill/{name}/prompts"] = float(count)
        for moment, marks in refused.items():
            low, high = wilson(sum(marks), count)
            place = f"distill/{name}/{moment}"
            found |= {place: sum(marks) / count, f"{place}_low": low, f"{place}_high": high}
        gap = paired_bootstrap([float(mark) for mark in refused["final"]], [float(mark) for mark in refused["start"]])
        place = f"distill/{name}/difference"
        found |= {place: gap.value, f"{place}_low": gap.low, f"{place}_high": gap.high}
    return found


def refusal_table(figures: Mapping[str, float]) -> str:
    """The same for people."""
    lines = []
    for name, meaning in (("false_refusal", "false refusals, borderline"), ("refusal", "refusals, adversarial")):
        place = f"distill/{name}"
        if f"{place}/prompts" in figures:
            start, final, gap, low, high = (
                figures[f"{place}/{key}"]
                for key in ("start", "final", "difference", "difference_low", "difference_high")
            )
            lines.append(f"  {meaning:<38} {start:>9.3f} {final:>9.3f}  {gap:+.3f} ({low:+.3f} to {high:+.3f})")
    accuracy, low, high = (figures[f"distill/refusal_classifier_accuracy{bound}"] for bound in ("", "_low", "_high"))
    lines.append(
        f"  refusals are told by a classifier that is right in {accuracy:.3f} ({low:.3f} to {high:.3f}) of cases"
    )
    return "\n".join(lines)
