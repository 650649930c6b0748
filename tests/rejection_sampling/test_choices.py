"""What a round samples with and tunes: temperatures, samplers, reward models, starts and ways of tuning; and refusals."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamachat.answers import best_of_n as answer_curves
from llamachat.answers.best_of_n import curve_of
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import Tuning
from llamachat.data.prompts import EncodedPrompt
from llamachat.errors import ConfigError, DataError
from llamachat.models.loading import load_policy
from llamachat.runs.artifacts import Artifact
from llamachat.runs.reader import Curve
from llamachat.scoring.scores import Combined
from llamachat.tracking.metrics import check_names
from pipelines.planning.plan import make_plan, warn
from pipelines.planning.text import plan_text
from pipelines.recipe.recipe import load
from rejection_sampling.sweep import best_temperature, sweep_figures
from rejection_sampling.train import dialog_step, make_dialogs
from rejection_sampling.winners import Winner, pooled_winners, winners_of
from tests.llamachat.answers.test_answers import group
from tests.llamachat.models.tiny_roles import FULL, QLORA, World
from tests.ppo.tiny_ppo import write_function
from tests.recipes import run_command
from tests.rejection_sampling.tiny_rounds import groups_of, paris, write_recipe
from tests.tiny_llama import LORA
from tests.tiny_steps import inputs_of, read_lines, step_of, summary_of

pytestmark = pytest.mark.usefixtures("no_curves")

PLAIN: dict[str, Any] = {"sweep_prompts": 0, "prompts": 12, "test_prompts": 4, "validation_prompts": 4}

# Different answers have different scores.
ANY = """
def score(prompts, completions, scores, **columns):
    return [{sign} * sum(map(ord, text)) % 97 + len(str(prompt)) for text, prompt in zip(completions, prompts)]
