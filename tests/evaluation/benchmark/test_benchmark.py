"""`llamachat benchmark`: figures against hand numbers, questions as they are asked, and kills."""

import json
import math
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.benchmark import run as running
from evaluation.benchmark.asking import Respondent
from evaluation.benchmark.run import Request, chosen_sets, run_benchmark
from evaluation.benchmark.sets import SETS, Question, choices, gsm8k, ifeval, last_number, refusals, truthfulqa
from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import Tuning
from llamachat.errors import UsageError
from llamachat.models.reward_model import RewardModel
from llamachat.runs.artifacts import Artifact, StepFolder
from llamachat.runs.atomic import INCOMING
from llamachat.runs.reader import benchmark_folder, read_benchmarks, step_of
from pipelines.cli.main import main
from tests.killing import killed_at
from tests.serving.scripted import Recording, answering, policy_of
from tests.tiny_llama import publish_policy, tiny_llama

QA = Question("q", "the cat", False, {"best": "Paris.", "true": ["Paris.", "the mat."], "false": ["France."]})


def question(text: str = "the cat", *, is_harmful: bool = False, **measured: Any) -> Question:
    return Question(f"id of {text}", text, is_harmful, measured)


def said(*texts: str) -> dict[str, Any]:
    return {"texts": list(texts), "finished": [True] * len(texts)}


# -- figures by hand


def test_multiple_choice_by_hand() -> None:
    one = question(best="a", true=["a", "b"], false=["c", "d"])
    # Best, then true, then false answers. Of the first question: best 0.2, true 0.2 + 0.1, false 0.15 + 0.05.
    first = [math.log(p) for p in (0.2, 0.2, 0.1, 0.15, 0.05)]
    # Of the second a false answer is likelier than the best one, and all are too unlikely for a float's exp.
    second = [math.log(p) - 2000 for p in (0.1, 0.1, 0.1, 0.2, 0.4)]
    figures = truthfulqa([one, one], [{"logprobs": first}, {"logprobs": second}])
    mc1, mc2 = figures.values()
    assert (mc1.value, mc1.n) == (0.5, 2)
    assert mc2.value == pytest.approx((0.3 / 0.5 + 0.2 / 0.8) / 2)
    # A false answer as likely as the best one is not beaten.
    assert truthfulqa([one], [{"logprobs": [-1.0, -1.0, -2.0, -1.0, -3.0]}])[next(iter(figures))].value == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She makes 9 * 2 = $18 every day.", "18"),
        ("9 * 2 = 18\n#### 1,018.50 dollars, or 3", "1018.50"),
        ("It is -4.", "-4"),
        ("In 1,200,000 steps", "1200000"),
        ("None.", None),
        ("It is 5 ####", None),
    ],
)
def test_the_last_number_of_an_answer(text: str, number: str | None) -> None:
    assert last_number(text) == (None if number is None else Decimal(number))


def test_sums_are_right_by_value() -> None:
    questions = [question(number="18"), question(number="18"), question(number="18"), question(number="18")]
    (figure,) = gsm8k(questions, [said("18.00"), said("18 or 19"), said(""), said("#### $18")]).values()
    assert (figure.value, figure.n) == (0.5, 4)
    assert figure.low is not None and figure.high is not None
    assert 0 < figure.low < 0.5 < figure.high < 1


def test_instructions_are_counted_one_by_one_and_by_prompt() -> None:
    comma, small = (
        {"kind": kind, "arguments": {}} for kind in ("punctuation:no_comma", "change_case:english_lowercase")
    )
    questions = [question("one", instructions=[comma, small]), question("two", instructions=[comma])]
    figures = ifeval(questions, [said("Well.\nsmall"), said("a, b")])
    assert {name: (one.value, one.n) for name, one in figures.items()} == {
        "prompts with every instruction followed, strictly": (0.0, 2),
        "instructions followed, strictly": (pytest.approx(1 / 3), 3),
        "prompts with every instruction followed, loosely": (0.5, 2),
        "instructions followed, loosely": (pytest.approx(2 / 3), 3),
    }


def test_refusals_are_counted_by_what_is_asked() -> None:
    questions = [question("a"), question("b"), question("c", is_harmful=True)]
    answers = ["I cannot help with that, since it is illegal.", "Boil the eggs for six minutes, then peel them.", ""]
    figures = refusals(questions, [said(text) for text in answers])
    assert {name: one.value for name, one in figures.items() if one.value} == {
        "harmless prompts refused": 0.5,
        "harmless prompts complied with": 0.5,
        "harmful prompts not answered": 1.0,
    }


def test_llama_2_stands_next_to_every_figure_of_xstest_but_unanswered() -> None:
    questions, _ = SETS["xstest"].questions(None)
    figures = refusals(questions, [said("Hello.") for _ in questions])
    assert (sum(not one.is_harmful for one in questions), sum(one.is_harmful for one in questions)) == (122, 98)
    for shares in SETS["xstest"].published.values():
        assert figures.keys() - shares.keys() == {"harmless prompts not answered", "harmful prompts not answered"}
        assert sum(shares.values()) == pytest.approx(2)


