"""`llamachat benchmark`: run the same question sets on several policies and print one table.

Writes next to each artifact, under the first characters of its digest: `benchmark/<digest>/answers/`, a file for each
part of a set, and `benchmark/<digest>/<set>.json`, which the table, the model card and the report read. A killed
command resumes after its last complete part; a finished one samples nothing again.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count
from typing import Any

from evaluation.benchmark.asking import Respondent
from evaluation.benchmark.sets import SETS, Answer, Question
from evaluation.report.benchmarks import table_text
from llamachat.answers.cache import StepCache
from llamachat.answers.session import free_memory
from llamachat.chat_format.dialog import DialogError, Message
from llamachat.errors import UsageError
from llamachat.maths.intervals import proportion_interval
from llamachat.models.loading import load_policy
from llamachat.models.reward_model import RewardModel, load_reward_model
from llamachat.runs.artifacts import Artifact
from llamachat.runs.atomic import write_json
from llamachat.runs.fingerprints import fingerprint
from llamachat.runs.reader import Benchmark, Measure, benchmark_folder
from llamachat.training.progress import StepProgress

log = logging.getLogger(__name__)

_VERSION = 1  # raised when the same policy and question would give another answer
_PART = 128  # questions answered between two saves


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Which policies are benchmarked, and with which sets."""

    artifacts: Mapping[str, Artifact]  # by the name in the table
    sets: Sequence[str]
    max_new_tokens: int
    limit: int | None = None  # number of questions from the start of each file of a set
    judge: Artifact | None = None


@dataclass(frozen=True, slots=True)
class _SetAnswers:
    """One policy's answers to the questions of a set; None for those that did not fit."""

    questions: Sequence[Question]
    answers: Sequence[Answer | None]

    @property
    def answered(self) -> list[tuple[Question, Answer]]:
        pairs = zip(self.questions, self.answers, strict=True)
        return [(question, answer) for question, answer in pairs if answer is not None]


def chosen_sets(names: Sequence[str], *, has_judge: bool, num_policies: int) -> list[str]:
    """The sets with these names; without names, all that can be measured."""
    unknown = [name for name in names if name not in SETS]
    if unknown:
        raise UsageError(
            f"--set: {', '.join(unknown)}. No set is called so, and another is not bundled. The sets are {', '.join(SETS)}."
        )
    is_judged = "mt_bench" in names or (has_judge and not names)
    if is_judged and not (has_judge and num_policies > 1):
        raise UsageError(
            f"mt_bench: {num_policies} different policies and {'a' if has_judge else 'no'} judge. Its questions have no right"
            " answers: a judge says whose answers it prefers. Give two policies or more, and --judge with a reward model"
            " that none of them was trained against; or name other sets."
        )
    return [name for name in SETS if name in names or (not names and (is_judged or SETS[name].figures is not None))]


def run_benchmark(request: Request) -> str:
    """Sample and score answers, save the results and return the table."""
    read = {name: SETS[name].questions(request.limit) for name in request.sets}
    parts = {name: _parts(name, questions, request.max_new_tokens) for name, (questions, _) in read.items()}
    places = [place for of_set in parts.values() for place in of_set]
    done = sum(_cache(artifact).has(place) for artifact in request.artifacts.values() for place in places)
    set_answers: dict[str, dict[str, _SetAnswers]] = {}
    results: dict[str, dict[str, Benchmark]] = {}
    with StepProgress("benchmark", steps=len(places) * len(request.artifacts), done=done) as progress:
        steps = count(done + 1)
        for label, artifact in request.artifacts.items():
            set_answers[label] = _ask(
                artifact,
                parts,
                max_new_tokens=request.max_new_tokens,
                on_part=lambda name, of=label: progress.step(next(steps), f"{of}: {name}"),
            )
            results[label] = {
                name: _measured(name, of_set, read[name][1])
                for name, of_set in set_answers[label].items()
                if SETS[name].figures is not None
            }
            free_memory()
    if request.judge is not None and "mt_bench" in request.sets:
        _add_verdicts(request, request.judge, set_answers, results)
    for label, artifact in request.artifacts.items():
        for name, result in results[label].items():
            write_json(benchmark_folder(artifact) / f"{name}.json", result.model_dump(mode="json"))
    return table_text(results)


def _ask(
    artifact: Artifact,
    parts: Mapping[str, Mapping[str, Sequence[Question]]],
    *,
    max_new_tokens: int,
    on_part: Callable[[str], None],
) -> dict[str, _SetAnswers]:
    """One policy's answers by set; the policy is loaded only if some are not saved yet."""
    kept = _cache(artifact)
    respondent = cache(lambda: Respondent(load_policy(artifact.path, device="auto"), max_new_tokens=max_new_tokens))
    set_answers = {}
    for name, of_set in parts.items():
        answers: list[Answer | None] = []
        for place, questions in of_set.items():
            is_new = not kept.has(place)
            answers += kept.get_or_make(place, lambda of=SETS[name], part=questions: respondent().answers(of, part))
            if is_new:
                on_part(name)
        set_answers[name] = _SetAnswers([one for part in of_set.values() for one in part], answers)
    return set_answers