"""


def sampled(folder: Path, base: Path, /, *, reward_models: dict[str, Artifact] | None = None, **changes: Any) -> Path:
    """The recipe of a round that has published its dialogs and tuned nothing."""
    rounds = PLAIN | changes.pop("rejection_sampling", {})
    recipe = write_recipe(folder / "one.yaml", base, rejection_sampling=rounds, **changes)
    config, inputs = inputs_of(recipe)
    if reward_models is not None:
        object.__setattr__(inputs, "reward_models", reward_models)
    make_dialogs(config, dialog_step(config, inputs))
    return recipe


def answers_of(recipe: Path) -> list[list[str]]:
    return [one.texts for one in groups_of(step_of(recipe))]


# --- temperatures


def test_a_list_of_temperatures_shares_the_samples_out(base: Path, tmp_path: Path) -> None:
    """Nearly no temperature takes the likeliest tokens: the first three answers are the same, the other two are not."""
    recipe = sampled(
        tmp_path, base, rejection_sampling={"samples_per_prompt": 5, "temperature": [1e-4, 2.0]}, rollout={"top_p": 1.0}
    )
    for texts in answers_of(recipe):
        assert len(texts) == 5 and texts[0] == texts[1] == texts[2]
    assert sum(texts[3] != texts[4] for texts in answers_of(recipe)) > 12
    assert summary_of(step_of(recipe))["rs/temperature"] == pytest.approx(1.00005)


def test_one_sample_is_best_median_and_mean_and_may_be_greedy(base: Path, tmp_path: Path) -> None:
    recipe = sampled(
        tmp_path,
        base,
        rejection_sampling={"samples_per_prompt": 1, "sampler": str(paris(tmp_path / "large").path)},
        rollout={"temperature": 0.0},
        scoring={"combine": write_function(tmp_path / "any.py", ANY)},
    )
    summary = summary_of(step_of(recipe))
    assert summary["rs/reward_best"] == summary["rs/reward_median"] == summary["rs/reward_mean"]
    assert answers_of(recipe) == [["Paris"]] * len(answers_of(recipe))


def test_a_sweep_takes_the_temperature_whose_best_answers_are_best(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curve(_: Any, *, policy: str, temperature: float) -> Curve:
        best = [0.0, {0.7: 1.0, 0.9: 3.0, 1.1: 3.0, 1.3: 2.0}[temperature]]
        return Curve(
            policy=policy, temperature=temperature, best=best, best_low=best, best_high=best, median=[9.0, temperature]
        )

    monkeypatch.setattr(answer_curves, "curve_of", curve)
    recipe = sampled(
        tmp_path,
        base,
        rejection_sampling={
            "temperature": "sweep",
            "sweep_temperatures": [1.3, 1.1, 0.9, 0.7],
            "sweep_prompts": 2,
            "sweep_samples": 2,
        },
    )
    summary = summary_of(step_of(recipe))
    assert summary["rs/temperature"] == 0.9, "the lower one of equal ones"
    assert summary["rs/sweep/best_at_0.9"] == 3.0 and summary["rs/sweep/median_at_1.3"] == 1.3
    assert (step_of(recipe).figures / "temperatures.png").is_file()


def test_a_curve_by_hand_and_an_answer_that_cannot_win_counts_as_the_worst() -> None:
    # Standardised 0, 1.5, 1, 0.5; the one of 1.5 was cut, and counts as 0.
    one = group(finished=[True, False, True, True])
    curve = curve_of([one, one], policy="sft", temperature=1.0)
    # Pairs of {0, 0, 0.5, 1}: the best are 0, 0.5, 1, 0.5, 1, 1.
    assert curve.best == pytest.approx([0.375, 4 / 6, 0.875, 1.0])
    assert curve.median == pytest.approx([0.375, 0.375, (0 + 0 + 0.5 + 0.5) / 4, 0.25])
    assert curve.best_low == curve.best == curve.best_high, "two equal prompts leave nothing to doubt"
    assert best_temperature([curve], samples=4) == 1.0 and Curve(**json.loads(json.dumps(asdict(curve)))) == curve


def test_the_temperature_is_that_of_the_best_of_k_and_not_of_all_answers_of_the_sweep() -> None:
    """A hot policy's best of many overtakes a cool one's; of as few as a round samples it does not."""
    curves = [
        Curve(policy="sft", temperature=temperature, best=best, best_low=best, best_high=best, median=best)
        for temperature, best in ((1.0, [0.5, 1.0, 1.1, 1.2]), (1.4, [0.0, 0.8, 1.2, 1.6]))
    ]
    assert [best_temperature(curves, samples=samples) for samples in (1, 2, 3, 4, 9)] == [1.0, 1.0, 1.4, 1.4, 1.4]
    figures = sweep_figures(curves, samples=2)
    assert (figures["rs/sweep/best_at_1"], figures["rs/sweep/best_at_1.4"]) == (1.0, 0.8)


# --- who samples, and from where it is tuned


@pytest.mark.parametrize("vocabulary", [420, 390])
def test_another_policy_samples_with_its_own_tokens_and_its_answers_are_learnt(
    vocabulary: int, base: Path, tmp_path: Path
) -> None:
    sampler = paris(tmp_path / "large", vocabulary)
    recipe = sampled(tmp_path, base, rejection_sampling={"sampler": str(sampler.path.parent), "sweep_prompts": 2})
    assert {text for texts in answers_of(recipe) for text in texts} == {"Paris"}
    dialogs = read_lines(step_of(recipe).dialogs / "dialogs.jsonl")
    assert [dialog["messages"][-1]["content"] for dialog in dialogs] == ["Paris"] * 12
    summary = summary_of(step_of(recipe))
    assert summary["rs/usable_fraction"] == 1.0 and summary["rs/reward_best"] == summary["rs/reward_mean"]
    identity = inputs_of(recipe)[1].identity
    assert identity["rejection_sampling"]["sampler"] == sampler.digest, "by content: it may be moved"


def test_from_the_base_data_sft_is_learnt_beside_the_winners(
    base: Path, world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At a rate of nothing the weights stay what they were: those of the base, and not of the policy that sampled."""
    policy = world.policy(FULL)
    sections: dict[str, Any] = {
        "base": {"model": world.base.model, "policy": str(policy.path)},
        "scoring": {"combine": write_function(tmp_path / "any.py", ANY)},
    }
    weights = {}
    for start in ("base", "current"):
        changes = PLAIN | {"start": start, "sft": {"learning_rate": 1e-12}}
        recipe = write_recipe(tmp_path / f"{start}.yaml", base, rejection_sampling=changes, **sections)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            (artifact,) = run_command(load(recipe), "rs")
        weights[start] = load_file(artifact.path / "model.safetensors")["model.embed_tokens.weight"]
        winners = artifact.manifest.inputs["dialogs"]
        learnt = len(read_lines(Path(winners) / "dialogs.jsonl"))
        mixed = f"{learnt} training dialogs" not in caplog.text
        assert mixed is (start == "base")
    origins = {
        "base": load_file(Path(world.base.model) / "model.safetensors"),
        "current": load_file(policy.path / "model.safetensors"),
    }
    for start, embedding in weights.items():
        assert torch.allclose(embedding, origins[start]["model.embed_tokens.weight"], atol=1e-6)
    assert not torch.allclose(weights["base"], weights["current"], atol=1e-3)