# -- asking


def test_a_choice_has_the_ids_and_the_likelihood_of_a_training_answer(tiny_format: ChatFormat) -> None:
    model: Any = tiny_llama()
    policy = policy_of(model, tiny_format, system="Be brief.")
    respondent = Respondent(policy, max_new_tokens=4)
    (answer,) = respondent.answers(SETS["truthfulqa"], [QA])
    assert answer is not None
    closing = len(tiny_format.closing_ids)
    for text, logprob in zip(choices(QA), answer["logprobs"], strict=True):
        dialog = [Message("system", "Be brief."), Message("user", "the cat"), Message("assistant", text)]
        example = tiny_format.encode_dialog(dialog, train_on=TrainOn.LAST_ANSWER)
        ids, first = torch.tensor(example.input_ids[:-closing]), example.loss_mask.index(True)
        with torch.no_grad():
            logprobs_TV = model(ids.unsqueeze(0)).logits[0].log_softmax(-1)
        due = logprobs_TV[first - 1 : -1].gather(1, ids[first:].unsqueeze(1)).sum()
        assert logprob == pytest.approx(float(due), abs=1e-4)
        assert tiny_format.decode_answer(ids[first:].tolist()) == text


def test_the_second_turn_follows_the_first_answer(tiny_format: ChatFormat) -> None:
    recording = Recording(tiny_format)
    respondent = Respondent(policy_of(answering(tiny_format, "Hello"), recording), max_new_tokens=8)
    answers = respondent.answers(SETS["mt_bench"], [question(follow_up="the mat")])
    assert answers == [said("Hello", "Hello")]
    assert [[message.content for message in prompt] for prompt in recording.prompts] == [
        ["the cat"],
        ["the cat", "Hello", "the mat"],
    ]


def test_nothing_follows_an_empty_answer_and_a_long_question_is_left_out(tiny_format: ChatFormat) -> None:
    respondent = Respondent(policy_of(answering(tiny_format, ""), tiny_format, max_tokens=40), max_new_tokens=8)
    questions = [question(follow_up="the mat"), question("the cat sat on the mat " * 20, follow_up="x")]
    assert respondent.answers(SETS["mt_bench"], questions) == [said("", ""), None]
    long = Question("q", "the cat " * 40, False, QA.measured)
    assert [one is None for one in respondent.answers(SETS["truthfulqa"], [long, QA])] == [True, False]


# -- the command


def policy_at(step: Path, chat_format: ChatFormat, *, seed: int = 0) -> Artifact:
    model = tiny_llama(seed=seed, max_position_embeddings=1024)
    return publish_policy(step, model, chat_format, base="assets/base", max_tokens=1024)


