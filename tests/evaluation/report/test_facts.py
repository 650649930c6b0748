"""What the report reads and how it words it: verdicts, costs, what is missing, files that cannot be understood."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from evaluation.report import step
from evaluation.report.config import Config
from evaluation.report.headline import verdict
from evaluation.report.page import number, signed
from llamachat.runs.artifacts import StepFolder
from llamachat.runs.reader import Benchmark, Evaluation, Measure, benchmark_folder
from tests.evaluation.report.tiny_report import HOSTILE, TinyRun, measure, write


def text_of(run: TinyRun, **config: Any) -> str:
    """The report as Markdown."""
    return run.report(config=Config(**config)).page_markdown.read_text(encoding="utf-8")


def compared(**differences: dict[str, Any]) -> Evaluation:
    """An evaluation of ppo against sft with these differences alone."""
    figures = {"sft": {}, "ppo": {f"difference/{name}": one for name, one in differences.items()}}
    return Evaluation.model_validate({"reference": "sft", "policies": ["sft", "ppo"], "figures": figures})


UP, DOWN, NONE, BARE = measure(0.3, 0.1), measure(-0.3, 0.1), measure(0.02, 0.1), measure(0.3)
BEATS, BELOW = r"ppo beats sft in combined score: \+0.30 \[\+0.20, \+0.40\]; ", r"below it: -0.30 \[-0.40, -0.20\]; "
HOLDS = r"ppo does not beat sft in combined score: \+0.02 \[-0.08, \+0.12\], an interval that includes a draw; "


@pytest.mark.parametrize(
    ("score", "judge", "sentence"),
    [
        (UP, UP, rf"{BEATS}.* agrees: \+0.30 \[\+0.20, \+0.40\]\."),
        (UP, NONE, rf"{BEATS}.* does not follow: \+0.02"),
        (UP, DOWN, rf"{BEATS}.* says the opposite and puts it below sft: -0.30"),
        (DOWN, DOWN, rf"{BELOW}.* agrees that it is worse: -0.30"),
        (DOWN, UP, rf"{BELOW}.* puts it above sft: \+0.30"),
        (NONE, DOWN, rf"{HOLDS}.* puts it below sft: -0.30"),
        (NONE, NONE, rf"{HOLDS}.* sees no difference: \+0.02"),
        (UP, BARE, rf"{BEATS}.* without an interval: \+0.30\.$"),
        (UP, None, rf"{BEATS}no judge"),
        (BARE, NONE, r"ppo against sft in combined score: \+0.30, without an interval"),
    ],
)
def test_a_verdict_says_what_the_intervals_say(score: Any, judge: Any, sentence: str) -> None:
    differences = {"score": score} if judge is None else {"score": score, "judge": judge}
    assert re.search(sentence, verdict(compared(**differences), "ppo"))


def test_a_verdict_is_on_the_ranking_and_half_of_the_pairs_is_a_draw() -> None:
    """Not on the mean of the scores, in which an unsafe answer can lie above a safe one."""
    evaluation = compared(score=UP)
    for value, words in ((0.62, "ppo beats sft"), (0.52, "includes a draw"), (0.4, "it is below it")):
        evaluation.figures["ppo"]["superiority"] = Measure(value, value - 0.05, value + 0.05, 400)
        sentence = verdict(evaluation, "ppo")
        assert words in sentence and f"{value:.1%} [{value - 0.05:.1%}, {value + 0.05:.1%}]" in sentence


def test_a_verdict_is_on_the_first_score_that_there_is() -> None:
    assert verdict(compared(reward_safety=UP), "ppo").startswith("ppo beats sft in safety score: +0.30 [")
    assert "was not measured" in verdict(compared(), "ppo")


def test_numbers_keep_the_side_of_zero_where_it_matters() -> None:
    assert (number(-0.004), number(-1.5), number(12.345, digits=1)) == ("0.00", "-1.50", "12.3")
    assert (signed(-0.004), signed(0.004), signed(0.0), signed(-1.5)) == ("-0.00", "+0.00", "+0.00", "-1.50")


def test_costs_are_those_written_down_else_the_trainings(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny").add("sft", "rs")
    write(run.folder / "sft" / "cost.json", {"seconds": 7200.0, "peak_gib": 21.54, "starts": 2})
    text = text_of(run)
    assert "| sft | 2.0 h | 21.5 GiB | 2 |" in text
    assert "| rs | 30 s (training alone) | 1.5 GiB | - |" in text and "| all | 2.0 h |" in text


def test_what_an_evaluation_lacks_is_named(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny")
    kept = ("reward_helpfulness", "difference/reward_helpfulness")
    figures = run.evaluation["figures"]
    run.evaluation["figures"] = {
        policy: {name: one for name, one in measures.items() if name in kept} for policy, measures in figures.items()
    }
    run.evaluation |= {"curves": [], "samples": [], "refusal_classifier": None}
    text = text_of(run.add("sft", "rs", "ppo", "gatt", "eval"))
    assert "The evaluation lacks" not in text, "there are no models and no prompts to measure more with"
    for words in ("rm/helpfulness (helpfulness scores)", "rm/safety (", "rm/judge ("):
        assert words not in text, "the recipe has them, they are not finished"
    assert "did not check how far instructions are kept" in text and "knows nothing of gatt" in text
    assert "rs beats sft in helpfulness score: +0.42 [+0.34, +0.50]; no judge" in text
    measurable = TinyRun(
        tmp_path / "second", evaluation=run.evaluation, data={"adversarial": ["a"], "borderline": ["b"]}
    )
    text = text_of(measurable.add("sft", "rm/safety", "rm/judge", "rs", "ppo", "eval"))
    for words in (
        "safety scores",
        "the judge's scores",
        "violations by the safety model",
        "refusals of harmless prompts",
    ):
        assert f"The evaluation lacks {words}" in text
    assert "how far instructions are kept" not in text, "the recipe has no gatt"
    text = text_of(run)
    # Of what the evaluation lacks, the steps' own figures are shown.
    assert "| ours: before gatt | 2.2%" in text


def test_an_evaluation_of_one_policy_compares_nothing(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny")
    run.evaluation["policies"] = ["sft"]
    text = text_of(run.add("sft", "eval"))
    assert "Only sft was evaluated: there is nothing yet to compare it with." in text and "(best)" not in text


def test_benchmarks_of_some_policies_are_shown_next_to_other_models(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny").add("sft", "rs", "ppo")
    assert "Published sets of questions" not in text_of(run)
    share = Measure(0.25, 0.2, 0.3, 98)
    for artifact in run.artifacts[:2]:
        result = Benchmark(
            title="A set", figures={"refused": share}, published={"Llama": {"refused": 0.5}}, notes=["cut"]
        )
        benchmark_folder(artifact).mkdir(parents=True)
        write(benchmark_folder(artifact) / "set.json", result.model_dump(mode="json"))
    text = text_of(run)
    assert "| figure, with its 95% interval | of | sft | rs | Llama |" in text
    assert re.search(r"\| +refused \| 98 \| 25.0% .*\[20.0%, 30.0%\].* \| 25.0% .* \| 50.0%.* \|", text)
    assert "A set, rs: cut" in text


def test_samples_and_curves_can_be_left_out(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny").add("sft", "rs", "ppo", "eval")
    folder = run.report(config=Config(samples=0, shows_curves=False))
    text = folder.page.read_text(encoding="utf-8")
    assert "Answers side by side" not in text and "Training curves" not in text and "alert" not in text
    assert not (folder.figures / "curves").exists()
    few = text_of(run, samples=2, shows_curves=False)
    assert re.findall(r"<summary>(\w+):", few) == ["helpfulness", "safety"], "kinds of prompts in turn"


def test_wandb_gets_the_pictures_and_no_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Any]] = {"figure": [], "summary": []}

    class Tracker:
        def figure(self, name: str, path: Path) -> None:
            seen["figure"].append((name, path.suffix))

        def summary(self, metrics: dict[str, float]) -> None:
            seen["summary"].append(metrics)

    @contextmanager
    def open_record(inputs: Any, prefix: str, **_: Any) -> Iterator[Tracker]:
        assert prefix == "report" and HOSTILE not in json.dumps(inputs.identity)
        yield Tracker()

    monkeypatch.setattr(step, "open_record", open_record)
    folder = TinyRun(tmp_path / "tiny").add("sft", "rs").report()
    assert seen["figure"] == [(name, ".png") for name in ("best_of_n", "temperatures_sft", "temperatures_rs")]
    assert seen["summary"][0]["report/kib"] == pytest.approx(folder.page.stat().st_size / 1024)


def test_it_is_written_again_over_what_a_killed_command_left(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny").add("sft")
    folder = StepFolder(run.folder / "report-9")
    folder.figures.mkdir(parents=True)
    (folder.figures / "old.png").write_bytes(b"half")
    folder.page.write_text("half", encoding="utf-8")
    assert run.report().page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    assert not (folder.figures / "old.png").exists()


def test_a_step_that_a_limit_ended_says_how_far_it_came(tmp_path: Path) -> None:
    run = TinyRun(tmp_path / "tiny").add("sft", "rm/helpfulness", "rs", "ppo")
    tuned, judged, sampled, learnt = (artifact.manifest.details for artifact in run.artifacts)
    with (run.folder / "sft" / "metrics.jsonl").open("a") as record:
        record.write('{"step": 3, "sft/epoch": 0.25}\n{"step": 3, "sft/eval_loss": 2.5}\n')
    for details, by in ((tuned, "run.max_hours"), (judged, "max_hours"), (sampled, "max_hours")):
        details["ended_by"] = by
    learnt["end"] = "patience"
    text = text_of(run)
    for phrase in (
        "| sft: epochs | 2 | 0.25 of 1.5, ended by run.max_hours |",
        "| rm/helpfulness: epochs | 1 | at most 1, ended by max_hours |",  # its record is gone
        "| ppo: iterations | 200 to 400 | 2 of 40, ended by patience |",
        "| ppo | policy: 2 of 40 iterations, ended by patience |",
        "| rs | policy: ended by max_hours |",
    ):
        assert phrase in text
    learnt |= {"end": "hours", "ended_by": "max_hours", "iterations_done": 5}
    text = text_of(run)
    assert "| 200 to 400 | 5 of 40, ended by max_hours |" in text