@pytest.mark.parametrize("tuning", [LORA, QLORA], ids=["lora", "qlora"])
def test_adapters_are_tuned_on_the_winners(tuning: Tuning, world: World, base: Path, tmp_path: Path) -> None:
    quantised = tuning.method == "qlora"
    recipe = write_recipe(
        tmp_path / "one.yaml",
        base,
        base={"model": (world.base16 if quantised else world.base).model, "policy": str(world.policy(tuning).path)}
        | ({"dtype": "bfloat16"} if quantised else {}),
        tuning={"method": tuning.method, "rank": 4, "alpha": 8},
        rejection_sampling=PLAIN,
        rollout={"max_new_tokens": 48},
        scoring={"combine": write_function(tmp_path / "any.py", ANY)},
    )
    (artifact,) = run_command(load(recipe), "rs")
    assert artifact.manifest.details["method"] == tuning.method
    load_policy(artifact.path)
    check_names(summary_of(step_of(recipe)))


# --- reward models


@pytest.mark.parametrize(
    ("roles", "scoring", "words"),
    [
        ((), "single", r"needs a helpfulness reward model, but there is none .*`make rm`"),
        (("helpfulness", "safety"), "llama2_gate", r"saw no safety labels\. .*weighted or single"),
    ],
)
def test_reward_models_that_cannot_decide_are_refused_before_anything_is_sampled(
    roles: tuple[str, ...], scoring: str, words: str, world: World, base: Path, tmp_path: Path
) -> None:
    models = {role: world.reward_model(role, LORA, FULL) for role in roles}
    with pytest.raises(ConfigError, match=words):
        sampled(tmp_path, base, reward_models=models, scoring={"combine": scoring})
    assert not (tmp_path / "runs" / "one" / "rs" / "sampling").exists()


# --- refusals of the round itself


def test_several_samples_at_temperature_0_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"rollout\.temperature: 0, but rejection_sampling\.samples_per_prompt is 6\. .*nothing to choose from\. Set it",
    ):
        sampled(tmp_path, base, rollout={"temperature": 0.0})


def test_answers_that_never_end_are_counted_in_the_error_and_the_step_can_be_fixed(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "one.yaml",
        base,
        rejection_sampling=PLAIN,
        rollout={"max_new_tokens": 1},
        scoring={"combine": write_function(tmp_path / "any.py", ANY)},
    )
    never = ["rollout.temperature=0.0001", "rejection_sampling.samples_per_prompt=2"]
    with pytest.raises(
        DataError,
        match=r"rs: no answer can be trained on \(24 answers left out: .*12 prompts left out: .*Raise rollout\.max_new",
    ):
        run_command(load(recipe, never), "rs")
    assert not step_of(recipe).sampling.exists(), "what was refused is not taken for another recipe's answers"
    assert make_plan(load(recipe))[0].verdict == "new"


# --- the control


