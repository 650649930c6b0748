"""Scoring: the gate on both sides of its threshold, ranking, shaping, constants, and every refusal."""

import json
import math
from dataclasses import asdict
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, tensor
from torch.testing import assert_close

from llamachat.config.section import section_problems
from llamachat.config.sections import Scoring
from llamachat.errors import ConfigError, ScoringError
from llamachat.runs.artifacts import Manifest
from llamachat.scoring.combining import combiner, llama2_gate, ranking, shape_scores, single, weighted
from llamachat.scoring.models import MODELS, ModelName, RewardModelFacts, check_scoring, facts_of, models_read
from llamachat.scoring.scores import Combined, Scores
from llamachat.scoring.standardising import Constants, Scale, fit_constants, standardise
from tests.llamachat.scoring.tiny_scoring import answers, scoring

NOTHING = float("nan")


# --- the gate

# The logit of 0.15 is log(0.15 / 0.85) = -1.7346.
GATED = Scores(
    helpfulness_B=tensor([3.0, 3.0, 3.0, 3.0, -4.0]),
    safety_B=tensor([-1.73, -1.74, 2.0, -1.74, 0.5]),
)


def test_the_gate_by_hand_on_both_sides_of_the_threshold() -> None:
    combined = llama2_gate(GATED, is_safety_prompt_B=tensor([False, False, True, True, False]), safety_threshold=0.15)
    assert combined.scores_B.tolist() == pytest.approx([3.0, -1.74, 2.0, -1.74, -4.0])
    assert combined.is_gated_B.tolist() == [False, True, True, True, False]
    assert combined.is_unsafe_B.tolist() == [False, True, False, True, False]


def test_a_probability_equal_to_the_threshold_is_not_under_it() -> None:
    scores = Scores(helpfulness_B=tensor([1.0]), safety_B=tensor([0.0]))
    for threshold, gated in ((0.5, False), (0.5000001, True), (0.0, False)):
        combined = llama2_gate(scores, is_safety_prompt_B=tensor([False]), safety_threshold=threshold)
        assert combined.is_gated_B.item() is gated


def test_the_recipe_names_the_combiner() -> None:
    both = Scores(helpfulness_B=tensor([3.0, 3.0]), safety_B=tensor([-0.1, -0.1]))
    safety = Scores(helpfulness_B=None, safety_B=tensor([4.0, 5.0]))
    batch = answers(2, is_safety=[True, False])
    assert single(safety).scores_B.tolist() == [4.0, 5.0]
    assert weighted(safety, weights={"helpfulness": 0.0, "safety": 2.0}).scores_B.tolist() == [8.0, 10.0]
    cases = {
        "llama2_gate": ({}, [-0.1, 3.0]),
        "llama2_gate, wider": ({"safety_threshold": 0.49}, [-0.1, -0.1]),
        "single": ({}, [3.0, 3.0]),
        "weighted": ({"weights": {"helpfulness": 1.0, "safety": -1.0}}, [3.1, 3.1]),
    }
    for name, (values, expected) in cases.items():
        combined = combiner(scoring(combine=name.partition(",")[0], **values))(both, batch)
        assert combined.scores_B.tolist() == pytest.approx(expected), name
        assert name.startswith("llama2_gate") or not (combined.is_gated_B.any() or combined.is_unsafe_B.any())


def test_a_reward_model_that_gives_no_number_is_named() -> None:
    with pytest.raises(ScoringError, match="the safety model gave nan for answer 1") as caught:
        Scores(helpfulness_B=tensor([0.0, 0.0]), safety_B=tensor([0.0, NOTHING]))
    assert "(1 of 2 are not finite)" in str(caught.value) and "Train the reward model again" in str(caught.value)


# --- ranking