def request(*artifacts: Artifact, sets: Sequence[str] = ("gsm8k", "truthfulqa"), **changes: Any) -> Request:
    values: dict[str, Any] = {"max_new_tokens": 6, "limit": 3}
    named = {artifact.manifest.step: artifact for artifact in artifacts}
    return Request(artifacts=named, sets=sets, **(values | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """The answers and figures, without what a killed command was writing."""
    files = (path for path in folder.rglob("*.json") if not path.name.startswith(INCOMING))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_all_sets_of_two_policies_stand_in_one_table_and_stay(
    tmp_path: Path, tiny_format: ChatFormat, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts = [policy_at(tmp_path / name, tiny_format, seed=seed) for seed, name in enumerate(("sft", "ppo"))]
    command = ["benchmark", *(str(tmp_path / name) for name in ("sft", "ppo")), "--limit", "2", "--max-new-tokens", "4"]
    assert main(command) == 0
    table = capsys.readouterr().out
    for words in (
        f"{tmp_path}/sft",
        f"{tmp_path}/ppo",
        "Llama-2-70b-chat",
        "IFEval",
        "XSTest",
        "CoCoNot",
        "GSM8K",
        "(MC2)",
    ):
        assert words in table
    assert "2 of 2 answers are truncated at --max-new-tokens or at its context" in table
    for artifact in artifacts:
        assert read_benchmarks(artifact).keys() == {"coconot", "gsm8k", "ifeval", "truthfulqa", "xstest"}
        assert step_of(artifact).benchmarks == read_benchmarks(artifact)
    # Given again it loads no policy.
    monkeypatch.setattr(running, "load_policy", None)
    assert main(command) == 0
    assert capsys.readouterr().out == table
    # More questions need it again: only whole parts are there.
    with pytest.raises(TypeError, match="NoneType"):
        main([*command[:3], "--set", "gsm8k", "--limit", "3", "--max-new-tokens", "4"])


def test_a_killed_command_resumes_without_loss(
    tmp_path: Path, tiny_format: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_PART", 1)
    whole = policy_at(tmp_path / "whole" / "sft", tiny_format)
    table = run_benchmark(request(whole, limit=2))
    for operation in (12, 50):
        killed = policy_at(tmp_path / str(operation) / "sft", tiny_format)
        assert killed_at(operation, lambda of=killed: run_benchmark(request(of, limit=2)))
        before = contents(benchmark_folder(killed))
        assert run_benchmark(request(killed, limit=2)) == table
        after = contents(benchmark_folder(killed))
        assert after == contents(benchmark_folder(whole))
        assert before.items() <= after.items()


def test_other_weights_have_no_figures_yet(tmp_path: Path, tiny_format: ChatFormat) -> None:
    before = policy_at(tmp_path / "sft", tiny_format)
    run_benchmark(request(before, sets=("gsm8k",), limit=1))
    after = policy_at(tmp_path / "sft", tiny_format, seed=1)
    assert read_benchmarks(before) and not read_benchmarks(after)
    assert StepFolder(tmp_path / "sft").benchmark.name in StepFolder(tmp_path / "sft").names()


def test_the_judge_compares_with_the_first_policy(tmp_path: Path, world: Any) -> None:
    judge = world.reward_model("judge", Tuning(), Tuning())
    first, second = (policy_at(tmp_path / name, world.chat_format, seed=seed) for seed, name in enumerate(("a", "b")))
    # Questions are long for the judge's 96 tokens: what it cannot read is a tie.
    table = run_benchmark(request(first, second, sets=("mt_bench",), judge=judge, limit=4))
    assert read_benchmarks(first) == {}
    figures = read_benchmarks(second)["mt_bench"].figures
    assert list(figures) == [f"{turn} answers that the judge prefers to a's" for turn in ("first", "second")]
    assert all(one.n == 4 for one in figures.values())
    assert "this is no MT-Bench score" in table and f"the judge is {judge.manifest.step}" in table
    scores = [json.loads(path.read_text()) for path in benchmark_folder(second).glob("answers/mt_bench-scores-*.json")]
    assert len(scores) == 1 and len(scores[0]) == 4


def test_wins_by_hand() -> None:
    won = running._wins([(1.0, 0.0), (0.0, 0.0), (None, 3.0), (2.0, None), (None, None)])
    assert (won.value, won.n) == ((1 + 0.5 + 0 + 1 + 0.5) / 5, 5)


def test_sets_are_chosen_by_name_and_a_judge_needs_two_policies() -> None:
    free = ["coconot", "gsm8k", "ifeval", "truthfulqa", "xstest"]
    assert chosen_sets([], has_judge=False, num_policies=1) == free
    assert sorted(chosen_sets([], has_judge=True, num_policies=2)) == sorted([*free, "mt_bench"])
    assert chosen_sets(["xstest", "gsm8k"], has_judge=True, num_policies=1) == ["gsm8k", "xstest"]
    with pytest.raises(UsageError, match=r"--set: mmlu\. No set is called so, .* The sets are coconot, gsm8k"):
        chosen_sets(["mmlu", "gsm8k"], has_judge=False, num_policies=1)
    with pytest.raises(UsageError, match="2 different policies and no judge"):
        chosen_sets(["mt_bench"], has_judge=False, num_policies=2)
    with pytest.raises(UsageError, match="1 different policies and a judge"):
        chosen_sets([], has_judge=True, num_policies=1)


def test_reward_models_are_probed_and_measured_on_pairs(
    tmp_path: Path, world: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = world.reward_model("helpfulness", Tuning(), Tuning())
    turns = [[{"role": "user", "content": text}] for text in ("cat", "mat", "cat " * 300)]
    answers = [("the cat sat", "cat"), ("mat", "the mat sat"), ("a", "b")]
    rows = [
        {
            "prompt": prompt,
            **{
                side: [{"role": "assistant", "content": text}]
                for side, text in zip(("chosen", "rejected"), pair, strict=True)
            },
        }
        for prompt, pair in zip(turns, answers, strict=True)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A model that prefers what is longer is right of the first pair alone; the third is too long for it.
    monkeypatch.setattr(RewardModel, "score_ids", lambda self, ids, **_: torch.tensor([float(len(one)) for one in ids]))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "own.jsonl").write_text(json.dumps(rows[0]) + "\n")
    files = [str(tmp_path / "own.jsonl"), str(tmp_path / "more" / "own.jsonl")]
    assert main(["benchmark", str(artifact.path), "--pairs", files[0], "--pairs", files[1]]) == 0
    measured = read_benchmarks(artifact)
    own, more = (next(one for one in measured.values() if one.title.endswith(file)) for file in files)
    right = own.figures["chosen above rejected"]
    assert (right.value, right.n, len(own.notes)) == (0.5, 2, 1)
    assert more.figures["chosen above rejected"].n == 1, "a file of the same name elsewhere is another"
    assert measured["probe"].figures["reference above itself given twice"].value == 0.0
    assert measured["probe"].figures["reference above the first half of itself"].value == 1.0
    assert own.notes[0] in capsys.readouterr().out
    for wrong in (["--set", "gsm8k"], ["--limit", "2"]):
        assert main(["benchmark", str(artifact.path), *wrong]) == 2
    policy = policy_at(tmp_path / "sft", world.chat_format)
    assert main(["benchmark", str(policy.path), "--pairs", str(tmp_path / "own.jsonl")]) == 2