def test_the_control_learns_one_drawn_answer_of_each_prompt_under_the_same_rules(base: Path, tmp_path: Path) -> None:
    """Prompts, counts and rules as with the best; which answer is learnt depends on the seed, and not on the scores."""
    learnt: dict[str, list[tuple[str, str]]] = {}
    for name, select, sign in (("best", "best", 1), ("random", "random", 1), ("reversed", "random", -1)):
        folder = tmp_path / name
        folder.mkdir()
        scoring = {"combine": write_function(folder / "any.py", ANY, sign=sign)}
        recipe = sampled(
            folder, base, rejection_sampling={"select": select, "samples_per_prompt": 8, "prompts": 30}, scoring=scoring
        )
        dialogs = read_lines(step_of(recipe).dialogs / "dialogs.jsonl")
        learnt[name] = [(one["messages"][-2]["content"], one["messages"][-1]["content"]) for one in dialogs]
        usable = [
            {text for text, done, good in zip(one.texts, one.finished, one.allowed, strict=True) if done and good}
            for one in groups_of(step_of(recipe))
        ]
        for (prompt, answer), texts in zip(learnt[name], [texts for texts in usable if texts], strict=False):
            assert answer in texts, prompt
    assert [prompt for prompt, _ in learnt["random"]] == [prompt for prompt, _ in learnt["best"]]
    assert learnt["random"] == learnt["reversed"] != learnt["best"], "the scores are not in the draw"


def test_each_usable_answer_is_drawn_equally_often_and_the_seed_decides() -> None:
    prompts = [EncodedPrompt((Message("user", f"question {n}"),), (1,), is_safety=False, name="") for n in range(3000)]
    # Of four answers, best first 1, 2, 3, 0: the second was cut, and the fourth says the same as the third.
    one = group(finished=[True, True, False, True], texts=["a", "b", "c", "b"])
    groups = [one] * len(prompts)
    drawn = [winner.text for winner in winners_of(prompts, groups, "rs", draw_seed=3)]
    assert set(drawn) == {"a", "b"}
    assert abs(drawn.count("a") - 1500) < 5 * (3000 / 4) ** 0.5, "five standard deviations of a fair coin"
    assert drawn == [winner.text for winner in winners_of(prompts, groups, "rs", draw_seed=3)]
    other = [winner.text for winner in winners_of(prompts, groups, "rs", draw_seed=4)]
    assert 0.4 < sum(x == y for x, y in zip(drawn, other, strict=True)) / 3000 < 0.6
    assert {winner.text for winner in winners_of(prompts, groups, "rs")} == {"b"}, "without the seed the best"


def test_the_control_pools_earlier_rounds_without_their_scores() -> None:
    """Of two rounds' answers to a prompt each stays about as often, though the second scores higher everywhere."""
    prompts = [EncodedPrompt((Message("user", f"question {n}"),), (1,), is_safety=False, name="") for n in range(2000)]
    earlier, own = ([Winner(prompt, text, text) for prompt in prompts] for text in ("rs", "rs-2"))

    def score(responses: list[Any], **_: Any) -> Any:
        no_B = torch.zeros(len(responses), dtype=torch.bool)
        scores_B = torch.tensor([float(one.text == "rs-2") for one in responses])
        return SimpleNamespace(combined=Combined(scores_B=scores_B, is_gated_B=no_B, is_unsafe_B=no_B, has_gate=False))

    scorer: Any = SimpleNamespace(score=score)
    best = pooled_winners(scorer, own, earlier, keeps_all=False)
    assert {winner.text for winner in best} == {"rs-2"} and len(best) == 2000
    drawn = [winner.text for winner in pooled_winners(scorer, own, earlier, keeps_all=False, draw_seed=0)]
    assert len(drawn) == 2000 and abs(drawn.count("rs") - 1000) < 5 * 500**0.5


def test_winners_of_a_first_round_keep_the_scores_of_their_sampling() -> None:
    class ScoredError(Exception):
        pass

    def score(*_: Any, **__: Any) -> None:
        raise ScoredError

    scorer: Any = SimpleNamespace(score=score)
    own = [
        Winner(EncodedPrompt((Message("user", text),), (1,), is_safety=False, name=""), "yes", "rs", score=score)
        for text, score in (("one", 0.5), ("two", -1.5))
    ]
    for keeps_all in (False, True):
        assert pooled_winners(scorer, own, [], keeps_all=keeps_all) == own
    # With earlier winners, or several for one prompt, all are scored again.
    for winners, earlier in ((own, own[:1]), ([*own, replace(own[0], text="no")], [])):
        with pytest.raises(ScoredError):
            pooled_winners(scorer, winners, earlier, keeps_all=False)