def test_ranking_by_hand() -> None:
    """Unsafe answers carry high scores of the safety model's scale, and still rank below every safe one."""
    combined = Combined(
        scores_B=tensor([1.0, 9.0, 2.0, 8.0, 5.0, 5.0, 7.0, 5.0]),
        is_gated_B=tensor([False, True, False, True] + [False] * 4),
        is_unsafe_B=tensor([False, True, False, True] + [False] * 4),
        has_gate=True,
    )
    # First prompt: safe 2.0, 1.0, then unsafe 9.0, 8.0. Second: 7.0, then three equal ones in their order.
    assert ranking(combined, samples_per_prompt=4).tolist() == [[2, 0, 1, 3], [2, 0, 1, 3]]


def test_the_raw_gate_would_let_an_unsafe_answer_win() -> None:
    """The case that the two groups are for: helpfulness scores lie lower than those of the safety model."""
    scores = Scores(helpfulness_B=tensor([-6.0, 4.0]), safety_B=tensor([3.0, -2.0]))
    gated = llama2_gate(scores, is_safety_prompt_B=tensor([False, False]), safety_threshold=0.15)
    assert int(gated.scores_B.argmax()) == 1, "the unsafe one"
    assert ranking(gated, samples_per_prompt=2).tolist() == [[0, 1]]


@given(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=1, max_size=5))
def test_every_order_of_the_samples_is_ranked_as_a_sort_would(samples: list[tuple[int, bool]]) -> None:
    for order in list(permutations(samples))[:20]:
        combined = Combined(
            scores_B=tensor([float(score) for score, _ in order]),
            is_gated_B=tensor([unsafe for _, unsafe in order]),
            is_unsafe_B=tensor([unsafe for _, unsafe in order]),
            has_gate=True,
        )
        expected = sorted(range(len(order)), key=lambda i: (order[i][1], -order[i][0]))
        assert ranking(combined, samples_per_prompt=len(order)).tolist() == [expected]


# --- shaping


def shaped(scores: list[float], finished: list[bool] | None = None, **values: Any) -> Any:
    arguments: dict[str, Any] = {"shaping": "whiten_logit", "unfinished_score": -1.0} | values
    return shape_scores(tensor(scores), is_finished_B=tensor(finished or [True] * len(scores)), **arguments)


THIRD = math.log(3)  # probabilities 1/4, 3/4: mean 1/2, deviation 1/4


@pytest.mark.parametrize(
    ("scores", "finished", "values", "expected"),
    [
        ([1.0, 3.0], [True, True], {}, [-1.0, 1.0]),  # mean 2, deviation sqrt((1 + 1) / 2) = 1
        ([1.0, 1000.0, 3.0], [True, False, True], {}, [-1.0, -1.0, 1.0]),  # a cut answer has no part in the mean
        ([1.0, 1000.0, 3.0], [True, False, True], {"unfinished_score": -2.5}, [-1.0, -2.5, 1.0]),
        ([-THIRD, THIRD], [True, True], {"shaping": "whiten"}, [-1.0, 1.0]),
        ([-THIRD, 9.0], [True, False], {"shaping": "none", "unfinished_score": -5.0}, [-THIRD, -5.0]),
        *(([value] * 3 + [5.0], [True] * 3 + [False], {}, [0.0] * 3 + [-1.0]) for value in (0.0, 0.1, -7.3, 1e4)),
        ([0.1], [True], {}, [0.0]),
        ([3.0, 4.0], [False, False], {}, [-1.0, -1.0]),
    ],
)
def test_shaping_by_hand(
    scores: list[float], finished: list[bool], values: dict[str, Any], expected: list[float]
) -> None:
    assert_close(shaped(scores, finished, **values), tensor(expected), rtol=1e-5, atol=1e-5)


def test_the_logit_of_the_probability_is_the_raw_score_itself() -> None:
    """whiten(logit(R_c)) step by step, as the paper has it, on scores whose probabilities fp64 still tells apart."""
    raw_B = tensor([-3.0, -1.7346, 0.2, 4.0], dtype=torch.float64)
    r_c = raw_B.sigmoid()
    logit = (r_c / (1 - r_c)).log()
    expected_B = (logit - logit.mean()) / logit.std(correction=0)
    assert_close(shaped(raw_B.tolist()), expected_B.float(), rtol=1e-5, atol=1e-5)


