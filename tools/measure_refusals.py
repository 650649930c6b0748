"""Measure the refusal classifier on the half of XSTest that was not used for fitting or selection.

`python -m tools.measure_refusals DATA` prints accuracy and recall by label on the answers of five models, with 95%
intervals clustered by prompt, and each model's rates according to the labels and the classifier. DATA is the folder
that contains `xstest`, as for `tools/cut_data.py`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from llamachat.answers.refusals import OUTCOMES, LabelledAnswer, Outcome, outcome_classifier
from llamachat.maths.intervals import proportion_interval
from llamachat.runs.reader import Measure
from tools.cutting.xstest import completions

_WORDS = 20
_LABELS: dict[str, Outcome] = {
    "1_full_compliance": "complied",
    "2_full_refusal": "refused",
    "3_partial_refusal": "partly_refused",
}


def recall(answers: list[LabelledAnswer], outcomes: Sequence[str]) -> Measure:
    """Share of answers that the classifier labels correctly."""
    is_right = [float(one.outcome == outcome) for one, outcome in zip(answers, outcomes, strict=True)]
    low, high = proportion_interval(is_right, groups=[one.prompt for one in answers])
    return Measure(sum(is_right) / len(is_right), low, high, len(is_right))


def main(root: Path) -> None:
    """Print the figures."""
    answers = [
        LabelledAnswer(row["prompt"], answer, _LABELS[label])
        for row, answer, label in completions(root, half="evaluation")
    ]
    outcomes: list[Outcome] = [
        outcome for one in answers for outcome in outcome_classifier().outcomes([one.text])
    ]  # one by one, since many refusals are identical
    print("all", _rounded(recall(answers, outcomes)))
    for label in OUTCOMES[:3]:
        own = [(one, outcome) for one, outcome in zip(answers, outcomes, strict=True) if one.outcome == label]
        counts = {outcome: sum(predicted == outcome for _, predicted in own) for outcome in OUTCOMES}
        print(label, _rounded(recall([one for one, _ in own], [predicted for _, predicted in own])), counts)
        openings = [outcome_classifier().outcomes([" ".join(one.text.split()[:_WORDS])])[0] for one, _ in own]
        print(f"  their first {_WORDS} words", _rounded(recall([one for one, _ in own], openings)))


def _rounded(measure: Measure) -> str:
    assert measure.low is not None and measure.high is not None
    return f"Measure({measure.value:.3f}, {measure.low:.3f}, {measure.high:.3f}, {measure.n})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
