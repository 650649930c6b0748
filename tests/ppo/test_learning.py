"""PPO learns: what a function pays for comes more often, what it charges for comes less, and the guards end it in time."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ppo
from llamachat.errors import DivergedError
from llamachat.models.loading import load_policy
from llamachat.runs.artifacts import Artifact, StepFolder, read_artifact
from llamachat.runs.inputs import StepInputs
from llamachat.runs.record import MetricsRecord, SamplesRecord
from llamachat.tracking.metrics import check_names
from ppo import update as update_module
from tests.ppo.tiny_ppo import PAYS, config_of, inputs_of, write_function

LEARNING: dict[str, Any] = {
    "iterations": 12,
    "responses_per_iteration": 64,
    "responses_per_minibatch": 16,
    "learning_rate": 5e-3,
    "critic_learning_rate": 3e-3,
    "epochs": 2,
    "kl_coef": 0.0,
    "unfinished_ramp": 0.0,  # an answer of 24 tokens at most has more letters, the longer it is
    "collapse_guard": None,  # a policy of random words that is paid for a letter repeats itself
    "validation_every": 6,
    "validation_prompts": 32,
    "test_prompts": 40,
    "save_every": 100,
}


def figures(artifact: Artifact) -> dict[str, float]:
    return json.loads((artifact.path.parent / "summary.json").read_text())


def record(artifact: Artifact) -> list[dict[str, float]]:
    return MetricsRecord(artifact.path.parent / "metrics.jsonl").read()


@pytest.fixture(scope="module")
def learn(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Artifact]:
    """By sign: a policy that was paid, or charged, for each letter t."""
    artifacts: dict[int, Artifact] = {}

    def of(sign: int) -> Artifact:
        if sign not in artifacts:
            folder = tmp_path_factory.mktemp("learning")
            scoring = {"combine": write_function(folder / "letter.py", PAYS, sign=sign)}
            inputs = inputs_of(folder, base, scoring=scoring, prompts=240, rollout={"max_new_tokens": 24})
            artifacts[sign] = ppo.run(config_of(**LEARNING), inputs)
        return artifacts[sign]

    return of


def letters(artifact: Artifact) -> tuple[float, float]:
    """Letters t in the first and the last samples that people are shown."""
    rows = SamplesRecord(artifact.path.parent / "samples.jsonl").read()
    counts = {
        step: [row["answer"].count("t") for row in rows if row["step"] == step]
        for step in (rows[0]["step"], rows[-1]["step"])
    }
    first, last = (sum(values) / len(values) for values in counts.values())
    return first, last


def test_what_is_paid_for_comes_more_often(learn: Callable[[int], Artifact]) -> None:
    artifact = learn(1)
    summary = figures(artifact)
    assert summary["ppo/test/difference/reward_combined_low"] > 0.2
    assert summary["ppo/test/final/kl_to_reference"] > 0.5 > abs(summary["ppo/test/start/kl_to_reference"])
    first, last = letters(artifact)
    assert last > first + 0.2


def test_with_the_sign_turned_it_comes_less_often(learn: Callable[[int], Artifact]) -> None:
    artifact = learn(-1)
    assert figures(artifact)["ppo/test/difference/reward_combined_low"] > 0
    first, last = letters(artifact)
    assert last < first


def test_without_a_critic_what_is_paid_for_comes_more_often_too(base: Path, tmp_path: Path) -> None:
    scoring = {"combine": write_function(tmp_path / "letter.py", PAYS)}
    inputs = inputs_of(tmp_path, base, scoring=scoring, prompts=240, rollout={"max_new_tokens": 24})
    artifact = ppo.run(config_of(**LEARNING, advantages="rloo", responses_per_prompt=4), inputs)
    summary = figures(artifact)
    assert summary["ppo/test/difference/reward_combined_low"] > 0.2
    assert "ppo/value_loss" not in record(artifact)[-1]


def test_the_step_leaves_a_policy_a_record_and_pictures(learn: Callable[[int], Artifact]) -> None:
    artifact = learn(1)
    folder = StepFolder(artifact.path.parent)
    assert read_artifact(folder.path, "policy").manifest.details["method"] == "lora"
    load_policy(artifact.path)
    assert folder.curves.stat().st_size > 10_000 and (folder.figures / "test_scores.png").stat().st_size > 10_000
    rows = record(artifact)
    check_names(name for row in rows for name in row if name not in ("step", "time"))
    check_names(figures(artifact))
    assert [row["step"] for row in rows if "ppo/policy_loss" in row] == list(range(1, LEARNING["iterations"] + 1))
    assert [row["step"] for row in rows if "ppo/heldout/score" in row] == [0, 6, 12]
    ranks = {row["step"]: row["ppo/heldout/superiority"] for row in rows if "ppo/heldout/superiority" in row}
    published = artifact.manifest.details["iteration"]
    assert ranks[0] == 0.5 and published == max(ranks, key=lambda step: ranks[step])
    assert figures(artifact)["ppo/best_superiority"] == ranks[published] > 0.5
    last = rows[-1]
    for name in ("reward/combined", "reward/shaped", "kl_to_reference", "approx_kl", "clip_fraction", "entropy"):
        assert f"ppo/{name}" in last
    for name in ("ppo/value_loss", "ppo/explained_variance", "ppo/truncated_fraction", "optim/grad_norm"):
        assert name in last
    for name in ("time/rollout_s", "time/score_s", "time/update_s", "throughput/rollout_tokens_per_s"):
        assert last[name] > 0
    samples = SamplesRecord(folder.samples).read()
    assert {"prompt", "answer", "reward_combined", "score", "finished"} <= samples[0].keys()
    assert max(row["ppo/engine_gap"] for row in rows if "ppo/engine_gap" in row) < 1e-5


def test_a_kl_over_the_guard_ends_it_and_the_best_policy_under_it_is_published(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(**(LEARNING | {"learning_rate": 0.05, "kl_guard": 0.5, "validation_every": 1}))
    with caplog.at_level(logging.WARNING):
        artifact = ppo.run(config, inputs_of(tmp_path, base, prompts=240))
    assert "over ppo.kl_guard (0.5)" in caplog.text
    details, rows = artifact.manifest.details, record(artifact)
    assert details["end"] == "kl_guard" and rows[-1]["step"] < 10
    published = {row["step"]: row for row in rows if "ppo/heldout/score" in row}[details["iteration"]]
    assert published["ppo/heldout/kl_to_reference"] <= 0.5
    # The test prompts are others than those that the guard looks at.
    assert figures(artifact)["ppo/test/final/kl_to_reference"] < 1.5


def test_findings_are_said_while_it_trains_each_once(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At such a rate the policy becomes sure of one token at once."""
    config = config_of(**(LEARNING | {"learning_rate": 0.05, "kl_guard": None, "iterations": 5}))
    with caplog.at_level(logging.WARNING):
        ppo.run(config, inputs_of(tmp_path, base, prompts=240, rollout={"max_new_tokens": 1}))
    said = [record.getMessage() for record in caplog.records if "docs/curves.md" in record.getMessage()]
    assert sum("Entropy collapses since iteration 2" in text for text in said) == 1, said


