"""`llamachat score`: scores are compared with those of plain transformers on the ids of the chat format."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from llamachat.chat_format import ChatFormat, TrainOn
from llamachat.chat_format.dialog import Message
from llamachat.errors import DataError, UsageError
from llamachat.models.reward_model import RewardModel, load_reward_model
from pipelines.cli.main import main
from serving.score import score_file, score_turns
from tests.reward.rewarding import base_of, policy_on, trained
from tests.serving.scripted import write_lines

USER = {"role": "user", "content": "the cat"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


DIALOG = {"messages": [USER, said("a model")], "is_safe": True, "mine": 7}
PAIR = {
    "prompt": [USER],
    "chosen": [said("Paris")],
    "rejected": [said("France and Paris")],
    "rating": "slightly_better",
}
SAMPLED = {"prompt": [USER], "completions": [{"text": "the mat", "finished": True}, {"text": "", "finished": True}]}


@pytest.fixture
def reward_model(tmp_path: Path, tiny_sentencepiece: bytes) -> RewardModel:
    artifact, _ = trained(tmp_path, tiny_sentencepiece, "full")
    return load_reward_model(artifact.path)


def plain_score(folder: Path, chat_format: ChatFormat, answer: str) -> float:
    messages = [Message("user", USER["content"]), Message("assistant", answer)]
    ids = chat_format.encode_dialog(messages, train_on=TrainOn.LAST_ANSWER).input_ids
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits.item()


def test_each_kind_of_record_gets_its_scores_in_the_order_of_the_file(
    tmp_path: Path, tiny_sentencepiece: bytes, tiny_format: ChatFormat, capsys: pytest.CaptureFixture[str]
):
    artifact, _ = trained(tmp_path, tiny_sentencepiece, "full")
    file, out = write_lines(tmp_path / "in.jsonl", [SAMPLED, DIALOG, PAIR]), tmp_path / "out.jsonl"
    step = str(artifact.path.parent)
    assert main(["score", step, str(file), "--out", str(out), "--device", "cpu"]) == 0
    sampled, dialog, pair = (json.loads(line) for line in out.read_text().splitlines())

    def due(answer: str) -> Any:
        return pytest.approx(plain_score(artifact.path, tiny_format, answer), abs=1e-5)

    assert dialog == {**DIALOG, "score": due("a model")}
    assert pair == {**PAIR, "score_chosen": due("Paris"), "score_rejected": due("France and Paris")}
    first, second = SAMPLED["completions"]
    assert sampled["completions"] == [{**first, "score": due("the mat")}, {**second, "score": None}]
    capsys.readouterr()
    assert main(["score", step, str(file)]) == 0
    assert capsys.readouterr().out == out.read_text(), "without --out the same lines are printed"
    assert main(["score", step, "-m", "the cat", "-m", "a model"]) == 0
    assert float(capsys.readouterr().out) == due("a model")


def test_counts_and_accuracy(tmp_path: Path, reward_model: RewardModel, caplog: pytest.LogCaptureFixture):
    swapped = {**PAIR, "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    with caplog.at_level(logging.INFO):
        done, text = score_file(reward_model, write_lines(tmp_path / "in.jsonl", [PAIR, swapped, PAIR, SAMPLED]), None)
    scores = json.loads(text.splitlines()[0])
    wins = scores["score_chosen"] > scores["score_rejected"]
    assert (done.records, done.answers, done.without, done.pairs) == (4, 7, 1, 3)
    assert done.accuracy == pytest.approx((2 if wins else 1) / 3)
    assert "score null for 1 answer" in caplog.text
    same, _ = score_file(reward_model, write_lines(tmp_path / "one.jsonl", [DIALOG]), None)
    assert same.accuracy is None


def test_what_is_too_long_is_marked_and_counted(
    tmp_path: Path, reward_model: RewardModel, caplog: pytest.LogCaptureFixture
):
    long = "the cat sat on the mat " * 60
    rows = [
        {"messages": [USER, said(long)]},
        DIALOG,
        {**PAIR, "rejected": [said(long)]},
        PAIR,
        {"prompt": [USER], "completions": [{"text": long}, {"text": "the mat"}]},
    ]
    done, text = score_file(reward_model, write_lines(tmp_path / "in.jsonl", rows), None)
    first, second, third, fourth, fifth = map(json.loads, text.splitlines())
    assert first == {**rows[0], "score": None} and isinstance(second["score"], float)
    assert (third["score_chosen"], third["score_rejected"]) == (None, None), "a pair is scored as one or not at all"
    assert isinstance(fourth["score_chosen"], float)
    assert [item["score"] is None for item in fifth["completions"]] == [True, False]
    assert (done.records, done.answers, done.without, done.pairs) == (5, 4, 4, 1)
    assert "score null for 4 answers" in caplog.text
    done, _ = score_file(reward_model, write_lines(tmp_path / "long.jsonl", rows[:1]), None)
    assert (done.answers, done.accuracy) == (0, None)


def test_a_known_set_is_written_in_our_form(tmp_path: Path, reward_model: RewardModel):
    row = {"chosen": "\n\nHuman: the cat\n\nAssistant: Paris", "rejected": "\n\nHuman: the cat\n\nAssistant: a model"}
    _, text = score_file(reward_model, write_lines(tmp_path / "hh.jsonl", [row]), None)
    record = json.loads(text)
    assert {key: record[key] for key in ("prompt", "chosen", "rejected")} == {
        "prompt": [USER],
        "chosen": [said("Paris")],
        "rejected": [said("a model")],
    }
    assert record["score_chosen"] == pytest.approx(score_turns(reward_model, ["the cat", "Paris"]), abs=1e-5)


def test_rows_without_an_answer_are_counted(
    tmp_path: Path, reward_model: RewardModel, caplog: pytest.LogCaptureFixture
):
    rated = {"prompt": [USER], "answer_a": "Paris", "answer_b": "France", "choice": "a"}
    file = write_lines(tmp_path / "in.jsonl", [rated, {**rated, "choice": None}])
    with caplog.at_level(logging.WARNING):
        done, _ = score_file(reward_model, file, None)
    assert done.records == 1 and "no answer in 1 row" in caplog.text


def test_all_bad_lines_are_reported_and_nothing_is_written(tmp_path: Path, reward_model: RewardModel):
    bad = [
        {"prompt": [USER]},
        DIALOG,
        {**PAIR, "rating": "better_than_ever"},
        {"prompt": [USER], "completions": []},
        {"prompt": [USER], "completions": ["the mat"]},
        {"prompt": [said("no question")], "completions": [{"text": "the mat"}]},
    ]
    out = tmp_path / "out.jsonl"
    with pytest.raises(DataError) as error:
        score_file(reward_model, write_lines(tmp_path / "in.jsonl", bad), out)
    lines = [line for line in str(error.value).splitlines() if line.startswith(str(tmp_path))]
    assert [line.partition(": ")[0].rpartition(":")[2] for line in lines] == ["1", "3", "4", "6"]
    for line, part in zip(
        lines,
        (
            "a prompt alone has no score",
            "rating",
            "no list of",
            "prompt[0]",
        ),
        strict=True,
    ):
        assert part in line
    assert "5" in lines[2].replace(str(tmp_path), ""), "lines 4 and 5 have the same problem"
    assert not out.exists()


def test_what_cannot_be_scored_is_refused(tmp_path: Path, reward_model: RewardModel, caplog: pytest.LogCaptureFixture):
    file = write_lines(tmp_path / "in.jsonl", [DIALOG])
    for out, part in (
        (tmp_path, "is a folder"),
        (file, "is an input of this command"),
    ):
        with pytest.raises(UsageError, match=part):
            score_file(reward_model, file, out)
    with pytest.raises(UsageError, match=r"-m: 1 given, but the last one is the answer"):
        score_turns(reward_model, ["the cat"])
    with pytest.raises(UsageError, match=r"-m: messages\[0\].*\[INST\]"):
        score_turns(reward_model, ["the [INST]", "cat"])
    empty = {"prompt": "the cat", "completions": [{"text": "a model"}], "messages": None}
    rows = write_lines(tmp_path / "none.jsonl", [{"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}, empty])
    with pytest.raises(DataError):
        score_file(reward_model, rows, None)


def test_the_command_takes_a_file_or_messages_and_a_reward_model(
    tmp_path: Path, tiny_sentencepiece: bytes, tiny_format: ChatFormat, capsys: pytest.CaptureFixture[str]
):
    policy = policy_on(base_of(tmp_path, tiny_sentencepiece), "full", tmp_path, tiny_format)
    file = write_lines(tmp_path / "in.jsonl", [DIALOG])
    assert main(["score", str(policy.path), str(file)]) == 1
    assert "is a 'policy', but scoring needs a 'reward_model'" in capsys.readouterr().err
    for wrong in ([], [str(file), "-m", "a", "-m", "b"], ["-m", "a", "-m", "b", "--out", str(tmp_path / "o")]):
        assert main(["score", str(policy.path), *wrong]) == 2
        assert "either FILE or -m QUESTION -m ANSWER" in capsys.readouterr().err
