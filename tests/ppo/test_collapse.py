"""What counts as a collapse, by hand and by simulation, and that a collapsed policy is never published."""

import logging
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

import ppo
from llamachat.answers.evaluation import Evaluation
from llamachat.runs.record import MetricsRecord
from ppo import train as train_module
from ppo.collapse import change_figures, collapses
from ppo.config import CollapseGuard
from tests.ppo.tiny_ppo import config_of, inputs_of

GUARD = CollapseGuard()


def evaluation(texts: Sequence[str], tokens: Sequence[int] | None = None) -> Evaluation:
    zeros = [0.0] * len(texts)
    return Evaluation(
        texts=list(texts),
        tokens=list(tokens or [10] * len(texts)),
        finished=[True] * len(texts),
        helpfulness=None,
        safety=None,
        judge=None,
        combined=zeros,
        standardised=zeros,
        unsafe=[False] * len(texts),
        ranked=zeros,
        closed=[True] * len(texts),
    )


def answers(seed: int, n: int, *, words: int = 20, vocabulary: int = 400, length: float = 1.0) -> Evaluation:
    """Different answers of random words, with random lengths around `words` times `length`."""
    rng = np.random.default_rng(seed)
    sizes = np.maximum(1, rng.gamma(3.0, words * length / 3.0, n)).astype(int)
    texts = [" ".join(f"w{number}" for number in rng.integers(0, vocabulary, size)) for size in sizes]
    return evaluation(texts, [int(size) for size in sizes])


def with_equal(start: Evaluation, count: int) -> Evaluation:
    """The answers with the first `count` replaced by one sentence in different spellings."""
    same = ["I am not sure.", "i am NOT sure", "I am not sure!"]
    return evaluation([*(same[k % 3] for k in range(count)), *start.texts[count:]], start.tokens)


def faults(now: Evaluation, start: Evaluation, **bounds: float) -> list[str]:
    """The keys of the bounds that are crossed."""
    keys = ("commonest_answer", "distinct_2", "shortest", "longest")
    sentences = collapses(now, start, CollapseGuard(**bounds))
    return [key for text in sentences for key in keys if f"({key}:" in text]


def test_figures_against_iteration_0_by_hand() -> None:
    start = evaluation(["a b c", "a b d"], [30, 50])  # pairs: a b, b c, a b, b d: 3 of 4
    now = evaluation(["a b", "A  b."], [10, 10])  # a b, A b.: 2 of 2, and one answer to a reader
    assert change_figures(now, start) == {"distinct_2_ratio": pytest.approx(4 / 3), "length_ratio": 0.25}
    assert start.figures()["commonest_answer"] == 0.5 and now.figures()["commonest_answer"] == 1.0


def test_equal_answers_are_a_collapse_from_the_number_that_chance_does_not_reach() -> None:
    start = answers(0, 128)  # the commonest answer of different ones stands for 1 of 128
    # 3 standard errors of 12/128 - 1/128 are 0.0807 < 0.0859, of 11/128 - 1/128 0.0780 < 0.0781, of 10/128 0.0752 > 0.0703.
    assert faults(with_equal(start, 10), start) == []
    assert faults(with_equal(start, 11), start) == faults(with_equal(start, 12), start) == ["commonest_answer"]
    assert faults(with_equal(start, 12), start, commonest_answer=0.1) == []
    few = answers(0, 8)
    assert faults(with_equal(few, 3), few) == [] and faults(with_equal(few, 8), few)[0] == "commonest_answer"
    # Many refusals alike at the start are no collapse of what comes later.
    refusing = with_equal(start, 30)
    assert faults(with_equal(answers(1, 128), 35), refusing) == []


@pytest.mark.parametrize(("length", "expected"), [(0.4, ["shortest"]), (0.9, []), (1.3, []), (3.0, ["longest"])])
def test_lengths_past_a_bound_are_a_collapse(length: float, expected: list[str]) -> None:
    start, now = answers(0, 64, vocabulary=10_000), answers(1, 64, vocabulary=10_000, length=length)
    assert faults(now, start) == expected
    assert faults(now, start, shortest=0.0, longest=1e9) == []