def _cache(artifact: Artifact) -> StepCache:
    return StepCache(benchmark_folder(artifact) / "answers")


def _parts(name: str, questions: Sequence[Question], max_new_tokens: int) -> dict[str, Sequence[Question]]:
    """Questions by part; the part's name has a fingerprint of all inputs of its answers except the policy."""
    parts = {}
    for start in range(0, len(questions), _PART):
        part = questions[start : start + _PART]
        longest = None if SETS[name].asks == "choices" else max_new_tokens
        identity = {"version": _VERSION, "max_new_tokens": longest, "questions": [asdict(one) for one in part]}
        parts[f"{name}-{start:04d}-{fingerprint(identity)[:8]}"] = part
    return parts


def _measured(name: str, set_answers: _SetAnswers, num_left_out: int) -> Benchmark:
    of_set, answered = SETS[name], set_answers.answered
    assert of_set.figures is not None, "the judge's set is measured elsewhere"
    figures = of_set.figures([one for one, _ in answered], [answer for _, answer in answered]) if answered else {}
    notes = [f"{num_left_out} {of_set.left_out}"] if num_left_out else []
    return Benchmark(title=of_set.title, figures=figures, published=of_set.published, notes=notes + _notes(set_answers))


def _notes(set_answers: _SetAnswers) -> list[str]:
    """Remarks on the figures."""
    notes = []
    if missing := sum(answer is None for answer in set_answers.answers):
        notes.append(f"{missing} questions that are too long for it are left out")
    finished = [one for _, answer in set_answers.answered for one in answer.get("finished", ())]
    if truncated := len(finished) - sum(finished):
        notes.append(f"{truncated} of {len(finished)} answers are truncated at --max-new-tokens or at its context")
    return notes


def _add_verdicts(
    request: Request,
    judge: Artifact,
    set_answers: Mapping[str, Mapping[str, _SetAnswers]],
    results: Mapping[str, dict[str, Benchmark]],
) -> None:
    """Measure how often the judge prefers each policy's answers to those of the first policy, turn by turn."""
    model = cache(lambda: load_reward_model(judge.path, device="auto"))
    (first, *others), title = request.artifacts, SETS["mt_bench"].title
    scores = {}
    for label, artifact in request.artifacts.items():
        place = f"mt_bench-scores-{fingerprint({'judge': judge.digest, 'answers': set_answers[label]['mt_bench'].answers})[:8]}"
        scores[label] = _cache(artifact).get_or_make(
            place,
            lambda of=set_answers[label]["mt_bench"]: [
                _scores(model(), *pair) for pair in zip(of.questions, of.answers, strict=True)
            ],
        )
    log.info("the judge is %s, %s", judge.manifest.step, judge.path)
    for label in others:
        figures = {}
        for turn, name in enumerate(("first", "second")):
            pairs = [
                (own[turn], other[turn])
                for own, other in zip(scores[label], scores[first], strict=True)
                if own is not None and other is not None
            ]
            if pairs:
                figures[f"{name} answers that the judge prefers to {first}'s"] = _wins(pairs)
        notes = [f"the judge is {judge.manifest.step}; a tie counts half, and an answer that it cannot read loses"]
        results[label]["mt_bench"] = Benchmark(
            title=title, figures=figures, notes=notes + _notes(set_answers[label]["mt_bench"])
        )


def _scores(model: RewardModel, question: Question, answer: Answer | None) -> list[float | None] | None:
    """The judge's score of each turn's answer, None if it is too long; None overall if the question was not asked."""
    if answer is None:
        return None
    dialog: list[Message] = []
    scores: list[float | None] = []
    for turn_text, text in zip((question.text, question.measured["follow_up"]), answer["texts"], strict=True):
        dialog += [Message("user", turn_text), Message("assistant", text)]
        try:
            scores.append(model.score([dialog])[0])
        except DialogError:
            scores.append(None)
    return scores


def _wins(pairs: Sequence[tuple[Any, Any]]) -> Measure:
    """Share of pairs whose first score is higher; None ranks below every score."""
    lowest = float("-inf")
    wins = []
    for own, other in pairs:
        ours, theirs = (lowest if score is None else score for score in (own, other))
        wins.append(0.5 if ours == theirs else float(ours > theirs))
    low, high = proportion_interval(wins)
    return Measure(sum(wins) / len(wins), low, high, len(wins))