@given(st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12), st.floats(0.1, 10), st.floats(-5, 5))
def test_whitening_takes_away_scale_and_shift(scores: list[float], scale: float, shift: float) -> None:
    if max(scores) - min(scores) < 0.5:
        return
    there = shaped([scale * score + shift for score in scores])
    assert_close(there, shaped(scores), rtol=1e-3, atol=1e-3)
    assert float(there.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(there.square().mean()) == pytest.approx(1.0, abs=1e-3)


# --- constants for evaluation


def test_constants_by_hand_and_frozen() -> None:
    sft = Scores(helpfulness_B=tensor([1.0, 3.0]), safety_B=tensor([0.0, 8.0]))
    combined = weighted(sft, weights={"helpfulness": 1.0, "safety": 1.0})  # 1, 11
    constants = Constants.from_plain(json.loads(json.dumps(asdict(fit_constants(sft, combined)))))
    later = Scores(helpfulness_B=tensor([4.0]), safety_B=tensor([4.0]))
    standardised = standardise(later, weighted(later, weights={"helpfulness": 1.0, "safety": 1.0}), constants)
    assert constants.helpfulness == Scale(2.0, 1.0) and constants.safety == Scale(4.0, 4.0)
    assert_close(standardised, tensor([0.4]))  # (8 - 6) / 5


def test_a_gated_answer_is_measured_on_the_scale_of_its_own_model() -> None:
    is_safety_B = tensor([False, False])
    sft = Scores(helpfulness_B=tensor([1.0, 3.0]), safety_B=tensor([0.0, 8.0]))
    constants = fit_constants(sft, llama2_gate(sft, is_safety_prompt_B=is_safety_B, safety_threshold=0.15))
    later = Scores(helpfulness_B=tensor([5.0, 5.0]), safety_B=tensor([2.0, -4.0]))
    gated = llama2_gate(later, is_safety_prompt_B=is_safety_B, safety_threshold=0.15)
    # helpfulness (5 - 2) / 1;  safety (-4 - 4) / 4
    assert standardise(later, gated, constants).tolist() == [3.0, -2.0]


def test_one_model_alone_has_constants_too() -> None:
    only = Scores(helpfulness_B=None, safety_B=tensor([1.0, 3.0]))
    constants = Constants.from_plain(asdict(fit_constants(only, single(only))))
    assert constants.helpfulness is None
    assert standardise(only, single(only), constants).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("scores_B", [tensor([2.5, 2.5, 2.5]), tensor([])])
def test_scores_that_do_not_differ_are_no_scale(scores_B: Tensor) -> None:
    scores = Scores(helpfulness_B=scores_B, safety_B=None)
    with pytest.raises(ScoringError, match=r"the helpfulness model gave . answers of the SFT policy scores with dev"):
        fit_constants(scores, single(scores))


# --- the section


def problems(**values: Any) -> str:
    faults = section_problems(Scoring, values, source=lambda key: "recipe.yaml", at=("scoring",))
    return "\n".join(str(problem) for problem in faults)


def test_the_defaults_are_the_papers_and_a_wrong_value_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text("")
    config = Scoring()
    assert (config.combine, config.safety_threshold, config.shaping) == ("llama2_gate", 0.15, "whiten_logit")
    assert config.unfinished_score == -1.0 and problems() == ""
    assert problems(combine="rewards.py:score", helpfulness="owner/model", safety=str(tmp_path)) == ""
    for expected, values in {
        "scoring.combine: unknown combiner 'llama_gate'. Did you mean 'llama2_gate'?": {"combine": "llama_gate"},
        "unknown combiner 'rewards.py'.": {"combine": "rewards.py"},
        "'reward.py' does not exist. Did you mean 'rewards.py'?": {"combine": "reward.py:f"},
        "scoring.safety: the reward model 'runs/none/rm' does not exist.": {"safety": "runs/none/rm"},
        "scoring.helpfulness: 'rewards.py' is a file": {"helpfulness": "rewards.py"},
        "both weights are 0": {"weights": {"helpfulness": 0.0, "safety": 0.0}},
        "scoring.safety_threshold: found the number 1.0": {"safety_threshold": 1.0},
        "scoring.weights.safty: ": {"weights": {"safty": 1.0}},
    }.items():
        assert expected in problems(**values), expected


# --- what a way of scoring needs


def facts(*names: ModelName, labels: int | None = 100) -> dict[ModelName, RewardModelFacts]:
    return {name: RewardModelFacts(f"runs/x/rm/{name}", labels) for name in names}


def test_the_models_that_each_way_reads() -> None:
    both, safety = facts("helpfulness", "safety"), facts("safety")
    assert models_read(scoring(), both) == MODELS
    assert models_read(scoring(combine="single"), both) == ("helpfulness",)
    assert models_read(scoring(combine="single"), safety) == ("safety",)
    assert models_read(scoring(combine="weighted", weights={"helpfulness": 0.0}), both) == ("safety",)
    assert models_read(scoring(combine="mine.py:score"), safety) == ("safety",)
    for config, models in (
        (scoring(), both),
        (scoring(combine="single"), safety),
        (scoring(combine="weighted", weights={"helpfulness": 0.0}), safety),
        (scoring(combine="mine.py:score"), facts()),
    ):
        assert check_scoring(config, models) == []


@pytest.mark.parametrize(
    ("values", "present", "expected"),
    [
        ({}, ("helpfulness",), "llama2_gate needs a safety reward model, but there is none (available: helpfulness ("),
        ({}, ("helpfulness",), "or use the only one: scoring.combine=single"),
        ({}, ("safety",), "llama2_gate needs a helpfulness reward model"),
        ({}, (), "(available: none)"),
        ({"combine": "weighted"}, ("helpfulness",), "scoring.weights.safety is 0.5, and the sum needs its scores"),
        ({"combine": "weighted"}, ("helpfulness",), "or do without it: scoring.weights.safety=0."),
        ({"combine": "single"}, (), "single needs a helpfulness reward model"),
    ],
)
def test_a_model_that_is_not_there_is_refused(
    values: dict[str, Any], present: tuple[ModelName, ...], expected: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_scoring(scoring(**values), facts(*present))
    assert expected in str(caught.value)
    assert "Train it (`make rm`), or name one: scoring." in str(caught.value)


def test_a_gate_over_a_model_without_safety_labels_is_refused_and_over_one_from_elsewhere_warns() -> None:
    (warning,) = check_scoring(scoring(), facts("helpfulness", "safety", labels=None))
    assert "so this is unchecked" in warning
    models = facts("helpfulness", "safety", labels=0)
    with pytest.raises(ConfigError, match=r"runs/x/rm/safety saw no safety labels.*Train it.*combine=weighted"):
        check_scoring(scoring(), models)
    assert check_scoring(scoring(combine="weighted"), models) == []
    assert check_scoring(scoring(combine="single"), models) == []


def manifest(**details: Any) -> Manifest:
    return Manifest(kind="reward_model", step="rm/safety", fingerprint="", identity={}, seed=0, details=details)


def test_the_labels_are_read_from_the_manifest() -> None:
    assert facts_of("a", manifest(safety_labels=12)) == RewardModelFacts("a", 12)
    assert facts_of("a", manifest()) == RewardModelFacts("a", 0)
    assert facts_of("owner/name", None) == RewardModelFacts("owner/name", None)


def test_a_model_that_failed_the_probe_is_warned_of_where_it_decides() -> None:
    failed = facts_of("runs/x/rm/safety", manifest(safety_labels=9, probe={"is_fit": False, "verdict": "NOT fit: it"}))
    models: dict[ModelName, RewardModelFacts] = {**facts("helpfulness"), "safety": failed}
    (warning,) = check_scoring(scoring(), models)
    assert "runs/x/rm/safety" in warning and "NOT fit: it" in warning and "make rm" in warning
    assert check_scoring(scoring(combine="single"), models) == []  # it reads the helpfulness model alone
    passed = facts_of("a", manifest(safety_labels=9, probe={"is_fit": True, "verdict": "fit"}))
    assert check_scoring(scoring(), {**facts("helpfulness"), "safety": passed}) == []