def test_few_words_are_a_collapse() -> None:
    start, now = answers(0, 64, vocabulary=400), answers(1, 64, vocabulary=20)
    assert faults(now, start) == ["distinct_2"] and faults(now, start, distinct_2=0.0) == []
    assert faults(answers(1, 64, vocabulary=300), start) == []


@pytest.mark.parametrize("n", [8, 16, 64])
def test_the_same_policy_again_crosses_no_bound_by_chance(n: int) -> None:
    crossed = sum(
        bool(faults(answers(2 * k, n, vocabulary=60), answers(2 * k + 1, n, vocabulary=60))) for k in range(200)
    )
    assert crossed <= 4, "200 evaluations of a policy that did not change"


def test_distinct_2_is_compared_with_its_spread_over_samples() -> None:
    """A fall of z deviations over many samples is found as often as a normal variable is above 3 - z.

    Or less often, since the jackknife's variance is not below the true one (Efron and Stein 1981).
    """

    def distinct(one: Evaluation) -> float:
        pairs = [pair for text in one.texts for pair in pairwise(text.split())]
        return len(set(pairs)) / len(pairs)

    falls = []
    for vocabulary in (300, 150, 110, 80):
        samples = [(answers(k, 40), answers(1000 + k, 40, vocabulary=vocabulary)) for k in range(150)]
        changes = [distinct(start) - distinct(now) for start, now in samples]
        falls.append(float(np.mean(changes) / np.std(changes)))
        share = np.mean([faults(now, start, distinct_2=1.0) == ["distinct_2"] for start, now in samples])
        assert NormalDist().cdf(falls[-1] / 1.5 - 3.0) - 0.1 < share < NormalDist().cdf(falls[-1] - 3.0) + 0.1
    assert falls[0] < 1.0 and falls[-1] > 3.5, falls


def test_a_collapsed_policy_ends_the_training_and_is_not_published(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the second evaluation on, all answers are one, which scores best of all."""
    plain, calls = train_module.evaluate, 0

    def collapsing(session: Any, prompts: Any, constants: Any, row_tokens: int) -> Any:
        nonlocal calls
        evaluation, constants = plain(session, prompts, constants, row_tokens)
        calls += 1  # 1 and 2 are the start on validation and test prompts, 3 is iteration 1
        if calls in (3, 4):
            high = len(evaluation.texts) if calls == 4 else 7
            scores = [100.0] * high + [-100.0] * (len(evaluation.texts) - high)
            texts = ["the same"] * len(evaluation.texts) if calls == 4 else evaluation.texts
            evaluation = Evaluation(**{**as_dict(evaluation), "ranked": scores, "texts": texts})
        return evaluation, constants

    monkeypatch.setattr(train_module, "evaluate", collapsing)
    changes: dict[str, Any] = {"iterations": 5, "validation_every": 1, "validation_prompts": 8}
    with caplog.at_level(logging.WARNING):
        artifact = ppo.run(config_of(**changes), inputs_of(tmp_path, base))
    details = artifact.manifest.details
    assert details["end"] == "collapse_guard" and details["iteration"] == 1
    assert "ppo.collapse_guard" in caplog.text and "8 of 8 answers are identical" in caplog.text
    rows = MetricsRecord(artifact.path.parent / "metrics.jsonl").read()
    assert rows[-1]["step"] == 2 and rows[-1]["ppo/heldout/commonest_answer"] == 1.0
    assert rows[0]["ppo/heldout/length_ratio"] == rows[0]["ppo/heldout/distinct_2_ratio"] == 1.0
    calls = 0
    changes["collapse_guard"] = None
    artifact = ppo.run(config_of(**changes), inputs_of(tmp_path, base, run="two"))
    assert artifact.manifest.details["end"] == "iterations" and artifact.manifest.details["iteration"] == 2


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    return {name: getattr(evaluation, name) for name in Evaluation.__dataclass_fields__}
