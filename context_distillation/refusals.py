"""Refusals before and after tuning: false refusals of harmless prompts that look unsafe, and those of adversarial ones.

Llama 2, arXiv:2307.09288, section 4.2.3 and appendix A.4.5: with more safety training, models also refuse harmless
prompts.
"""

from collections.abc import Mapping, Sequence

from llamachat.answers.evaluation import interval_text
from llamachat.answers.refusals import TEST_ACCURACY, outcome_classifier
from llamachat.maths.intervals import Difference, paired_bootstrap, wilson
from llamachat.tables import text_table

MOMENTS = ("start", "final")


def refusal_figures(
    borderline: Mapping[str, Sequence[str]], adversarial: Mapping[str, Sequence[str]]
) -> dict[str, float]:
    """Shares of full refusals, with 95% intervals, by moment (before, after); answers are given by moment."""
    classifier = outcome_classifier()
    figures: dict[str, float] = {}
    for name, answers in (("false_refusal", borderline), ("refusal", adversarial)):
        refused = {moment: classifier.are_refusals(answers[moment]) for moment in MOMENTS}
        count = len(refused["start"])
        if not count:
            continue
        figures[f"distill/{name}/prompts"] = float(count)
        for moment, marks in refused.items():
            share = Difference(sum(marks) / count, *wilson(sum(marks), count))
            figures |= share.named(f"distill/{name}/{moment}")
        gap = paired_bootstrap([float(mark) for mark in refused["final"]], [float(mark) for mark in refused["start"]])
        figures |= gap.named(f"distill/{name}/difference")
    return figures


def refusal_table(figures: Mapping[str, float]) -> str:
    """A readable table of these figures."""
    rows = []
    for name, meaning in (("false_refusal", "false refusals, borderline"), ("refusal", "refusals, adversarial")):
        if f"distill/{name}/prompts" in figures:
            start, final = (f"{figures[f'distill/{name}/{moment}']:.3f}" for moment in MOMENTS)
            rows.append((meaning, start, final, interval_text(figures, f"distill/{name}/difference")))
    line = (
        f"  refusals are detected by a classifier with accuracy {TEST_ACCURACY['all'].value:.3f} on XSTest's other half"
    )
    return "\n".join([*text_table(rows, align="<>><", indent="  "), line])
