"""Which policy is recommended, in which order policies stand, and what is said of it."""

from pathlib import Path
from typing import Any

import pytest

from llamachat.runs.choice import best_first, is_run, recommend, recommended_policy
from llamachat.runs.reader import Evaluation
from tests.evaluation.report.tiny_report import TinyRun, measure


def evaluation_of(**policies: dict[str, Any]) -> Evaluation:
    """Policies by their figures, the first of them the reference; an underscore stands for a slash in names."""
    figures = {
        name: {key.replace("__", "/"): one for key, one in of_policy.items()} for name, of_policy in policies.items()
    }
    return Evaluation.model_validate(
        {"reference": next(iter(policies)), "policies": list(policies), "figures": figures}
    )


def policy(judge: float | None, *, answered: float = 0.9, reach: float = 0.1) -> dict[str, Any]:
    difference = {} if judge is None else {"difference__judge": measure(judge, reach)}
    return difference | {"harmless__complied": measure(answered, 0.02), "ordinary__complied": measure(answered, 0.02)}


@pytest.mark.parametrize(
    ("rs", "ppo", "expected", "not_taken"),
    [
        (policy(0.3), policy(0.9) | {"commonest_answer": measure(0.4)}, "rs", {"ppo"}),
        (policy(0.3), policy(0.9) | {"commonest_answer": measure(0.2)}, "ppo", set()),
        (policy(0.3), policy(0.4), "ppo", set()),
        (policy(0.0), policy(-0.05), "ppo", set()),  # its interval holds 0
        (policy(0.3), policy(0.15), "ppo", set()),  # the intervals overlap
        (policy(0.4), policy(0.15), "rs", {"ppo"}),  # above sft, but below rs
        (policy(0.3), policy(-0.4), "rs", {"ppo"}),
        (policy(-0.3), policy(-0.4), "sft", {"rs", "ppo"}),
        (policy(None), policy(None), "ppo", set()),
        (policy(0.3), policy(0.9, answered=0.3), "rs", {"ppo"}),  # the judge loves refusals
        (policy(0.3), policy(0.9, answered=0.5), "ppo", set()),
    ],
)
def test_the_last_policy_that_the_judge_does_not_rate_below_another_and_that_answers(
    rs: dict[str, Any], ppo: dict[str, Any], expected: str, not_taken: set[str]
) -> None:
    choice = recommend(evaluation_of(sft=policy(None) | {"commonest_answer": measure(0.1)}, rs=rs, ppo=ppo))
    assert choice.policy == expected and set(choice.passed_over) == not_taken
    assert all(f"not {name}: " in choice.words for name in not_taken)


def test_a_policy_that_always_refuses_or_says_one_thing_comes_last_whatever_its_scores() -> None:
    evaluation = evaluation_of(
        sft=policy(None),
        refuses=policy(2.0, answered=0.0) | {"harmful__refused": measure(1.0)},
        rs=policy(-0.5),
        says_ok=policy(3.0, answered=0.0) | {"commonest_answer": measure(1.0)},
        ppo=policy(0.2),
        gatt=policy(1.0, answered=0.1),
    )
    assert best_first(evaluation) == ["ppo", "sft", "rs", "gatt", "says_ok", "refuses"]
    assert recommend(evaluation).policy == "ppo"
    assert (
        "it answers 0% of harmless prompts, and sft 90%"
        in recommend(evaluation_of(sft=policy(None), refuses=policy(2.0, answered=0.0))).words
    )


def test_a_runs_policy_is_chosen_by_its_evaluation(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny").add("sft", "rs", "ppo")
    policy, why = recommended_policy(run.folder) or pytest.fail("there are policies")
    assert policy.manifest.step == "ppo" and "no evaluation" in why
    run.add("eval")  # the judge: rs -0.03 +- 0.04, ppo -0.2 +- 0.04
    policy, why = recommended_policy(run.folder) or pytest.fail("there are policies")
    assert policy.manifest.step == "rs"
    assert (
        "(-0.03 [-0.07, +0.01] over sft)" in why
        and "not ppo: the judge rates it below sft (-0.20 [-0.24, -0.16])" in why
    )
    run.add("gatt")  # later than the evaluation
    policy, why = recommended_policy(run.folder) or pytest.fail("there are policies")
    assert policy.manifest.step == "rs" and "not evaluated: gatt" in why
    assert is_run(run.folder) and not any(map(is_run, (run.folder / "rs", policy.path, tmp_path / "none")))
    assert recommended_policy(tmp_path / "none") is None