# --- the recipe


@pytest.mark.parametrize(
    ("section", "entry", "words"),
    [
        ({"sft": {"learning_rat": 1e-3}}, {}, "rejection_sampling.sft.learning_rat: unknown key. Did you mean"),
        ({}, {"sft": {"epoch": 1}}, "steps.0.rs.sft.epoch: unknown key. Did you mean 'epochs'?"),
        ({}, {"sft": {"learning_rate": "fast"}}, "steps.0.rs.sft.learning_rate: found the text 'fast', but a number"),
        ({"temperature": "swep"}, {}, "rejection_sampling.temperature: found the text 'swep', but "),
        ({"temperature": [1.0, -1.0]}, {}, "rejection_sampling.temperature"),
        ({"temperature": [0.9, 1.1], "samples_per_prompt": 1}, {}, "has 2 values, but samples_per_prompt is 1"),
        ({"temperature": "sweep", "sweep_prompts": 0}, {}, "temperature is sweep, but sweep_prompts is 0"),
        ({"sampler": "nowhere/else"}, {}, "rejection_sampling.sampler: "),
    ],
)
def test_faults_of_the_section_are_reported_with_the_recipe(
    section: dict[str, Any], entry: dict[str, Any], words: str, base: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "one.yaml", base, steps=[{"rs": entry}], rejection_sampling=section)
    with pytest.raises(ConfigError) as caught:
        load(recipe)
    text = str(caught.value)
    assert words in text and text.startswith("The configuration has 1 problem:"), text


def test_values_over_the_section_sft_are_checked_with_it_and_reported_once(base: Path, tmp_path: Path) -> None:
    """Also where no step tunes on winners; a fault of the section sft itself is not reported twice."""
    recipe = write_recipe(tmp_path / "one.yaml", base, steps=["sft"], rejection_sampling={"sft": {"epoch": 1}})
    with pytest.raises(ConfigError, match=r"rejection_sampling\.sft\.epoch: unknown key"):
        load(recipe)
    recipe = write_recipe(
        tmp_path / "two.yaml", base, sft={"epochs": 0}, steps=["rs", {"rs": {"name": "rs-2", "sft": {"packing": True}}}]
    )
    with pytest.raises(ConfigError) as caught:
        load(recipe)
    assert str(caught.value).count("epochs") == 1
    steps = load(recipe, ["sft.epochs=1"]).steps
    assert steps[1].config.model_dump()["sft"] == {"packing": True}


# --- the plan


def test_a_plan_counts_sampling_and_tuning_and_rounds_wait_for_one_another(base: Path, tmp_path: Path) -> None:
    steps = ["sft", "rs", {"rs": {"name": "rs-2", "samples_per_prompt": 60}}]
    recipe = load(write_recipe(tmp_path / "one.yaml", base, steps=steps))
    planned = make_plan(recipe)
    assert [(step.name, step.verdict) for step in planned] == [("sft", "new"), ("rs", "waits"), ("rs-2", "waits")]
    _, one, two = (step.estimate for step in planned)
    assert one is not None and two is not None
    # 60 prompts, 60% of them to learn from, 8 a step, one epoch.
    assert one.optimizer_steps == two.optimizer_steps == 5
    assert two.seconds > one.seconds > 0 and one.memory
    assert "rs-2: waits, needs policy of 'rs'" in plan_text(recipe, planned)
    text = "\n".join(planned[1].warnings)
    assert "Lower rejection_sampling.sft.examples_per_step, or raise rejection_sampling.sft.epochs" in text


def test_a_rate_of_full_tuning_for_adapters_is_warned_of(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "one.yaml",
        base,
        tuning={"method": "lora", "rank": 4},
        rejection_sampling={"sft": {"learning_rate": 1e-5}},
    )
    (step,) = load(recipe).steps
    assert warn(step, None) == [
        "rejection_sampling.sft.learning_rate 1e-05 suits full tuning, but tuning.method is lora: adapters need about"
        " ten times as much."
    ]
