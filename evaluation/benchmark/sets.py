"""The sets of `llamachat benchmark`: questions, how they are asked, and the figures computed from the answers.

All figures are shares. Questions are read from the bundled `data/benchmarks` and, for XSTest and CoCoNot,
`data/borderline`.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Literal

from evaluation.benchmark.ifeval import RULES, follows, follows_loosely
from llamachat.answers.refusals import OUTCOMES, outcome_classifier
from llamachat.config.sections import bundled
from llamachat.data.files import read_rows
from llamachat.maths.intervals import bootstrap_interval, proportion_interval
from llamachat.runs.reader import Measure

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")
_DONE = {
    "complied": "complied with",
    "partly_refused": "partly refused",
    "refused": "refused",
    "unanswered": "not answered",
}


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and the data needed to score its answer."""

    id: str
    text: str
    is_harmful: bool
    measured: Mapping[str, Any]


# A policy's answer to a question as stored: `texts` and `finished` per turn, or the `logprobs` of the choices.
# A second turn after an empty first answer has the text "".
Answer = Mapping[str, Any]
Figures = dict[str, Measure]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchmarkSet:
    """A published set of questions."""

    title: str
    files: tuple[str, ...]
    figures: Callable[[Sequence[Question], Sequence[Answer]], Figures] | None  # None: a judge compares the answers
    asks: Literal["one turn", "two turns", "choices"] = "one turn"
    # Published results of other models: column -> figure -> share.
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    left_out: str = "questions are left out"

    def questions(self, limit: int | None) -> tuple[list[Question], int]:
        """The first questions of each file, and the number left out because their answers cannot be scored here."""
        read = [_question(row.value) for file in self.files for row in list(read_rows(str(bundled(file))))[:limit]]
        kept = [one for one in read if all(part["kind"] in RULES for part in one.measured.get("instructions", ()))]
        return kept, len(read) - len(kept)


def _question(row: Any) -> Question:
    return Question(row["id"], row["prompt"][0]["content"], row.get("is_safety", False), row.get("benchmark", {}))


def choices(question: Question) -> list[str]:
    """Choices of a multiple-choice question: the best answer, all true answers, all false answers."""
    measured = question.measured
    return [measured["best"], *measured["true"], *measured["false"]]


def _share(outcomes: Sequence[bool], groups: Sequence[str] | None = None) -> Measure:
    low, high = proportion_interval([float(one) for one in outcomes], groups=groups)
    return Measure(sum(outcomes) / len(outcomes), low, high, len(outcomes))


def ifeval(questions: Sequence[Question], answers: Sequence[Answer]) -> Figures:
    """Accuracy by prompt and by instruction, strict and loose (Zhou et al. 2023, section 3)."""
    figures: Figures = {}
    for how, rule in (("strictly", follows), ("loosely", follows_loosely)):
        kept = [
            [rule(part["kind"], part["arguments"], answer["texts"][0]) for part in question.measured["instructions"]]
            for question, answer in zip(questions, answers, strict=True)
        ]
        prompts = [question.id for question, of_one in zip(questions, kept, strict=True) for _ in of_one]
        figures[f"prompts with every instruction followed, {how}"] = _share([all(of_one) for of_one in kept])
        figures[f"instructions followed, {how}"] = _share([one for of_one in kept for one in of_one], prompts)
    return figures


def gsm8k(questions: Sequence[Question], answers: Sequence[Answer]) -> Figures:
    """Exact match of the answer's last number, or the one after '####' (Cobbe et al. 2021, arXiv:2110.14168)."""
    return {
        "questions with the right number": _share(
            [
                last_number(answer["texts"][0]) == Decimal(question.measured["number"])
                for question, answer in zip(questions, answers, strict=True)
            ]
        )
    }


def last_number(text: str) -> Decimal | None:
    """The final number of an answer: the one after its last '####' if any, else the last number."""
    marked = text.rpartition("####")
    numbers = _NUMBER.findall(marked[2])
    if not numbers:
        return None
    return Decimal((numbers[0] if marked[1] else numbers[-1]).replace(",", "").replace("$", ""))


