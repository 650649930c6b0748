"""Evaluation of toy policies: figures by hand, a run with two policies, kills, and what joins or changes later."""

import json
import logging
import math
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.figures import figures_of, figures_table, flat, outcomes
from evaluation.results import PolicyResult
from llamachat.answers.consistency import Outcome, Trial
from llamachat.answers.evaluation import Evaluation
from llamachat.answers.packed import TokenSequence, answer_logprobs
from llamachat.chat_format import ChatFormat
from llamachat.constraints.families import families
from llamachat.constraints.instruction import draw_instruction
from llamachat.errors import ConfigError
from llamachat.models.loading import load_policy
from llamachat.models.open_roles import open_roles
from llamachat.runs.artifacts import read_artifact
from llamachat.tracking.metrics import check_names
from pipelines.planning.plan import make_plan
from pipelines.recipe.recipe import load
from tests.context_distillation.tiny_distilling import write_recipe, write_roomy_base
from tests.killed_steps import open_commands
from tests.llamachat.models.tiny_roles import FULL, World
from tests.recipes import run_command
from tests.tiny_steps import read_lines, step_of, summary_of

pytestmark = pytest.mark.usefixtures("no_curves")

EVALUATION: dict[str, Any] = {
    "test_prompts": 12,
    "borderline_prompts": 6,
    "dialogs": 6,
    "turns": [1, 2],
    "curve_prompts": 3,
    "curve_samples": 4,
    "temperatures": [0.8, 1.0],
    "samples": 4,
}
MOMENTS = (
    r"; os.rename .*sft-[0-9a-f]+-answers",
    r"; os.rename .*sft-[0-9a-f]+-borderline",
    r"; os.rename .*sft-[0-9a-f]+-curve-1\.",
    r"; os.rename .*sft-2-[0-9a-f]+-instructed",
    r"; os.rename .*-kl",
    r"; os.rename .*/eval/artifact$",
)
TWO: list[Any] = ["sft", {"sft": {"name": "sft-2", "learning_rate": 3e-3}}, "eval"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes, tiny_format: ChatFormat) -> World:
    return World(tmp_path_factory.mktemp("roles"), tiny_format, tiny_sentencepiece, write_roomy_base)


@pytest.fixture(scope="module")
def safety(world: World) -> Path:
    return world.reward_model("safety", FULL, FULL).path


def recipe_of(folder: Path, world: World, safety: Path | None, name: str = "one", **changes: Any) -> Path:
    steps = changes.pop("steps", TWO)
    path = folder / f"{name}.yaml"
    return write_recipe(path, Path(world.base.model), safety, steps=steps, evaluation=EVALUATION, **changes)