def test_without_a_better_policy_patience_ends_and_the_start_is_published_again(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(**(LEARNING | {"learning_rate": 1e-9, "patience": 2, "validation_every": 1}))
    with caplog.at_level(logging.WARNING):
        artifact = ppo.run(config, inputs_of(tmp_path, base, prompts=240))
    assert artifact.manifest.details["end"] == "patience"
    assert artifact.manifest.details["iteration"] == 0 and record(artifact)[-1]["step"] == 2
    assert "no evaluated policy ranks above the starting one" in caplog.text
    is_negative = any(round(row.get("ppo/kl_to_reference", 0.0), 2) < 0 for row in record(artifact))
    assert capsys.readouterr().err.count("is sampling noise") == is_negative, "explained once, where it occurs"
    model = load_policy(artifact.path).model
    moved = [w for name, w in model.named_parameters() if ".lora_B." in name and bool(w.any())]
    assert not moved, "a new adapter adds nothing"


def test_a_training_that_breaks_tells_where_its_best_policy_is(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(tmp_path, base, prompts=240, scoring={"combine": write_function(tmp_path / "t.py", PAYS)})
    plain, calls = update_module.policy_loss, 0

    def breaks(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        result = plain(*arguments, **named)
        return (
            result if calls < 70 else type(result)(result.loss * float("nan"), result.approx_kl, result.clip_fraction)
        )

    monkeypatch.setattr(update_module, "policy_loss", breaks)
    config = config_of(**(LEARNING | {"validation_every": 1, "save_every": 1}))
    with pytest.raises(
        DivergedError, match=r"ppo/policy_loss is nan.*The best policy so far, of iteration \d+, is in "
    ) as error:
        ppo.run(config, inputs)
    best = inputs.folder.checkpoints / "best"
    assert str(best) in str(error.value)
    load_policy(best)
    assert not inputs.folder.artifact.exists()
    assert any(path.name.startswith("step-") for path in inputs.folder.checkpoints.iterdir())


@pytest.mark.parametrize("critic", ["separate", "shared"])
@pytest.mark.parametrize("changes", [{"kl_control": "adaptive", "epochs": 2}, {"critic_warmup": 2}])
def test_every_way_to_train_runs(critic: str, changes: dict[str, Any], base: Path, tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path, base)
    artifact = ppo.run(config_of(critic=critic, **changes), inputs)
    rows = [row for row in record(artifact) if "ppo/value_loss" in row]
    trained = [row["step"] for row in rows if "ppo/policy_loss" in row]
    assert trained == ([3] if "critic_warmup" in changes else [1, 2, 3])
    coefs = [row["ppo/kl_coef"] for row in rows]
    assert (coefs[0] > coefs[1] > coefs[2]) if "kl_control" in changes else len(set(coefs)) == 1


def test_the_same_inputs_give_the_same_policy(base: Path, tmp_path: Path) -> None:
    def weights(run: str) -> bytes:
        inputs: StepInputs = inputs_of(tmp_path, base, run=run)
        return next(ppo.run(config_of(), inputs).path.glob("*.safetensors")).read_bytes()

    state = torch.get_rng_state()
    one = weights("one")
    torch.manual_seed(99)
    assert one == weights("two"), "nothing is drawn from torch's random state"
    torch.set_rng_state(state)
