"""The whole PPO stage on real toy reward models: every way of scoring and of holding weights, and what is refused."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import ppo
from llamachat.config.sections import Base, Scoring, Tuning
from llamachat.errors import ArtifactError, ConfigError, RolloutError
from llamachat.models.loading import load_base, load_policy
from llamachat.runs.artifacts import Artifact, read_artifact
from llamachat.runs.record import MetricsRecord, SamplesRecord
from llamachat.tracking.metrics import check_names
from pipelines.planning.plan import make_plan
from pipelines.planning.text import plan_text
from pipelines.recipe.recipe import load
from ppo.update import Updater
from tests.llamachat.models.tiny_roles import FULL, QLORA, World, labelled
from tests.llamachat.rollout.fake_vllm import FakeVllm
from tests.ppo.tiny_ppo import config_of, inputs_of, write_function, write_prompts
from tests.recipes import run_command
from tests.reward.tiny_reward import data_of, toy_labels, toy_pairs
from tests.sft.tiny_sft import toy_dialogs, write_dialogs
from tests.tiny_llama import LORA
from tests.tiny_steps import SPLIT, write_values

SMALL: dict[str, Any] = {
    "iterations": 2,
    "responses_per_iteration": 8,
    "responses_per_minibatch": 4,
    "validation_prompts": 4,
    "test_prompts": 4,
}
GATE: dict[str, Any] = {"combine": "llama2_gate"}
LENGTH = "def score(prompts, completions, scores, **columns):\n    return [float(len(text)) for text in completions]\n"


def models_of(world: World, *roles: str, tuning: Tuning = LORA, policy: Tuning = FULL) -> dict[str, Artifact]:
    return {role: world.reward_model(role, tuning, policy) for role in roles}


def train(folder: Path, world: World, models: dict[str, Artifact], scoring: dict[str, Any], **changes: Any) -> Artifact:
    """The policy that the stage publishes; `changes` are of its inputs."""
    options: dict[str, Any] = {"policy": world.policy(FULL), "tuning": LORA} | changes
    inputs = inputs_of(folder, Path(world.base.model), reward_models=models, scoring=scoring, **options)
    return ppo.run(config_of(**SMALL), inputs)


def record(artifact: Artifact) -> list[dict[str, float]]:
    """The iterations."""
    rows = MetricsRecord(artifact.path.parent / "metrics.jsonl").read()
    return [row for row in rows if "ppo/policy_loss" in row]


def summary(artifact: Artifact) -> dict[str, float]:
    return json.loads((artifact.path.parent / "summary.json").read_text())


# --- ways of scoring


def test_two_reward_models_and_a_judge_are_distinguished(world: World, tmp_path: Path) -> None:
    models = models_of(world, "helpfulness", "safety", "judge")
    artifact = train(tmp_path, world, models | {"safety": labelled(models["safety"])}, GATE)
    rows, figures = record(artifact), summary(artifact)
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert 0.0 <= row["ppo/reward/gate_fraction"] <= 1.0
        assert row["ppo/reward/helpfulness"] != row["ppo/reward/safety"]
        assert "ppo/reward/judge" not in row, "the judge sees held-out answers alone"
    assert any(name.startswith("ppo/test/difference/judge") for name in figures)
    check_names(figures)
    samples = SamplesRecord(artifact.path.parent / "samples.jsonl").read()
    assert {"reward_helpfulness", "reward_safety", "judge"} <= samples[0].keys()
    taken = artifact.manifest.inputs
    assert {"policy", "reward_model/helpfulness", "reward_model/safety", "reward_model/judge"} == taken.keys()


def test_the_gate_over_a_model_without_safety_labels_is_refused_with_the_reason(world: World, tmp_path: Path) -> None:
    models = models_of(world, "helpfulness", "safety")
    with pytest.raises(
        ConfigError,
        match=r"saw no safety labels\. Trained on pairs alone .* not whether one is safe.*weighted or single",
    ):
        train(tmp_path, world, models, GATE)
    assert not (tmp_path / "runs" / "one" / "ppo" / "artifact").exists()


@pytest.mark.parametrize(
    ("rollout", "words"),
    [
        ({"top_p": 0.9}, r"rollout\.top_p: 0\.9, but PPO needs 1\."),
        ({"top_k": 50}, r"rollout\.top_k: 50, but PPO needs null\."),
        ({"temperature": 0.0}, r"rollout\.temperature: 0, but PPO trains on sampled answers"),
        ({"max_new_tokens": 96}, r"rollout\.max_new_tokens: 96, but base\.max_tokens is 96"),
    ],
)
def test_sampling_that_the_equations_do_not_hold_for_is_refused(
    rollout: dict[str, Any], words: str, world: World, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(tmp_path, world, {}, Scoring().model_dump(), rollout=rollout)


# --- ways of holding weights


def test_reward_models_on_another_trunk_are_loaded_beside(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    models = {"helpfulness": world.reward_model("helpfulness", LORA, FULL, policy_seed=7)}
    with caplog.at_level(logging.DEBUG):
        artifact = train(tmp_path, world, models, {"combine": "single"})
    assert "has its own base, which is loaded separately: 0.00 GiB" in caplog.text
    for row in record(artifact):
        assert row["ppo/reward/combined"] == row["ppo/reward/helpfulness"]
        assert "ppo/reward/gate_fraction" not in row and "ppo/reward/safety" not in row
    assert len(record(artifact)) == 2
    load_policy(artifact.path)


def test_a_4_bit_base_is_trained_over_on_a_cpu(world: World, tmp_path: Path) -> None:
    models = models_of(world, "helpfulness", "safety", tuning=QLORA, policy=QLORA)
    artifact = train(
        tmp_path,
        world,
        models | {"safety": labelled(models["safety"])},
        GATE,
        policy=world.policy(QLORA),
        tuning=QLORA,
        dtype="bfloat16",
    )
    assert artifact.manifest.details["method"] == "qlora" and len(record(artifact)) == 2
    assert record(artifact)[0]["ppo/kl_to_reference"] == pytest.approx(0.0, abs=1e-3)
    load_policy(artifact.path)


def test_all_weights_are_trained_with_reward_models_beside(world: World, tmp_path: Path) -> None:
    models = models_of(world, "helpfulness", "safety", tuning=FULL)
    scoring = {"combine": "weighted", "weights": {"helpfulness": 0.25, "safety": 0.75}}
    artifact = train(tmp_path, world, models, scoring, tuning=FULL)
    assert artifact.manifest.details["method"] == "full" and len(record(artifact)) == 2
    for row in record(artifact):
        wanted = 0.25 * row["ppo/reward/helpfulness"] + 0.75 * row["ppo/reward/safety"]
        assert row["ppo/reward/combined"] == pytest.approx(wanted, abs=1e-5)
    load_policy(artifact.path)


# --- a server on the card that trains


def test_a_server_on_the_same_card_sleeps_while_it_trains_and_a_wrong_token_of_its_stops_the_training(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeVllm(load_base(Base(model=str(base), dtype="float32", max_tokens=96)))
    rollout = {"engine": "vllm", "server": fake.address, "server_gib": 1.0}
    scoring = {"combine": write_function(tmp_path / "length.py", LENGTH)}
    asleep, update = list[bool](), Updater.update

    def watched(self: Updater, *arguments: Any, **options: Any) -> Any:
        asleep.append(fake.is_asleep)
        return update(self, *arguments, **options)

    monkeypatch.setattr(Updater, "update", watched)
    config = config_of(**SMALL)
    artifact = ppo.run(config, inputs_of(tmp_path, base, rollout=rollout, scoring=scoring))
    assert asleep == [True, True] and fake.is_asleep
    for row in record(artifact):
        assert row["ppo/engine_gap"] <= row["ppo/engine_gap_max"] < 1e-4

    def change(answer: dict[str, Any]) -> Any:
        (choice,) = answer["choices"]
        if len(choice["prompt_token_ids"]) > 1:  # not of the checks of the server
            choice["logprobs"]["token_logprobs"][0] -= 9.0
        return answer

    fake.change = change
    with pytest.raises(RolloutError, match=r"differs by 9 nats from the policy's, but at most 8 are"):
        ppo.run(config, inputs_of(tmp_path, base, run="two", rollout=rollout, scoring=scoring))
    fake.close()


# --- in a recipe


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "verifiable_reward"


@pytest.mark.parametrize("way", ["a function", "the rule of an example, for one step alone"])
def test_a_recipe_of_tuning_and_ppo_needs_no_reward_model(way: str, base: Path, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "base": {"max_tokens": 96},
        "tuning": {"method": "lora", "rank": 4, "alpha": 8},
        "data": {
            "sft": [{"path": str(write_dialogs(tmp_path / "dialogs.jsonl", toy_dialogs(24)))}],
            "prompts": [{"path": str(write_prompts(tmp_path / "prompts.jsonl", 60))}],
            "split": SPLIT,
        },
        "sft": {"learning_rate": 2e-5},
        "rollout": {"max_new_tokens": 8},
        "ppo": config_of(**SMALL).model_dump(mode="json"),
    }
    rule = f"{EXAMPLE / 'rule.py'}:score"
    steps: list[Any] = ["sft", {"ppo": {"scoring": {"combine": rule}}}]
    if way == "a function":
        rule, steps = write_function(tmp_path / "length.py", LENGTH), ["sft", "ppo", "eval", "report"]
        values["scoring"] = {"combine": rule}
    recipe = load(write_values(tmp_path / "one.yaml", base, values, steps=steps))
    assert [step.verdict for step in make_plan(recipe)] == ["new", *["waits"] * (len(steps) - 1)]
    artifact, *evaluated = run_command(recipe, "all")[1:]
    for one in (artifact, *evaluated[:1]):
        assert one.manifest.inputs["reward_function"].startswith(f"{rule} (SHA-256 ")
        assert not any(name.startswith("reward_model") for name in one.manifest.inputs)
    assert [name for name in record(artifact)[0] if name.startswith("ppo/reward/")] == [
        "ppo/reward/combined",
        "ppo/reward/shaped",
    ]


def test_a_recipe_goes_from_tuning_over_reward_models_to_ppo(base: Path, tmp_path: Path) -> None:
    data = data_of(tmp_path / "data", helpfulness=toy_pairs(40), safety=toy_pairs(40, "Paris"), labels=toy_labels(24))
    values: dict[str, Any] = {
        "base": {"max_tokens": 96},
        "tuning": {"method": "lora", "rank": 4, "alpha": 8},
        "data": data.model_dump(mode="json", exclude_unset=True)
        | {
            "sft": [{"path": str(write_dialogs(tmp_path / "dialogs.jsonl", toy_dialogs(24)))}],
            "prompts": [{"path": str(write_prompts(tmp_path / "prompts.jsonl", 60))}],
            "split": SPLIT | {"judge": 0.2},
        },
        "sft": {"learning_rate": 2e-5},  # at a higher rate the answers to the few held-out prompts become one
        "reward": {"epochs": 1, "pairs_per_step": 8, "learning_rate": 1e-3},
        "rollout": {"max_new_tokens": 8},
        "ppo": config_of(**SMALL).model_dump(mode="json"),
    }
    path = write_values(tmp_path / "one.yaml", base, values, steps=["sft", "rm", "ppo"])
    recipe = load(path)
    with pytest.raises(ArtifactError, match=r"'ppo' reads a policy, .*Run `make sft`"):
        run_command(recipe, "ppo")
    run_command(recipe, "sft")
    with pytest.raises(ArtifactError, match=r"'ppo' reads a helpfulness reward model, .*Run `make rm`"):
        run_command(recipe, "ppo")
    run_command(recipe, "rm")
    (artifact,) = run_command(recipe, "ppo")
    run = tmp_path / "runs" / "one"
    started = read_artifact(run / "sft", "policy")
    assert artifact.manifest.inputs["policy"] == str(started.path)
    assert artifact.manifest.inputs["reward_model/safety"] == str(run / "rm" / "safety" / "artifact")
    assert set(artifact.manifest.identity["inputs"]) == {
        "policy",
        *(f"reward_model/{which}" for which in ("helpfulness", "safety", "judge")),
    }
    assert "ppo/reward/gate_fraction" in record(artifact)[0]
    assert [step.verdict for step in make_plan(recipe)] == ["done"] * 5
    again = load(path, ["ppo.kl_coef=0.05"])
    assert [step.verdict for step in make_plan(again)] == ["done"] * 4 + ["changed"]
    assert "ppo: changed" in plan_text(again, make_plan(again))