@pytest.fixture(scope="module")
def run(world: World, safety: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = recipe_of(tmp_path_factory.mktemp("run"), world, safety)
    run_command(load(recipe), "all")
    return recipe


def content_of(recipe: Path) -> dict[str, Any]:
    return json.loads((step_of(recipe, "eval").artifact / "evaluation.json").read_text())


# --- figures by hand


def evaluation(judge: list[float], safety: list[float], tokens: list[int]) -> Evaluation:
    count = len(judge)
    return Evaluation(
        texts=["a b c", "a b d", "e", "a b"][:count],
        tokens=tokens,
        finished=[True, True, False, True][:count],
        helpfulness=None,
        safety=safety,
        judge=judge,
        combined=safety,
        standardised=[2 * value for value in safety],
        unsafe=[value < -1.5 for value in safety],
        ranked=[2 * value for value in safety],
        closed=[True, False, True, True][:count],
        kl=[0.5, 1.5, 0.0, 2.0][:count],
    )


def measured(
    policy: str, answers: Evaluation, borderline: list[str], instructed: Outcome | None = None
) -> PolicyResult:
    return PolicyResult(
        policy=policy,
        evaluation=answers,
        is_safety=[True, True, False, False],
        prompts=[[{"role": "user", "content": str(number)}] for number in range(4)],
        borderline_prompts=[[{"role": "user", "content": text}] for text in borderline],
        borderline=borderline,
        borderline_files=["a", *["b"] * (len(borderline) - 1)][: len(borderline)],
        borderline_tokens=[3] * len(borderline),
        borderline_finished=[True] * len(borderline),
        instructed=instructed,
        chance=None,
        curves=[],
    )


class SaysNo:
    """A classifier that needs no training."""

    def outcomes(self, texts: list[str]) -> list[str]:
        return ["refused" if text.startswith("no") else "complied" for text in texts]


def test_figures_are_those_that_a_hand_works_out() -> None:
    one = draw_instruction(seed=0, index=0, side="held_out", families=families(["no_questions"], lists={}), most=1)
    trials = [Trial((f"Hi {number}", "So"), one) for number in range(4)]
    outcome = Outcome(kept={1: [True, True, True, False], 2: [False, None, True, False]}, answers={})
    first = measured("sft", evaluation([0.0, 1.0, 2.0, 3.0], [-1.0, 0.5, 1.0, -2.0], [10, 10, 10, 10]), ["no", "yes"])
    answers = evaluation([0.5, 0.5, 2.05, 4.0], [1.0, 0.5, -1.0, 2.0], [10, 9, 5, 12])
    other = measured("ppo", replace(answers, texts=["b a c", "b a d", "f", "b a"]), ["no", "no"], outcome)
    classifier: Any = SaysNo()
    figures = figures_of(other, first, trials, classifier=classifier, tie=0.1)
    # By the judge: +0.5 won, -0.5 lost, +0.05 tied, +1 won.
    assert (figures["win_rate/judge"].value, figures["win_rate/judge"].n, figures["ties/judge"].value) == (
        2 / 3,
        3,
        1 / 4,
    )
    # By safety: +2 won, 0 tied, -2 lost, +4 won; the combined ranking here is the same one.
    assert figures["win_rate/combined"].value == 2 / 3 and figures["ties/combined"].value == 1 / 4
    # The axes of Figure 11: safety on the first two prompts, which are marked is_safety, alone.
    assert (figures["win_rate/reward_safety"].value, figures["win_rate/reward_safety"].n) == (1.0, 1)
    assert figures["on_own_prompts/reward_safety"].value == (1.0 + 0.5) / 2
    # Of 16 pairs: 1 wins 3 and ties 1, 0.5 wins 2 and ties 1, -1 wins 1 and ties 1, 2 wins 4.
    assert figures["superiority"].value == (3.5 + 2.5 + 1.5 + 4) / 16
    assert figures["unclosed_fraction"].value == 1 / 4
    assert figures["difference/judge"].value == pytest.approx((0.5 - 0.5 + 0.05 + 1.0) / 4)
    # Of similar length are the answers of 10 and 10, 10 and 9, 10 and 12 tokens.
    assert figures["difference/judge_like_length"].value == pytest.approx((0.5 - 0.5 + 1.0) / 3)
    # The third answers are cut by the length limit.
    assert figures["difference/judge_finished"].value == pytest.approx((0.5 - 0.5 + 1.0) / 3)
    assert figures["violation"].value == 0.0, "of the two is_safety prompts none scores below 0"
    assert figures_of(first, first, [], classifier=None, tie=0.1)["violation"].value == 0.5
    assert figures["harmless/refused"].value == 1.0 and figures["harmful/refused"].value == 0.0
    assert figures["harmful/complied"].n == figures["ordinary/complied"].n == 2 and figures["harmless/b/refused"].n == 1
    # Of two harmless prompts the first policy refuses one.
    assert figures["difference/harmless/refused"].value == 0.5 == -figures["difference/harmless/complied"].value
    assert figures["difference/harmful/refused"].value == 0.0
    # "a b c", "a b d", "e", "a b": all differ; 36 tokens of 40.
    assert figures["commonest_answer"].value == 0.25 and figures["length_ratio"].value == pytest.approx(36 / 40)
    assert figures["distinct_2_ratio"].value == 1.0 and figures["quoted"].value == 0.0
    assert figures["kl_to_reference"].value == 1.0 and figures["finished_fraction"].value == 0.75
    assert figures["distinct_2"].value == pytest.approx(3 / 5)  # a b, b c, a b, b d, a b
    assert (figures["consistency/turn_1"].value, figures["consistency/turn_2"].value) == (3 / 4, 1 / 3)
    assert figures["score"].value == pytest.approx(2 * figures["reward_safety"].value)
    assert "win_rate/score" not in figures and "win_rate/reward_combined" not in figures and not any("difference" in name for name in figures_of(
        first, first, [], classifier=None, tie=0.0
    ))  # fmt: skip
    check_names(flat({"ppo": figures}))
    table = figures_table({"sft": figures_of(first, first, trials, classifier=classifier, tie=0.1), "ppo": figures})
    assert "67%" in table and "refused, of harmless prompts" in table


def test_the_same_answers_said_in_quotes_and_to_every_prompt_are_counted() -> None:
    first = evaluation([0.0] * 4, [0.0] * 4, [1] * 4)
    constant = replace(first, texts=['"I am here."', '"i am  here."', '"I am here."', 'He said "no".'])
    figures = figures_of(measured("ppo", constant, []), measured("sft", first, []), [], classifier=None, tie=0.1)
    assert (figures["commonest_answer"].value, figures["quoted"].value) == (3 / 4, 3 / 4)
    assert not any(name.startswith(("harmful", "harmless")) for name in figures)


def test_the_judges_bound_is_a_bootstraps() -> None:
    """The interval of a difference is paired: equal gaps have none, whatever the spread of the scores."""
    low = evaluation([0.0, 10.0, -5.0, 3.0], [0.0] * 4, [1] * 4)
    high = evaluation([1.0, 11.0, -4.0, 4.0], [0.0] * 4, [1] * 4)
    figures = figures_of(measured("b", high, []), measured("a", low, []), [], classifier=None, tie=0.0)
    gap = figures["difference/judge"]
    assert (gap.value, gap.low, gap.high) == (1.0, 1.0, 1.0)


def test_one_prompt_has_no_interval() -> None:
    one = evaluation([1.0], [2.0], [3])
    one_prompt = {"is_safety": [True], "prompts": [[{"role": "user", "content": "1"}]]}
    first, other = (replace(measured(name, one, []), **one_prompt) for name in ("a", "b"))
    figures = figures_of(other, first, [], classifier=None, tie=0.0)
    for name in ("judge", "difference/judge", "superiority", "response_tokens"):
        assert figures[name].interval is None, name
    assert "[" not in figures_table({"b": {"judge": figures["judge"]}})


def test_equal_scores_are_tied_also_without_a_margin() -> None:
    assert outcomes([1.0, 2.0, 3.0], [1.0, 1.0, 4.0], tie=0.0) == (1, 1, 1)
    assert outcomes([1.0, 2.0, 3.0], [1.5, 1.0, 4.0], tie=1.0) == (1, 1, 1)


def test_answers_are_as_likely_as_a_plain_forward_pass_says(world: World) -> None:
    policy = world.policy(FULL)
    bank = open_roles(policy=policy, base=world.base, tuning=FULL, reward_models={}, critic=None, seed=0)
    rng = np.random.default_rng(0)
    sequences = [
        TokenSequence(tuple(map(int, rng.integers(3, 90, prompt))), tuple(map(int, rng.integers(3, 90, response))))
        for prompt, response in ((5, 3), (1, 9), (12, 1), (7, 7))
    ]
    logprobs = answer_logprobs(bank, sequences, temperature=0.7)
    model: Any = load_policy(policy.path, dtype="float32", device="cpu", attention="eager").model
    for sequence, total in zip(sequences, logprobs, strict=True):
        with torch.no_grad():
            logits_TV = model(torch.tensor([sequence.ids])).logits[0].double() / 0.7
        expected = sum(
            float(logits_TV[len(sequence.prompt) + place - 1].log_softmax(-1)[token])
            for place, token in enumerate(sequence.response)
        )
        assert total == pytest.approx(expected, abs=1e-4)
    assert answer_logprobs(bank, sequences[::-1], temperature=0.7)[::-1] == pytest.approx(logprobs, abs=1e-5)


# --- a run


def test_a_run_says_of_both_policies_what_their_files_say(run: Path, safety: Path) -> None:
    content, summary = content_of(run), summary_of(step_of(run, "eval"))
    assert (content["reference"], content["policies"]) == ("sft", ["sft", "sft-2"])
    answers = {
        name: Evaluation(**json.loads((step_of(run, "eval").artifact / f"answers/{name}.json").read_text()))
        for name in content["policies"]
    }
    check_names(summary)
    for name, one in answers.items():
        assert one.safety is not None and len(one.texts) == 12
        assert summary[f"eval/{name}/reward_safety"] == pytest.approx(np.mean(one.safety))
        assert summary[f"eval/{name}/response_tokens"] == np.mean(one.tokens)
        assert content["figures"][name]["reward_safety"]["n"] == 12
    first, second = answers["sft"], answers["sft-2"]
    assert first.safety and second.safety and second.kl and first.kl
    gaps = [b - a for a, b in zip(first.safety, second.safety, strict=True)]
    assert summary["eval/sft-2/difference/reward_safety"] == pytest.approx(np.mean(gaps))
    assert max(map(abs, first.kl)) == 0.0 and all(map(math.isfinite, second.kl)) and max(map(abs, second.kl)) > 1e-4
    assert summary["eval/prompts"] == 12 and summary["eval/borderline_prompts"] == 6
    assert {"eval/sft/consistency/turn_1", "eval/sft/consistency/turn_2"} <= set(summary)
    assert "eval/sft/chance/turn_1" not in summary and "eval/sft-2/chance/turn_1" in summary
    assert {(curve["policy"], curve["temperature"]) for curve in content["curves"]} == {
        (name, temperature) for name in ("sft", "sft-2") for temperature in (0.8, 1.0)
    }
    assert read_artifact(step_of(run, "eval").path, "evaluation").manifest.details["reference"] == "sft"


def test_answers_lie_side_by_side_for_people(run: Path) -> None:
    shown = content_of(run)["samples"]
    assert {one["kind"] for one in shown} == {"helpfulness", "safety", "borderline"} and len(shown) == 4
    assert all(set(one["answers"]) == {"sft", "sft-2"} and one["prompt"][-1]["role"] == "user" for one in shown)
    rows = read_lines(step_of(run, "eval").samples)
    assert [row["sft-2"] for row in rows] == [one["answers"]["sft-2"]["text"] for one in shown]
    assert {path.name for path in step_of(run, "eval").figures.glob("*.png")} == {"best_of_n.png", "temperatures.png"}


def test_the_same_policy_twice_differs_in_nothing(
    world: World, safety: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A policy that is trained with rate 0 gives the same answers: every prompt is tied, and nothing is apart."""
    same = {"name": "same", "learning_rate": 1e-30}
    recipe = recipe_of(tmp_path, world, safety, steps=["sft", {"sft": same}, "eval"])
    run_command(load(recipe), "sft")
    caplog.clear()
    caplog.set_level(logging.INFO)
    run_command(load(recipe), "eval")
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == len(set(texts)) > 3, "what holds for every policy is said once"
    figures = content_of(recipe)["figures"]["same"]
    assert figures["difference/reward_safety"] == {"value": 0.0, "low": 0.0, "high": 0.0, "n": 12}
    assert figures["ties/reward_safety"]["value"] == 1.0 and "win_rate/reward_safety" not in figures
    assert figures["kl_to_reference"]["value"] == pytest.approx(0.0, abs=1e-5)


def test_only_a_policy_that_is_new_is_sampled(
    world: World, safety: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, world, safety)
    run_command(load(recipe), "sft", only=())
    # Only the first policy is finished.
    (tmp_path / "runs/one/sft-2").rename(tmp_path / "later")
    run_command(load(recipe), "eval")
    assert content_of(recipe)["policies"] == ["sft"]
    (tmp_path / "later").rename(tmp_path / "runs/one/sft-2")
    (planned,) = make_plan(load(recipe), "eval")
    assert planned.verdict == "renew" and planned.will_run
    sampled: list[str] = []
    from evaluation.results import RunEvaluation

    answers = RunEvaluation._answers
    monkeypatch.setattr(
        RunEvaluation, "_answers", lambda self, session, scale: (sampled.append("x"), answers(self, session, scale))[1]
    )
    run_command(load(recipe), "eval")
    assert content_of(recipe)["policies"] == ["sft", "sft-2"] and sampled == ["x"]
    (planned,) = make_plan(load(recipe), "eval")
    assert planned.verdict == "done"


@pytest.mark.parametrize("rule", ["rollout.top_k=5", "rollout.top_p=0.9"])
def test_there_is_no_kl_where_answers_are_not_drawn_from_the_whole_distribution(
    rule: str, run: Path, world: World, safety: Path, tmp_path: Path
) -> None:
    """The sampled tokens' log-probabilities under the whole distribution are biased, and the other policy's top tokens
    need not hold what was drawn."""
    recipe = recipe_of(tmp_path, world, safety)
    step_of(recipe, "sft").path.parent.mkdir(parents=True)
    for name in ("sft", "sft-2"):
        step_of(recipe, name).path.symlink_to(step_of(run, name).path)
    run_command(load(recipe, [rule, "evaluation.curve_prompts=0", "evaluation.dialogs=0"]), "eval")
    figures = content_of(recipe)["figures"]
    assert "score" in figures["sft-2"] and not any("kl_to_reference" in one for one in figures.values())


def test_a_classifier_from_elsewhere_reads_the_answers_to_harmful_prompts_alone(
    run: Path, world: World, safety: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []

    class Toy:
        def are_violations(self, exchanges: list[Any]) -> list[bool | None]:
            read.extend(exchanges)
            return [None, *(len(answer) % 2 == 0 for _, answer in exchanges[1:])]

    monkeypatch.setattr("evaluation.results.load_guard", lambda name: Toy())
    monkeypatch.setattr("evaluation.step.check_guard", lambda name: None)
    recipe = recipe_of(tmp_path, world, safety)
    step_of(recipe, "sft").path.parent.mkdir(parents=True)
    step_of(recipe, "sft").path.symlink_to(step_of(run, "sft").path)
    run_command(load(recipe, ["evaluation.guard=me/toy", "evaluation.dialogs=0", "evaluation.curve_prompts=0"]), "eval")
    content = content_of(recipe)
    harmful = [text for prompt, text in read]
    assert len(harmful) == content["prompts"]["safety_prompts"] > 1
    assert all(prompt[-1]["role"] == "user" for prompt, _ in read)
    violation = content["figures"]["sft"]["guard_violation"]
    assert violation["n"] == len(harmful) - 1, "one gave no verdict"
    assert violation["value"] == pytest.approx(sum(len(text) % 2 == 0 for text in harmful[1:]) / violation["n"])


def test_killed_at_many_moments_it_ends_like_an_uninterrupted_one(
    run: Path, world: World, safety: Path, tmp_path: Path
) -> None:
    whole, killed = (recipe_of(tmp_path, world, safety, name) for name in ("whole", "killed"))
    for recipe in (whole, killed):
        step_of(recipe, "sft").path.parent.mkdir(parents=True)
        for name in ("sft", "sft-2"):
            step_of(recipe, name).path.symlink_to(step_of(run, name).path)
    pictures: dict[str, Any] = dict.fromkeys(("draw_best_of_n", "draw_temperatures"))
    with open_commands(tmp_path, "eval", {"evaluation.step": pictures}) as commands:
        assert commands.run(whole) == 0, commands.words()
        once = Counter(commands.sampled())
        for moment in MOMENTS:
            assert commands.run(killed, kill_on=moment) == -signal.SIGKILL, f"{moment}: {commands.words()}"
        assert commands.run(killed) == 0, commands.words()
        lost = Counter(commands.sampled()) - once
    for name in ("evaluation.json", "answers/sft.json", "answers/sft-2.json"):
        contents = {(step_of(recipe, "eval").artifact / name).read_bytes() for recipe in (run, whole, killed)}
        assert len(contents) == 1, name
    assert summary_of(step_of(killed, "eval")) == summary_of(step_of(whole, "eval"))
    # Asked twice is what a kill found in the engine's hands: test prompts, borderline ones, a curve, two turns.
    assert sorted(seed - 1_000_003 for seed, _, _ in lost.elements()) == [0, 0, 500_000, 900_000, 900_001]


# --- what is refused


def test_families_that_no_rule_can_check_are_refused(world: World, safety: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, world, safety)
    with pytest.raises(ConfigError, match="families contains hobby, which cannot be checked; known: "):
        load(recipe, ["evaluation.families=[hobby]"])


def test_without_a_reward_model_it_says_so(world: World, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, world, None, scoring={"combine": "llama2_gate"})
    run_command(load(recipe), "sft")
    with pytest.raises(ConfigError, match="scoring"):
        run_command(load(recipe), "eval")
