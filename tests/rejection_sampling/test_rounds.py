"""Rounds of rejection sampling on toy policies: what is chosen, pooled, published, trained on and reported."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llamachat.answers import groups as groups_module
from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.errors import DataError
from llamachat.models.loading import load_policy
from llamachat.runs.artifacts import StepFolder, read_artifact
from llamachat.runs.record import MetricsRecord, SamplesRecord
from llamachat.tracking.metrics import check_names
from pipelines.planning.plan import make_plan
from pipelines.recipe.recipe import load
from rejection_sampling.train import dialog_step, make_dialogs
from sft.examples import read_step_dialogs
from tests.ppo.tiny_ppo import PAYS, write_function, write_prompts
from tests.recipes import run_command
from tests.rejection_sampling.tiny_rounds import groups_of, write_recipe
from tests.tiny_steps import inputs_of, read_lines, step_of, summary_of

# Writes down what it is asked, so that tests know each answer's prompt and score from outside of the stage.
pytestmark = pytest.mark.usefixtures("no_curves")

TELLING = """
import json

def score(prompts, completions, scores, **columns):
    values = [text.count("t") + text.count("a") / 8 for text in completions]
    with open("{log}", "a") as stream:
        for messages, text, one in zip(prompts, completions, values):
            stream.write(json.dumps([messages[-1]["content"], text, one]) + chr(10))
    return values
