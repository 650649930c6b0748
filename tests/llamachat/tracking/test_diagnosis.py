"""The rules on curves, each on a series made for it; a healthy training, and a healthy one with noise, has no finding."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamachat.runs.reader import Measure
from llamachat.tracking.diagnosis import CURVES, Watch, diagnose, judge_disagrees
from pipelines.cli.main import main

Row = dict[str, float]
ITERATIONS, EVERY = 40, 5  # evaluations are every 5


def ppo_rows(**curves: Callable[[float], float]) -> list[Row]:
    """A healthy PPO, but for these curves, by the last part of the metric's name; x goes from 0 to 1."""
    healthy: dict[str, Callable[[float], float]] = {
        "kl_to_reference": lambda x: 8 * (1 - math.exp(-3 * x)),
        "entropy": lambda x: 2.4 - 0.5 * x,
        "explained_variance": lambda x: 0.6 - 0.9 * math.exp(-12 * x),
        "clip_fraction": lambda x: 0.12,
        "truncated_fraction": lambda x: 0.05,
        "reward/gate_fraction": lambda x: 0.35 - 0.1 * x,
        "policy_loss": lambda x: 0.01,
    }
    held_out: dict[str, Callable[[float], float]] = {
        "score": lambda x: 0.5 * x,
        "judge": lambda x: -1.5 + 0.2 * x,
        "response_tokens": lambda x: 40 - 4 * x,
        "distinct_2": lambda x: 0.68 - 0.05 * x,
        "commonest_answer": lambda x: 0.02 + 0.02 * x,
    }
    rows: list[Row] = []
    for iteration in range(ITERATIONS + 1):
        row: Row = {"step": iteration, "time": 0.0}
        x = iteration / ITERATIONS
        if iteration:
            row |= {f"ppo/{name}": curves.get(name, curve)(x) for name, curve in healthy.items()}
        if iteration % EVERY == 0:
            row |= {f"ppo/heldout/{name}": curves.get(name, curve)(x) for name, curve in held_out.items()}
        rows.append(row)
    return rows


def losses(prefix: str, training: list[float], held_out: list[float], *, every: int = 10) -> list[Row]:
    rows: list[Row] = [{"step": step + 1, f"{prefix}/loss": value} for step, value in enumerate(training)]
    return [*rows, *({"step": (n + 1) * every, f"{prefix}/eval_loss": value} for n, value in enumerate(held_out))]


def test_a_healthy_training_has_no_finding() -> None:
    assert diagnose(ppo_rows()) == []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noisy = [
            {
                name: value if name in ("step", "time") else value * (1 + 0.05 * rng.normal())
                for name, value in row.items()
            }
            for row in ppo_rows()
        ]
        assert diagnose(noisy) == []
    falling = [2.0 - 0.02 * step for step in range(40)]
    assert diagnose(losses("sft", falling, [2.0, 1.9, 1.85, 1.86])) == []
    assert diagnose([]) == []


# Past its bound from the x on that makes the iteration named.
SICK: list[tuple[str, dict[str, Callable[[float], float]], int]] = [
    # Above 10 nats from iteration 9 on, whose 11.25 are 1.8 times the 6.25 of iteration 5, and not more.
    ("KL runs away", {"kl_to_reference": lambda x: 50 * x}, 10),
    ("KL runs away", {"kl_to_reference": lambda x: 35 + x}, 1),
    ("Entropy collapses", {"entropy": lambda x: 2.0 - 1.5 * x}, 28),  # half of the first 1.9625 at 27.2
    ("The critic explains nothing", {"explained_variance": lambda x: -0.1 if x > 0.5 else 0.3}, 21),
    ("Many tokens are clipped", {"clip_fraction": lambda x: 0.5 * x}, 25),  # 0.3 at 24
    ("Many answers are truncated", {"truncated_fraction": lambda x: 0.39 * x}, 31),  # 0.3 at 30.8
    ("Answers get shorter", {"response_tokens": lambda x: 40 - 25 * x}, 15),  # 32 at 12.8
    ("Answers get longer", {"response_tokens": lambda x: 40 + 40 * x}, 25),  # 60 at 20
    ("Answers lose variety", {"distinct_2": lambda x: 0.68 - 0.37 * x}, 15),  # 0.578 at 11.03
    ("One answer is common", {"commonest_answer": lambda x: 0.02 + 0.3 * x}, 10),  # 0.07 at 6.7
    ("The gate is always open", {"reward/gate_fraction": lambda x: 1.0}, 2),
    ("The gate never opens", {"reward/gate_fraction": lambda x: 0.0}, 2),
    ("Score up, judge down", {"judge": lambda x: -1.5 + x - 2 * x * x}, 25),  # falls from 10 on; the newest four
    ("No number", {"policy_loss": lambda x: math.nan if x > 0.5 else 0.0}, 21),
]


