"""The first screen: what it says follows from the figures, and a policy that answers nothing cannot look good on it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from evaluation.report.config import Config
from evaluation.report.facts import read_facts
from evaluation.report.in_short import changes, glossary, opening, policies_table
from llamachat.errors import UsageError
from llamachat.runs.artifacts import MANIFEST, read_artifact
from llamachat.runs.reader import Evaluation
from tests.evaluation.report.tiny_report import STEPS, TinyRun, evaluation, measure, outcome_figures, write


def lines_of(run: TinyRun, control: str | None = None) -> list[str]:
    facts = read_facts(run.inputs(len(run.artifacts)))
    return [*opening(facts), *changes(facts, control)]


def only(lines: list[str], words: str) -> str:
    (line,) = [line for line in lines if words in line]
    return line


def set_details(run: TinyRun, step: str, **details: Any) -> None:
    """Put details into the manifest of a finished step."""
    path = run.folder / step / "artifact" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["details"] |= details
    write(path, manifest)


def test_the_first_lines_say_what_came_of_it(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny")
    figures = run.evaluation["figures"]
    figures["sft"]["commonest_answer"] = measure(0.01)
    figures["rs"] |= {
        "length_ratio": measure(0.9), "distinct_2_ratio": measure(0.88), "commonest_answer": measure(0.03),
        "difference/judge": measure(0.2, 0.05), "difference/harmful/refused": measure(0.05, 0.02),
    }  # fmt: skip
    figures["ppo"] |= {
        "length_ratio": measure(0.4), "distinct_2_ratio": measure(0.5), "commonest_answer": measure(0.25),
    }  # fmt: skip
    lines = lines_of(run.add(*STEPS))
    assert lines[0].startswith(
        "Use rs: the last policy that the judge does not rate below another (+0.20 [+0.15, +0.25] over sft)."
    )
    assert "Not ppo: the judge rates it below rs" in lines[0] or "Not ppo: it " in lines[0]
    assert lines[0].endswith(f"`llamachat chat {run.folder}/rs` talks to it.")
    better = only(lines, "Rejection sampling (rs)")
    assert (
        "made answers better than sft's; the judge's score, on 400 prompts by which nothing was chosen: +0.20 ["
        in better
    )
    assert "made answers worse than sft's" in only(lines, "PPO (ppo)")
    shape = only(lines, "Answers of rs")
    assert shape.startswith(
        "Answers of rs are 0.90 times as long as sft's, have 0.88 times as many different word pairs"
    )
    assert "3.0% of prompts (sft: 1.0%)" in shape and "Warning" not in shape
    assert re.search("Warning: .*shorter, .*alike, one answer is given too often", only(lines, "Answers of ppo"))
    refuses = only(lines, "rs refuses ")
    assert "15.0% of harmful prompts (sft: 10.0%, difference +5.0 [+3.0, +7.0] points)" in refuses
    assert "2.5% of harmless prompts that look harmful (sft: 0.0%)" in refuses


def test_a_policy_that_changed_nothing_is_said_to_be_the_earlier_one(tmp_path: Path) -> None:
    """PPO publishes its start again where no iteration ranked higher."""
    run = TinyRun(tmp_path / "tiny")
    figures = run.evaluation["figures"]
    figures["ppo"] = dict(figures["rs"])
    lines = lines_of(run.add(*STEPS))
    assert only(lines, "PPO (ppo)") == "PPO (ppo) changed nothing: its answers are those of rs."
    figures["ppo"] = dict(figures["sft"]) | {"difference/judge": measure(0.0, 0.0), "superiority": measure(0.5, 0.0)}
    run = TinyRun(tmp_path / "second", evaluation=run.evaluation).add(*STEPS)
    assert only(lines_of(run), "PPO (ppo)") == "PPO (ppo) changed nothing: its answers are those of sft."
    text = run.report().page_markdown.read_text()
    assert "+0.00 [+0.00, +0.00]" not in text and "50.0% [50.0%, 50.0%]" not in text and "| 0 equal |" in text


def test_the_words_of_the_page_are_explained_and_no_others() -> None:
    content = evaluation()
    words = glossary(Evaluation.model_validate(content))
    assert all(f"{word}: " in words for word in ("sft", "rs", "ppo", "judge", "combined")) and "gatt" not in words
    for policy in content["figures"].values():
        policy.pop("judge")
    assert "judge" not in glossary(Evaluation.model_validate(content))


def test_an_unfit_judge_shows_nothing_and_a_long_verdict_is_shortened(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny").add(*STEPS)
    set_details(run, "rm/judge", probe={"is_fit": False, "verdict": "NOT fit: one; two; three; four"})
    run.artifacts = [read_artifact(artifact.path) for artifact in run.artifacts]
    lines = lines_of(run)
    assert "NOT fit: one; two; and 2 more reasons." in only(lines, "The judge model")
    assert "is unknown, since the judge is not fit; the judge's score" in only(lines, "PPO (ppo)")
    assert "the judge is not fit" in lines[0]


def test_a_change_within_chance_is_no_gain(tmp_path: Path) -> None:
    line = only(lines_of(TinyRun(tmp_path / "tiny").add(*STEPS)), "Rejection sampling (rs)")
    assert "did not make answers measurably better or worse than sft's" in line and "-0.03 [-0.07, +0.01]" in line


def test_reward_models_are_fit_unfit_or_not_tested(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny").add("sft", "rm/helpfulness", "rm/safety", "rm/judge")
    set_details(run, "rm/helpfulness", probe={"is_fit": True, "verdict": "fit for rejection sampling and PPO"})
    set_details(run, "rm/safety", probe={"is_fit": False, "verdict": "NOT fit: it prefers refusals"})
    set_details(run, "rm/judge", probe=None)
    run.artifacts = [read_artifact(artifact.path) for artifact in run.artifacts]
    helpfulness, safety, judge = lines_of(run)
    assert "helpfulness model" in helpfulness and "is fit: " in helpfulness
    assert "NOT fit: it prefers refusals. What it says of the policies below cannot be trusted." in safety
    assert "judge model" in judge and "whether it is fit is unknown" in judge


def test_a_policy_that_always_refuses_comes_last_though_the_judge_and_the_safety_model_love_it() -> None:
    content = evaluation()
    content["figures"]["ppo"] |= {
        "difference/judge": measure(2.0, 0.1), "reward_safety": measure(9.0, 0.1), "violation": measure(0.0, 0.0),
        **outcome_figures("harmful", complied=0.0, refused=1.0), **outcome_figures("harmless", complied=0.0, refused=1.0),
        "commonest_answer": measure(1.0),
    }  # fmt: skip
    table = policies_table(Evaluation.model_validate(content))
    assert [row[0].text for row in table.rows] == ["sft", "rs", "ppo"]
    last = {head: cell.text for head, cell in zip(table.head, table.rows[-1], strict=True)}
    assert (last["harmful prompts refused"], last["harmless prompts answered"]) == ("100.0%", "0.0%")
    assert table.rows[-1][0].beside == "it answers 0% of harmless prompts, and sft 95%"


@pytest.mark.parametrize(("gap", "words"), [(0.0, "comes from choosing"), (0.3, "alone raises the judge")])
@pytest.mark.parametrize("seeds", [1, 2])
def test_the_control_is_named_next_to_the_run(tmp_path: Path, gap: float, words: str, seeds: int) -> None:
    run = TinyRun(tmp_path / "tiny").add(*STEPS)
    variant = tmp_path / "study" / "random"
    for seed in range(seeds):
        control = TinyRun(variant / f"seed-{seed}")
        control.evaluation["figures"]["rs"]["difference/judge"] = measure(gap + 0.02 * seed, 0.1)
        control.add("sft", "rs", "eval")
        path = control.folder / "rs" / "artifact" / MANIFEST
        manifest = json.loads(path.read_text())
        manifest["identity"]["rejection_sampling"]["select"] = "random"
        write(path, manifest)
    line = only(lines_of(run, str(variant if seeds > 1 else variant / "seed-0")), "Control: ")
    mean = f"{gap + 0.01:+.2f} (mean of 2 seeds" if seeds > 1 else f"{gap:+.2f} [{gap - 0.1:+.2f}, {gap + 0.1:+.2f}]"
    assert mean in line and words in line and "Learning the best: rs -0.03 [-0.07, +0.01]" in line
    assert (
        line.replace("`", "")
        in " ".join(run.report(config=Config(control=str(variant / "seed-0"))).page_markdown.read_text().split())
        or seeds > 1
    )


def test_a_control_that_chose_is_refused(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny").add(*STEPS)
    for path in (run.folder, tmp_path):
        with pytest.raises(UsageError, match=r"report\.control: .* holds no evaluated run .*select=random"):
            lines_of(run, str(path))