"""
TWO_ROUNDS: list[Any] = ["rs", {"rs": {"name": "rs-2"}}]


@dataclass(frozen=True)
class First:
    """One whole round."""

    recipe: Path
    scored: list[Any]  # prompt, answer and score of each call of the reward function

    @property
    def step(self) -> StepFolder:
        return step_of(self.recipe)


@pytest.fixture(scope="module")
def first(base: Path, tmp_path_factory: pytest.TempPathFactory) -> First:
    folder = tmp_path_factory.mktemp("first")
    prompts = write_prompts(folder / "prompts.jsonl", 50)
    with prompts.open("a") as stream:
        for number in range(10):  # with a turn that was answered before
            turns = [f"What is {number:o}?", "the cat and the mat", f"What is that {number:o}?"]
            messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
            stream.write(json.dumps({"prompt": messages, "id": f"m{number}"}) + "\n")
    (folder / "telling.py").write_text(TELLING.format(log=folder / "asked.jsonl"))
    recipe = write_recipe(folder / "one.yaml", base, scoring={"combine": f"{folder / 'telling.py'}:score"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "ANSWERS_PER_BATCH", 60)
        run_command(load(recipe), "rs")
    return First(recipe, read_lines(folder / "asked.jsonl"))


# --- one round


def test_each_prompts_best_answer_is_published(first: First) -> None:
    """By a plain loop over what lies in sampling/, and what the reward function was asked."""
    score_of = {(prompt, text): score for prompt, text, score in first.scored}
    winners = []
    for group in groups_of(first.step):
        best: tuple[float, str] | None = None
        for text, is_finished in zip(group.texts, group.finished, strict=True):
            score = text.count("t") + text.count("a") / 8
            can_win = is_finished and text.strip() and "INST]" not in text and "SYS>>" not in text
            if can_win and (best is None or score > best[0]):
                best = (score, text)
        if best is not None:
            winners.append(best)
    learnt, held_out = (read_lines(first.step.dialogs / f"{name}.jsonl") for name in ("dialogs", "held_out"))
    assert [dialog["messages"][-1]["content"] for dialog in [*learnt, *held_out]] == [text for _, text in winners]
    for dialog, (score, text) in zip([*learnt, *held_out], winners, strict=True):
        assert score_of[dialog["messages"][-2]["content"], text] == score, "it answers this very prompt"
        assert dialog["sampled"]["round"] == "rs"
    assert [dialog["sampled"]["score"] for dialog in learnt] == [score for score, _ in winners[: len(learnt)]]


def test_training_and_held_out_prompts_are_disjoint_and_the_test_side_is_only_evaluated(
    first: First,
) -> None:
    learnt, held_out = (
        {dialog["messages"][-2]["content"] for dialog in read_lines(first.step.dialogs / name)}
        for name in ("dialogs.jsonl", "held_out.jsonl")
    )
    tested = {prompt for prompt, _, _ in first.scored} - learnt - held_out
    assert len(learnt) > 20 and len(held_out) == 6 and not learnt & held_out
    counts = {prompt: sum(call[0] == prompt for call in first.scored) for prompt in tested}
    # The first and the final policy answer once; a prompt of the training side without a winner was asked K times.
    assert sorted(counts.values())[:8] == [2] * 8 and set(counts.values()) <= {2, 6, 6 + 3 * 4}


def test_earlier_answers_of_a_prompt_are_read_and_not_learnt(first: First, tiny_format: ChatFormat) -> None:
    dialogs = read_lines(first.step.dialogs / "dialogs.jsonl")
    marks = [[message.get("train") for message in dialog["messages"]] for dialog in dialogs]
    assert [None, False, None, None] in marks and set(map(tuple, marks)) == {(None, None), (None, False, None, None)}
    read, _ = read_step_dialogs(first.step.dialogs, tiny_format)
    assert len(read) == len(dialogs)
    long = next(dialog for dialog in read if len(dialog.messages) == 4)
    example = tiny_format.encode_dialog(long.messages, train_on=TrainOn.EVERY_ANSWER)
    trained = [token for token, is_trained in zip(example.input_ids, example.loss_mask, strict=True) if is_trained]
    assert tiny_format.decode_answer(trained) == long.messages[-1].content


def test_the_manifest_says_what_was_read_and_left_out(first: First) -> None:
    manifest = read_artifact(first.step.path, "dialogs").manifest
    training = groups_of(first.step)[: int(summary_of(first.step)["rs/prompts"])]
    unfinished = sum(not is_finished for group in training for is_finished in group.finished)
    empty = sum(
        done and not text.strip() for group in training for done, text in zip(group.finished, group.texts, strict=True)
    )
    dropped = manifest.dropped_records
    assert dropped["answers left out: truncated at the length limit"] == unfinished > 0
    assert dropped["answers left out: empty, or with a tag of the chat format"] >= empty > 0
    assert manifest.details["dialogs"] == len(read_lines(first.step.dialogs / "dialogs.jsonl"))
    assert manifest.details["temperatures"] == [1.0] and manifest.inputs.keys() == {"base", "reward_function"}
    policy = read_artifact(first.step.path, "policy").manifest
    assert policy.inputs["dialogs"] == str(first.step.dialogs) and policy.fingerprint == manifest.fingerprint
    load_policy(first.step.artifact)


def test_figures_of_the_round_are_those_of_its_groups(first: First) -> None:
    summary = summary_of(first.step)
    check_names(summary)
    assert (
        summary["rs/reward_best"] > summary["rs/reward_mean"]
        and summary["rs/reward_best"] > summary["rs/reward_median"]
    )
    training = groups_of(first.step)[: int(summary["rs/prompts"])]
    usable = [
        [score for score, done, good in zip(g.combined, g.finished, g.allowed, strict=True) if done and good]
        for g in training
    ]
    assert summary["rs/usable_fraction"] == pytest.approx(sum(map(len, usable)) / (6 * len(training)))
    assert (
        summary["rs/winners"] == summary["rs/pool_size"] == sum(map(bool, usable))
        and summary["rs/pool_from_earlier"] == 0
    )
    rows = MetricsRecord(first.step.metrics).read()
    check_names(name for row in rows for name in row if name not in ("step", "time"))
    assert [row["rs/step"] for row in rows if "rs/step" in row] == list(range(1, -(-len(training) // 10) + 1))
    assert [row["sft/step"] for row in rows if "sft/loss" in row] == list(range(1, -(-len(usable) // 8) + 1))
    shown = [row for row in SamplesRecord(first.step.samples).read() if "which" in row]
    assert {row["which"] for row in shown} == {"best", "worst"}


def test_pictures_are_drawn_and_their_numbers_lie_beside(first: First) -> None:
    for name in ("best_of_n", "temperatures", "test_scores"):
        assert (first.step.figures / f"{name}.png").stat().st_size > 10_000
    curves = json.loads((first.step.figures / "best_of_n.json").read_text())
    assert [(curve["policy"], curve["temperature"]) for curve in curves] == [
        ("base", 0.8),
        ("base", 1.0),
        ("base", 1.2),
    ]
    for curve in curves:
        assert len(curve["best"]) == len(curve["median"]) == 4
        assert curve["best"][0] == pytest.approx(curve["median"][0])
        assert (np.diff(curve["best"]) >= -1e-9).all()
        assert all(np.array(curve["best_low"]) <= curve["best"]) and all(curve["best"] <= np.array(curve["best_high"]))
        assert summary_of(first.step)[f"rs/sweep/best_at_{curve['temperature']:g}"] == curve["best"][-1]


def test_a_finished_round_is_done_and_its_sampling_is_in_its_identity(first: First) -> None:
    assert [step.verdict for step in make_plan(load(first.recipe))] == ["done"]
    for change in ("rejection_sampling.samples_per_prompt=5", "sft.epochs=2", "rollout.max_new_tokens=11"):
        assert [step.verdict for step in make_plan(load(first.recipe, [change]))] == ["changed"], change
    assert [step.verdict for step in make_plan(load(first.recipe, ["tracking.log_every=9"]))] == ["done"]


# --- a second round

GOOD, BAD = "that that that that that that tttt", "mmm"


def two_rounds(first: First, base: Path, folder: Path) -> Path:
    """A recipe of two rounds over a copy of the first, in whose dialogs two answers are another's."""
    shutil.copytree(first.step.path.parent, folder / "runs" / "two")
    shutil.copy(first.recipe.parent / "prompts.jsonl", folder)
    scoring = {"combine": load(first.recipe).sections.scoring.combine}
    recipe = write_recipe(folder / "two.yaml", base, steps=TWO_ROUNDS, scoring=scoring)
    path = step_of(recipe).dialogs / "dialogs.jsonl"
    dialogs = read_lines(path)
    for dialog, answer in zip(dialogs, (GOOD, *[BAD] * 6), strict=False):
        dialog["messages"][-1]["content"] = answer
    path.write_text("".join(json.dumps(dialog) + "\n" for dialog in dialogs))
    return recipe