@pytest.mark.parametrize(("rule", "curves", "since"), SICK, ids=[f"{rule} {n}" for n, (rule, _, _) in enumerate(SICK)])
def test_each_rule_finds_its_curve_and_since_when(
    rule: str, curves: dict[str, Callable[[float], float]], since: int
) -> None:
    (finding,) = diagnose(ppo_rows(**curves))
    assert finding.rule == rule and finding.since is not None and finding.since.split()[1] == str(since)
    text = finding.sentence()
    assert all(part in text for part in (finding.seen, finding.meaning, finding.change, "docs/curves.md"))
    assert "{" not in finding.seen


def test_the_page_on_curves_has_every_rule() -> None:
    page = (Path(__file__).parents[3] / CURVES).read_text()
    assert [rule for rule, _, _ in SICK if f"**{rule}" not in page] == [] and "**Overfitting" in page


def test_a_curve_that_came_back_is_no_finding() -> None:
    assert diagnose(ppo_rows(clip_fraction=lambda x: 0.5 if 0.2 < x < 0.9 else 0.1)) == []
    assert diagnose(ppo_rows(clip_fraction=lambda x: 0.5 if x > 0.96 else 0.1)) == [], "two values are noise"
    assert diagnose(ppo_rows(kl_to_reference=lambda x: 16 * (1 - math.exp(-4 * x)))) == [], "high, and levelled off"


@pytest.mark.parametrize("prefix", ["sft", "rm/safety"])
def test_a_held_out_loss_that_rises_while_the_training_loss_falls(prefix: str) -> None:
    falling = [2.0 - 0.03 * step for step in range(60)]
    (finding,) = diagnose(losses(prefix, falling, [2.0, 1.8, 1.7, 1.72, 1.75, 1.8]))
    assert finding.rule == f"Overfitting of {prefix}" and finding.since == "step 50"  # 1.734 is passed there
    assert ("sft.epochs" if prefix == "sft" else "reward.epochs") in finding.change
    rising = [2.0 + 0.03 * step for step in range(60)]
    assert diagnose(losses(prefix, rising, [2.0, 1.8, 1.7, 1.72, 1.75, 1.8])) == [], "that is no overfitting"
    (finding,) = diagnose(losses(prefix, [1.0, math.nan, math.nan], []))
    assert finding.rule == "No number" and finding.since == "step 2"


def measure(value: float, low: float, high: float) -> Measure:
    return Measure(value=value, low=low, high=high)


def test_score_up_and_judge_down_after_the_training_by_their_intervals() -> None:
    up, down = measure(0.5, 0.4, 0.6), measure(-0.1, -0.17, -0.02)
    assert judge_disagrees(up, down) is not None
    for score, judge in ((up, measure(-0.1, -0.2, 0.01)), (measure(0.1, -0.1, 0.3), down), (up, up), (up, None)):
        assert judge_disagrees(score, judge) is None


def test_a_training_says_each_finding_once_also_after_a_resume() -> None:
    rows = ppo_rows(clip_fraction=lambda x: 0.5 * x, entropy=lambda x: 2.0 - 1.5 * x)
    watch, said = Watch([]), []
    for row in rows:
        said += [(finding.rule, row["step"]) for finding in watch.add(int(row["step"]), row)]
    assert said == [("Many tokens are clipped", 27), ("Entropy collapses", 30)], "the third value past the bound"
    resumed, again = Watch(rows[:29]), []
    for row in rows[29:]:
        again += [finding.rule for finding in resumed.add(int(row["step"]), row)]
    assert again == ["Entropy collapses"]


def test_the_command_prints_findings_by_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def step(name: str, rows: list[Row], summary: dict[str, Any]) -> None:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "summary.json").write_text(json.dumps(summary))

    falls = {"score": (0.5, 0.4, 0.6), "judge": (-0.1, -0.17, -0.02)}
    ends = ("", "_low", "_high")
    summary = {f"ppo/test/difference/{k}{end}": v for k, vs in falls.items() for end, v in zip(ends, vs, strict=True)}
    step("sft", losses("sft", [2.0, 1.9], [1.9]), {})
    step("ppo", ppo_rows(clip_fraction=lambda x: 0.5 * x), summary)
    assert main(["diagnose", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "sft: nothing stands out" in out and "ppo: 2 findings" in out and "docs/curves.md" in out
    assert "Many tokens are clipped (since iteration 25)" in out and "Score up, judge down\n" in out
    assert "ppo.learning_rate" in out and "-0.10 [-0.17, -0.02]" in out