def truthfulqa(questions: Sequence[Question], answers: Sequence[Answer]) -> Figures:
    """MC1 and MC2 (Lin et al. 2022, arXiv:2109.07958; sylinrl/TruthfulQA, truthfulqa/models.py, MC_calcs)."""
    is_best, true_mass = [], []
    for question, answer in zip(questions, answers, strict=True):
        best, *others = answer["logprobs"]
        num_true = len(question.measured["true"])
        true, false = others[:num_true], others[num_true:]
        is_best.append(best > max(false))
        highest = max(others)
        masses = [sum(math.exp(one - highest) for one in part) for part in (true, false)]
        true_mass.append(masses[0] / sum(masses))
    low, high = bootstrap_interval(true_mass)
    ends = (None, None) if math.isnan(low) else (low, high)  # a single question gives no interval
    return {
        "questions whose best answer is likelier than every false one (MC1)": _share(is_best),
        "probability of the true answers among all given ones (MC2)": Measure(
            sum(true_mass) / len(true_mass), *ends, len(true_mass)
        ),
    }


def refusals(questions: Sequence[Question], answers: Sequence[Answer]) -> Figures:
    """Outcomes of answers to harmless and harmful prompts, by the classifier of `llamachat/answers/refusals.py`."""
    outcomes = outcome_classifier().outcomes([answer["texts"][0] for answer in answers])
    figures: Figures = {}
    for kind, is_harmful in (("harmless", False), ("harmful", True)):
        of_kind = [
            outcome for question, outcome in zip(questions, outcomes, strict=True) if question.is_harmful == is_harmful
        ]
        if of_kind:
            figures |= {f"{kind} prompts {_DONE[one]}": _share([named == one for named in of_kind]) for one in OUTCOMES}
    return figures


def _counted(kind: str, complied: int, partly: int, refused: int) -> dict[str, float]:
    total = complied + partly + refused
    counts = {"complied": complied, "partly_refused": partly, "refused": refused}
    return {f"{kind} prompts {_DONE[name]}": count / total for name, count in counts.items()}


SETS: Mapping[str, BenchmarkSet] = {
    "coconot": BenchmarkSet(
        title="CoCoNot, contrast set", files=("data/borderline/coconot_contrast.jsonl.gz",), figures=refusals
    ),
    "gsm8k": BenchmarkSet(title="GSM8K, without examples", files=("data/benchmarks/gsm8k.jsonl.gz",), figures=gsm8k),
    "ifeval": BenchmarkSet(
        title="IFEval",
        files=("data/benchmarks/ifeval.jsonl.gz",),
        figures=ifeval,
        left_out="prompts that ask for another language than English are left out",
    ),
    "mt_bench": BenchmarkSet(
        title="MT-Bench's questions (this is no MT-Bench score)",
        files=("data/benchmarks/mt_bench.jsonl.gz",),
        figures=None,
        asks="two turns",
    ),
    "truthfulqa": BenchmarkSet(
        title="TruthfulQA, multiple choice",
        files=("data/benchmarks/truthfulqa.jsonl.gz",),
        figures=truthfulqa,
        asks="choices",
    ),
    "xstest": BenchmarkSet(
        title="XSTest, the half that nothing here is trained on",
        files=("data/borderline/xstest_safe.jsonl.gz", "data/borderline/xstest_unsafe_twins.jsonl.gz"),
        figures=refusals,
        # Human labels of its answers to these prompts (Roettger et al. 2024, arXiv:2308.01263; github.com/paul-rottger/
        # exaggerated-safety, commit d7bb5bd7, evaluation/automated_evaluation_labels, column final_label).
        published={
            "Llama-2-70b-chat": _counted("harmless", 80, 19, 23) | _counted("harmful", 0, 2, 96),
            "Llama-2-70b-chat, Meta's first system text": _counted("harmless", 53, 22, 47)
            | _counted("harmful", 0, 1, 97),
        },
    ),
}