@pytest.fixture
def edited(first: First, base: Path, tmp_path: Path) -> Path:
    """The second round is still to come."""
    return two_rounds(first, base, tmp_path)


@pytest.fixture(scope="module")
def second(first: First, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both rounds are there."""
    recipe = two_rounds(first, base, tmp_path_factory.mktemp("second"))
    run_command(load(recipe), "rs")
    return recipe


def by_prompt(step: StepFolder) -> dict[str, list[tuple[str, str]]]:
    """Answers and the rounds that they are of, by their prompt."""
    by_question: dict[str, list[tuple[str, str]]] = {}
    for dialog in read_lines(step.dialogs / "dialogs.jsonl"):
        prompt = json.dumps([message["content"] for message in dialog["messages"][:-1]])
        by_question.setdefault(prompt, []).append((dialog["messages"][-1]["content"], dialog["sampled"]["round"]))
    return by_question


def worth(text: str) -> float:
    return text.count("t") + text.count("a") / 8


def test_a_second_round_keeps_the_better_winner_of_each_prompt(second: Path) -> None:
    before, pooled = (by_prompt(step_of(second, name)) for name in ("rs", "rs-2"))
    summary = summary_of(step_of(second, "rs-2"))
    num_prompts = int(summary["rs/prompts"])
    # Both rounds ask the same prompts in the same order, so the n-th groups answer one prompt.
    first_groups, groups = (groups_of(step_of(second, name))[:num_prompts] for name in ("rs", "rs-2"))
    own = [group.texts[group.candidates[0]] if group.candidates else None for group in groups]
    at = [number for number, group in enumerate(first_groups) if group.candidates]
    assert len(at) == len(before) and all(len(answers) == 1 for answers in pooled.values())
    for number, (prompt, ((earlier, _),)) in zip(at, before.items(), strict=True):
        new = own[number]
        is_new = new is not None and worth(new) > worth(earlier)
        assert pooled.pop(prompt) == [(new, "rs-2") if is_new else (earlier, "rs")]
    # What is left are prompts that had no winner before.
    assert all(where == "rs-2" and text in own for ((text, where),) in pooled.values())
    rounds = [answers[0][1] for answers in by_prompt(step_of(second, "rs-2")).values()]
    assert rounds.count("rs") > 1 and rounds.count("rs-2") > 1
    assert summary["rs/pool_from_earlier"] == rounds.count("rs") and summary["rs/pool_size"] == len(rounds)
    assert summary["rs/reward_best"] > summary["rs/reward_mean"]


def test_the_identity_of_a_round_holds_the_dialogs_of_those_before_it(second: Path, tmp_path: Path) -> None:
    manifest = read_artifact(step_of(second, "rs-2").path, "policy").manifest
    assert set(manifest.identity["inputs"]) == {"policy", "dialogs/rs"}
    assert manifest.identity["sft"]["epochs"] == 1
    dialogs = read_artifact(step_of(second, "rs-2").path, "dialogs").manifest
    assert dialogs.inputs["dialogs/rs"] == str(step_of(second).dialogs)
    shutil.copytree(step_of(second).path.parent, tmp_path / "copied", symlinks=True)
    copied = load(second, [f"run.dir={tmp_path}/copied"])
    assert [step.verdict for step in make_plan(copied)] == ["done", "done"]
    path = tmp_path / "copied" / "rs" / "dialogs" / "dialogs.jsonl"
    path.write_text(path.read_text().replace(GOOD, GOOD + "t"))
    plan = make_plan(copied)
    assert [step.verdict for step in plan] == ["done", "changed"] and "inputs.dialogs/rs" in plan[1].why


def test_a_pool_of_all_holds_every_winner_of_both_rounds_once(edited: Path) -> None:
    before = by_prompt(step_of(edited))
    config, inputs = inputs_of(edited, "rs-2", "rejection_sampling.pool=all", "rejection_sampling.sweep_prompts=0")
    make_dialogs(config, dialog_step(config, inputs))
    second = step_of(edited, "rs-2")
    pooled = by_prompt(second)
    samples = groups_of(second)
    own = {group.texts[group.candidates[0]] for group in samples if group.candidates}
    for prompt, answers in pooled.items():
        texts = [text for text, _ in answers]
        assert len(set(texts)) == len(texts) <= 2
        assert prompt not in before or before[prompt][0][0] in texts
        assert all(text in own for text, where in answers if where == "rs-2")
    assert sum(map(len, pooled.values())) > 1.5 * len(pooled) and any(
        (BAD, "rs") in answers for answers in pooled.values()
    )
    assert "figures" not in {path.name for path in second.path.iterdir()}, "without prompts for it nothing is swept"


def test_the_draws_of_a_second_round_are_others(edited: Path) -> None:
    """From the same policy the same prompts get other answers: else a round would add nothing."""
    config, inputs = inputs_of(edited, "rs-2", "rejection_sampling.sweep_prompts=0")
    object.__setattr__(inputs, "policy", None)  # the base again, as in the first round
    make_dialogs(config, dialog_step(config, inputs))
    one, two = (groups_of(step_of(edited, name))[0].texts for name in ("rs", "rs-2"))
    assert one != two


def test_a_line_that_an_edit_broke_is_reported_before_anything_is_sampled(edited: Path) -> None:
    path = step_of(edited).dialogs / "dialogs.jsonl"
    path.write_text(path.read_text() + '{"messages": [{"role": "user", "content": "no answer"}]}\n')
    config, inputs = inputs_of(edited, "rs-2")
    with pytest.raises(DataError, match=r"dialogs\.jsonl: 1 record breaks the rules"):
        make_dialogs(config, dialog_step(config, inputs))
    assert not list(step_of(edited, "rs-2").path.glob("sampling/*"))


def test_earlier_winners_that_say_nothing_or_do_not_fit_are_counted(edited: Path) -> None:
    path = step_of(edited).dialogs / "dialogs.jsonl"
    line = {"messages": [{"role": "user", "content": "cat " * 200}, {"role": "assistant", "content": "mat"}]}
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    config, inputs = inputs_of(edited, "rs-2", "rejection_sampling.sweep_prompts=0")
    manifest = make_dialogs(config, dialog_step(config, inputs)).manifest
    assert manifest.dropped_records["earlier winners left out: empty, or longer than the models read"] == 1


# --- learning


def test_the_policy_learns_what_is_chosen(base: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "learning.yaml",
        base,
        prompts=240,
        scoring={"combine": write_function(tmp_path / "pays.py", PAYS)},
        rejection_sampling={"samples_per_prompt": 32, "sweep_prompts": 0, "test_prompts": 48, "sft": {"epochs": 2}},
        rollout={"max_new_tokens": 24},
        sft={"learning_rate": 2e-3},
    )
    run_command(load(recipe), "rs")
    summary = summary_of(step_of(recipe))
    assert summary["rs/test/difference/reward_combined_low"] > 0.4
    assert summary["rs/test/final/score"] > summary["rs/test/start/score"] == pytest.approx(0.0, abs=1e-6)
    assert summary["sft/epoch"] == 2.0 and summary["sft/eval_loss"] < summary["sft/eval_loss_base"]
