"""`llamachat compare`: how the configurations of two runs differ, figures with intervals, and when two numbers do not compare."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamachat.errors import ArtifactError, UsageError
from llamachat.maths.intervals import Difference, independent_difference, wilson
from llamachat.runs.atomic import write_json
from llamachat.runs.reader import read_run
from llamachat.runs.record import MetricsRecord
from pipelines.cli.main import main
from pipelines.studies.compare import Comparison, compare_runs
from pipelines.studies.differences import Compared
from tests.pipelines.cli.test_command_line import python

DIGEST = {name: format(number, "x") * 64 for number, name in enumerate(("old", "new", "base", "other"), start=10)}
SCORES = [0.0, 1.0, 5.0, -3.0, 2.0, 8.0]


def write_step(
    run: Path,
    name: str,
    summary: dict[str, Any],
    *,
    identity: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    **manifest: Any,
) -> Path:
    folder = run / name
    full_identity = {
        "step": name,
        "command": name.partition("/")[0],
        "data": {},
        "base": {},
        "inputs": {},
        **(identity or {}),
    }
    values = {
        "kind": "policy",
        "step": name,
        "fingerprint": "f" * 64,
        "seed": 0,
        "identity": full_identity,
        "files": {"model.safetensors": str(folder)},
        "created": f"2026-01-0{len(name)}",
        **manifest,
    }
    write_json(folder / "artifact" / "manifest.json", values)
    write_json(folder / "summary.json", summary)
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe or {}))
    return folder


def answers_of(scores: list[float]) -> dict[str, Any]:
    many = len(scores)
    lists = dict.fromkeys(("helpfulness", "safety", "judge", "combined", "standardised"), scores)
    return {"texts": ["a"] * many, "tokens": [3] * many, "finished": [True] * many, "kl": None, **lists}


def evaluated(**changes: Any) -> str:
    return json.dumps({"reference": "a", "policies": [], "figures": {"a": {}}} | changes)


def figure(comparison: Comparison, name: str) -> Compared:
    return next(one for step in comparison.steps for one in step.figures if one.name == name)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe 1998, table II: 56 of 70 less 48 of 80 by method 10 is 0.2, 0.0524 to 0.3339.
    first, second = Difference(56 / 70, *wilson(56, 70)), Difference(48 / 80, *wilson(48, 80))
    difference = independent_difference(first, second)
    assert (difference.value, difference.low, difference.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_differences_are_reported_once_key_by_key_and_by_what_they_decide(tmp_path: Path) -> None:
    for name, rate, micro, digest, path in (("a", 0.1, 8, "old", "x.jsonl"), ("b", 0.2, 4, "new", "x.jsonl")):
        for step in ("sft", "rs"):
            identity = {
                "base": {"model": DIGEST["base"]},
                "data": {"sft": [{"path": DIGEST[digest]}]},
                "sft": {"learning_rate": rate},
                "inputs": {} if step == "sft" else {"policy": DIGEST[digest]},
            }
            recipe = {
                "run": {"dir": f"runs/{name}", "seed": 0},
                # Where the base lies is no difference while its content is the same.
                "base": {"model": f"/somewhere/{name}"},
                "data": {"sft": [{"path": path}], "prompts": [{"path": name}]},
                "sft": {"learning_rate": rate, "rows_per_microbatch": micro},
                "ppo": {"iterations": micro},  # neither step reads it
                "steps": ["sft", {"rs": {"sft": {"learning_rate": rate}}}],
            }
            write_step(tmp_path / name, step, {}, identity=identity, recipe=recipe, versions={"torch": f"2.{micro}"})
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    assert [(change.key, change.a, change.b, change.kind, change.steps) for change in comparison.changes] == [
        ("data.sft[0].path", "x.jsonl (aaaaaaaaaaaa)", "x.jsonl (bbbbbbbbbbbb)", "result", ("rs", "sft")),
        ("sft.learning_rate", "0.1", "0.2", "result", ("rs", "sft")),
        ("inputs.policy", "(aaaaaaaaaaaa)", "(bbbbbbbbbbbb)", "input", ("rs",)),
        ("sft.rows_per_microbatch", "8", "4", "operational", ("rs", "sft")),
        ("versions.torch", '"2.8"', '"2.4"', "software", ("rs", "sft")),
    ]


@pytest.mark.parametrize("step", ["rs", "eval"])
def test_answers_to_the_same_prompts_are_paired(step: str, tmp_path: Path) -> None:
    name = {"rs": "rs/test/final/reward_helpfulness", "eval": "eval/ppo/reward_helpfulness"}[step]
    for run, shift in (("a", 0.0), ("b", 0.25)):
        scores = [score + shift for score in SCORES]
        value = sum(scores) / len(scores)
        folder = write_step(tmp_path / run, step, {name: value, f"{name}_low": value - 2, f"{name}_high": value + 2})
        place = "sampling/test-final.json" if step == "rs" else "artifact/answers/ppo.json"
        write_json(folder / place, answers_of(scores))
    paired = figure(compare_runs(tmp_path / "a", tmp_path / "b"), name)
    # Every answer gained the same: prompt by prompt there is no doubt, however far the prompts lie apart.
    assert paired.how == "paired" and (paired.difference, paired.low, paired.high) == pytest.approx((0.25,) * 3)
    manifest = tmp_path / "b" / step / "artifact" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["identity"]["data"] = {"prompts": [{"path": "others"}]}
    write_json(manifest, values)
    with pytest.raises(UsageError, match="already exists"):
        compare_runs(tmp_path / "a", tmp_path / "b")
    apart = figure(compare_runs(tmp_path / "a", tmp_path / "b", overwrite=True), name)
    # Two intervals of half width 2: sqrt(2^2 + 2^2).
    assert apart.how == "independent"
    assert (apart.difference, apart.low, apart.high) == pytest.approx((0.25, 0.25 - 8**0.5, 0.25 + 8**0.5))


@pytest.mark.parametrize("step", ["distill", "eval"])
def test_gains_over_the_first_policy_are_paired_too(step: str, tmp_path: Path) -> None:
    name = {"distill": "distill/test/difference/judge", "eval": "eval/ppo/difference/judge"}[step]
    for run, gain in (("a", 1.0), ("b", 1.5)):
        # The first policies' answers differ from run to run; what is gained over them is the same for every prompt.
        first = [score * gain for score in SCORES]
        final = [score + gain for score in first]
        folder = write_step(tmp_path / run, step, {name: gain, f"{name}_low": 0.0, f"{name}_high": 3.0})
        if step == "distill":
            write_json(folder / "sampling/test-first.json", {"evaluation": answers_of(first), "constants": {}})
            write_json(folder / "sampling/test-final.json", answers_of(final))
        else:
            write_json(folder / "artifact/answers/sft.json", answers_of(first))
            write_json(folder / "artifact/answers/ppo.json", answers_of(final))
            plain = {"reference": "sft", "policies": [], "figures": {"sft": {}}}
            write_json(folder / "artifact/evaluation.json", plain)
    compared = figure(compare_runs(tmp_path / "a", tmp_path / "b"), name)
    assert (compared.how, compared.low, compared.high) == ("paired", pytest.approx(0.5), pytest.approx(0.5))
    assert compared.remark == ("" if step == "distill" else "each relative to its own first policy")


def test_answers_that_do_not_give_the_figure_are_not_paired(tmp_path: Path) -> None:
    for run in ("a", "b"):
        folder = write_step(tmp_path / run, "rs", {"rs/test/final/judge": 9.0 if run == "b" else 8.0})
        write_json(folder / "sampling/test-final.json", answers_of(SCORES))
    compared = figure(compare_runs(tmp_path / "a", tmp_path / "b"), "rs/test/final/judge")
    assert (compared.difference, compared.how) == (1.0, None)


def test_scores_of_two_reward_models_or_on_two_scales_are_not_subtracted(tmp_path: Path) -> None:
    names = ("reward_helpfulness", "reward_safety", "reward_combined", "judge", "score", "response_tokens")
    for run, digest in (("a", "old"), ("b", "new")):
        inputs = {"reward_model/helpfulness": DIGEST[digest], "reward_model/safety": DIGEST["base"]}
        figures = {f"ppo/test/final/{name}": 1.0 for name in names}
        write_step(tmp_path / run, "ppo", figures, identity={"inputs": {**inputs, "policy": DIGEST["base"]}})
        of_ppo = {name: {"value": 2.0, "low": None, "high": None} for name in ("score", "win_rate/judge")}
        plain = {"reference": "ppo", "policies": ["ppo"], "figures": {"ppo": of_ppo}}
        write_json(write_step(tmp_path / run, "eval", {}) / "artifact/evaluation.json", plain)
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    differences = {one.name: one.difference for step in comparison.steps for one in step.figures}
    # The reference of the evaluation is another policy in each run, since its files differ.
    assert differences == {
        "ppo/test/final/reward_helpfulness": None,
        "ppo/test/final/reward_safety": 0.0,
        "ppo/test/final/reward_combined": None,
        "ppo/test/final/judge": 0.0,
        "ppo/test/final/score": None,
        "ppo/test/final/response_tokens": 0.0,
        "eval/ppo/score": None,
        "eval/ppo/win_rate/judge": 0.0,
    }
    assert figure(comparison, "ppo/test/final/score").remark == "scored by another helpfulness model in each"
    assert figure(comparison, "eval/ppo/score").remark == "each on the scale of its own first policy"
    assert figure(comparison, "eval/ppo/win_rate/judge").remark == "each relative to its own first policy"


def two_runs(tmp_path: Path) -> tuple[Path, Path]:
    for run, end in (("x/seed-0", 2.0), ("y/seed-0", 1.0)):
        auroc = {"rm/safety/auroc": 0.9, "rm/safety/auroc_low": 0.8, "rm/safety/auroc_high": end / 2 + 0.2}
        folder = write_step(tmp_path / run, "rm/safety", auroc)
        for step in (1, 2, 3):
            MetricsRecord(folder / "metrics.jsonl").append(step, {"rm/safety/loss": end * step, "rm/safety/epoch": 1})
        write_step(tmp_path / run, "sft", {"sft/loss": 1.0}, files={"model.safetensors": "equal"})
    write_step(tmp_path / "y/seed-0", "ppo", {})
    return tmp_path / "x/seed-0", tmp_path / "y/seed-0"


def test_the_command_writes_tables_and_pictures_and_prints_plain_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = two_runs(tmp_path)
    assert main(["compare", str(one), str(other)]) == 0
    out = tmp_path / "x" / "compare-x-seed-0-y-seed-0"
    assert sorted(path.name for path in out.iterdir()) == ["compare.json", "compare.md", "curves-rm-safety.png"]
    assert (out / "curves-rm-safety.png").read_bytes()[:4] == b"\x89PNG"
    text = capsys.readouterr().out
    assert "The same in both\n  sft: every file of the artifact is identical.\n" in text
    assert "Only in B\n  ppo\n" in text
    assert "rm/safety/auroc  0.900  0.900  0 (-0.316 to +0.224)" in text  # hypot(0.1, 0.3) and hypot(0.2, 0.1)
    assert "0 of 1 interval exclude 0" in " ".join(text.split())
    page = (out / "compare.md").read_text()
    assert page.startswith("# x/seed-0 (A) and y/seed-0 (B)\n")
    assert (
        "| `rm/safety/auroc`, fraction | 0.900 (0.800 to 1.200) | 0.900 (0.800 to 0.700) | 0 (-0.316 to +0.224) |"
        in page
    )
    assert "![curves of rm/safety](curves-rm-safety.png)" in page
    plain = json.loads((out / "compare.json").read_text())
    assert plain["only"] == {"a": [], "b": ["ppo"]}
    assert [(step["name"], step["is_same"], step["picture"]) for step in plain["steps"]] == [
        ("sft", True, None),
        ("rm/safety", False, "curves-rm-safety.png"),
    ]


def test_a_run_that_is_going_on_and_a_step_by_reference_are_read(tmp_path: Path) -> None:
    one, other = two_runs(tmp_path)
    (other / "sft" / "artifact" / "manifest.json").unlink()
    (tmp_path / "z" / "rm").mkdir(parents=True)
    (tmp_path / "z" / "rm" / "safety").symlink_to(one / "rm" / "safety")
    write_json(other / "sft" / "identity.json", {"identity": {"step": "sft", "data": {}}})
    write_json(other / "report" / "identity.json", {"identity": {"step": "report"}})
    assert list(read_run(other)) == ["ppo", "rm/safety", "sft"]
    assert "Not finished in B." in (compare_runs(one, other).out / "compare.md").read_text()
    assert [step.is_same for step in compare_runs(one, tmp_path / "z").steps] == [True]


def test_what_is_no_run_is_refused_in_words(tmp_path: Path) -> None:
    one, other = two_runs(tmp_path)
    (tmp_path / "empty").mkdir()
    write_step(tmp_path / "gatt", "gatt", {})
    for run, expected in (
        (tmp_path / "none", r"none: no such folder\. .* Correct the path\."),
        (tmp_path / "empty", r"empty: no steps here\. .* Name the folder of a run"),
        (other / "sft", r"sft: this is the folder of a step, not of a run\. .* such as .*y/seed-0\."),
        (
            tmp_path / "y",
            r"y: this is not a run folder, since 'seed-0/ppo' contains the step 'ppo'\. .*such as .*y/seed-0\.",
        ),
        (one, r"is the same run as .*x/seed-0\. .* run\.parent="),
        (
            tmp_path / "gatt",
            r"have no step in common: sft, rm/safety in the first, gatt in the second\. .* Run the same step in both",
        ),
    ):
        with pytest.raises(UsageError, match=expected):
            compare_runs(one, run)
    assert main(["compare", str(one), str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("summary.json", '{"sft/loss": 1.', "the file: Invalid JSON"),
        ("summary.json", '{"sft/loss": "low"}', "sft/loss: Input should be a valid number"),
        ("summary.json", "[1]", "the file: Input should be an object"),
        ("artifact/manifest.json", "", "1 validation error"),
        ("config.yaml", "a: [", "while parsing"),
        ("config.yaml", "7", "the file: Input should be a valid dictionary"),
        ("artifact/evaluation.json", "{", "the file: Invalid JSON"),
        (
            "artifact/evaluation.json",
            evaluated(policies=["rs", "a"]),
            "the file: Value error, figures has nothing on rs",
        ),
        ("artifact/evaluation.json", evaluated(policies="a"), "policies: Input should be a valid array"),
        ("artifact/evaluation.json", evaluated(curves=[{"policy": "a"}]), "curves.0.temperature: Field required"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, file: str, text: str, expected: str) -> None:
    one, other = two_runs(tmp_path)
    (other / "rm/safety" / file).write_text(text)
    with pytest.raises(ArtifactError) as caught:
        compare_runs(one, other)
    assert f"{other}/rm/safety/{file}: cannot be read ({expected}" in str(caught.value)
    assert re.search(r"rerun the step with `--overwrite`|Make the artifact again", str(caught.value))


def test_it_starts_without_what_trains(tmp_path: Path) -> None:
    one, other = two_runs(tmp_path)
    done = python(
        "import sys; from pipelines.cli.main import main;"
        f"print(main(['compare', {str(one)!r}, {str(other)!r}]),"
        " sorted({'torch', 'transformers', 'wandb', 'sklearn'} & set(sys.modules)))"
    )
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
