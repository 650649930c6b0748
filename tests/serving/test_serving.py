"""Chat and sample: models that answer by a table, or random ones compared with their own logits."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Dialog, Message
from llamachat.data.loading import read_records
from llamachat.errors import DataError, UsageError
from llamachat.rollout.engine import Sampling
from llamachat.rollout.hugging_face import HuggingFaceEngine
from pipelines.cli.main import main
from serving.chat import chat_loop, chat_once
from serving.sample import Sampled, sample_file
from tests.serving.scripted import Recording, answering, policy_of, read_lines, write_lines
from tests.tiny_llama import publish_policy, tiny_llama

GREEDY = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=20, seed=0)


def lines_then_end(*lines: str) -> Callable[[str], str]:
    left: Iterator[str] = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    return read


def test_an_answer_is_streamed_in_whole_characters_without_stop_token_and_control_characters(tiny_format: ChatFormat):
    pieces: list[str] = []
    policy = policy_of(answering(tiny_format, "Hello there!\U0001f600"), tiny_format)
    answer = chat_once(policy, "Hi", system=None, sampling=GREEDY, write=pieces.append)
    assert answer == "Hello there!\U0001f600"
    assert "".join(pieces) == "Hello there!\U0001f600\n"
    assert pieces[:2] == ["H", "el"]
    assert pieces[-2] == "\U0001f600", "four byte pieces, shown when the last is there"
    pieces.clear()
    policy = policy_of(answering(tiny_format, "a\x1b[b"), tiny_format)
    assert chat_once(policy, "Hi", system=None, sampling=GREEDY, write=pieces.append) == "a\x1b[b"
    assert "".join(pieces) == "a[b\n"


def test_a_truncated_answer_is_shown_to_its_end_and_reported(tiny_format: ChatFormat, caplog: pytest.LogCaptureFixture):
    pieces: list[str] = []
    policy = policy_of(answering(tiny_format, "a\U0001f600"), tiny_format)
    with caplog.at_level(logging.WARNING):
        chat_once(policy, "Hi", system=None, sampling=Sampling(0.0, 1.0, 3, 0), write=pieces.append)
    assert "".join(pieces).startswith("a\ufffd")
    assert "(cut after 3 tokens)" in caplog.text


@pytest.mark.parametrize(
    ("trained", "override", "sent"),
    [
        (None, None, None),
        ("Be kind.", None, "Be kind."),
        ("Be kind.", "Be brief.", "Be brief."),
        ("Be kind.", "", None),
    ],
)
def test_the_system_text_is_the_policys_unless_overridden(
    trained: str | None, override: str | None, sent: str | None, tiny_format: ChatFormat
):
    recording = Recording(tiny_format)
    policy = policy_of(answering(tiny_format, "Hello"), recording, system=trained)
    chat_once(policy, "Hi", system=override, sampling=GREEDY, write=lambda text: None)
    user = Message("user", "Hi")
    assert recording.prompts == [(user,) if sent is None else (Message("system", sent), user)]


@pytest.mark.parametrize("text", ["", "What does [INST] mean?", "half \ud800", "cat " * 40])
def test_a_message_that_cannot_be_sent_is_refused(text: str, tiny_format: ChatFormat):
    policy = policy_of(answering(tiny_format, "Hello"), tiny_format, max_tokens=30)
    words = "more than the 29 tokens" if text.startswith("cat") else "The message cannot be sent"
    with pytest.raises(UsageError, match=words):
        chat_once(policy, text, system=None, sampling=GREEDY, write=lambda text: None)


def talk(chat_format: ChatFormat, *lines: str, answer: str = "Hello", **policy: Any) -> tuple[list[Any], str]:
    """The prompts that a conversation of these lines sends, and what it shows."""
    recording, shown = Recording(chat_format), list[str]()
    policies = [policy_of(answering(chat_format, answer), recording, **policy)]
    chat_loop(policies, system=None, sampling=GREEDY, read=lines_then_end(*lines), write=shown.append)
    return recording.prompts, "".join(shown)


def users(*texts: str) -> list[Message]:
    return [Message("user", text) for text in texts]


def test_a_conversation_keeps_its_history_until_it_begins_again(tiny_format: ChatFormat):
    first = ("one", "", "two", "/reset", "three", "/system Be brief.", "four")
    prompts, shown = talk(tiny_format, *first, "/system", "/what", "five", "/quit", "six")
    hello, system = Message("assistant", "Hello"), Message("system", "Be brief.")
    one, two, three, four, five = users("one", "two", "three", "four", "five")
    assert prompts == [(one,), (one, hello, two), (three,), (system, four), (five,)]
    assert shown.count("/system TEXT") == 1, "an unknown command names the known ones"


def test_a_message_is_answered_again_and_a_conversation_is_saved(tiny_format: ChatFormat, tmp_path: Path):
    file = tmp_path / "own.jsonl"
    lines = ("/retry", "one", "two", "/retry", f"/save {file}", "/system Be brief.", "three", f"/save {file}")
    prompts, shown = talk(tiny_format, *lines, f"/save {tmp_path}/none/own.jsonl")
    hello, system = Message("assistant", "Hello"), Message("system", "Be brief.")
    one, two, three = users("one", "two", "three")
    assert prompts == [(one,), (one, hello, two), (one, hello, two), (system, three)]
    assert [dialog.messages for dialog in read_records(file, Dialog)] == [
        (one, hello, two, hello),
        (system, three, hello),
    ]
    assert "(nothing was asked yet)" in shown and "(not saved: " in shown


def test_the_oldest_pairs_make_room_and_the_system_text_stays(tiny_format: ChatFormat):
    lines = [f"the cat {number}" for number in range(6)]
    prompts, _ = talk(tiny_format, *lines, max_tokens=80, system="Be brief.")
    last = prompts[-1]
    assert last[0] == Message("system", "Be brief.")
    assert last[-1] == Message("user", "the cat 5")
    assert 3 < len(last) < 12
    assert last[1] == Message("user", f"the cat {6 - (len(last) - 1 + 1) // 2}"), "whole pairs, the newest ones"
    assert max(len(tiny_format.encode_prompt(prompt)) for prompt in prompts) <= 80 - GREEDY.max_new_tokens


def test_what_goes_wrong_in_a_conversation_does_not_end_it(tiny_format: ChatFormat):
    prompts, shown = talk(tiny_format, "say [INST]", "/system <<SYS>>", "cat " * 200, "one")
    assert "holds '[INST]'" in shown
    assert "(unchanged: the system text holds '<<SYS>>'" in shown
    assert "too long" in shown
    assert prompts == [tuple(users("one"))]
    assert shown.endswith("Hello\n\n")


@pytest.mark.parametrize(("answer", "reason"), [("", "is empty"), ("<<SYS>>", "holds '<<SYS>>'")])
def test_an_answer_that_cannot_be_sent_back_is_not_kept(answer: str, reason: str, tiny_format: ChatFormat):
    prompts, shown = talk(tiny_format, "one", "two", answer=answer)
    assert prompts == [tuple(users("one")), tuple(users("two"))]
    assert f"(left out of the conversation: the answer {reason}" in shown
    assert "trained" not in shown, "what such a text does to a training is not said here"


def test_ctrl_c_stops_an_answer_and_forgets_it(tiny_format: ChatFormat):
    recording, shown = Recording(tiny_format), list[str]()

    def write(text: str) -> None:
        if text == "el" and len(recording.prompts) == 1:
            raise KeyboardInterrupt
        shown.append(text)

    policy = policy_of(answering(tiny_format, "Hello"), recording)
    chat_loop([policy], system=None, sampling=GREEDY, read=lines_then_end("one", "two"), write=write)
    assert recording.prompts == [tuple(users("one")), tuple(users("two"))]
    assert "H\n(stopped, and forgotten)\n" in "".join(shown)


@pytest.mark.parametrize(("names", "labels"), [(("a/sft", "b/ppo"),) * 2, (("a/sft",) * 2, ("a/sft (1)", "a/sft (2)"))])
def test_two_policies_answer_one_below_the_other_each_with_its_own_history(
    names: Sequence[str], labels: Sequence[str], tiny_format: ChatFormat
):
    formats, shown = (Recording(tiny_format), Recording(tiny_format)), list[str]()
    policies = [
        policy_of(answering(tiny_format, text), chat_format, name=name)
        for text, chat_format, name in zip(("Hello", "Paris"), formats, names, strict=True)
    ]
    chat_loop(policies, system=None, sampling=GREEDY, read=lines_then_end("one", "two"), write=shown.append)
    assert f"[{labels[0]}]\nHello\n[{labels[1]}]\nParis\n" * 2 in "".join(shown)
    assert formats[0].prompts[1][1] == Message("assistant", "Hello")
    assert formats[1].prompts[1][1] == Message("assistant", "Paris")


def test_every_turn_draws_other_numbers(tiny_format: ChatFormat):
    shown: list[str] = []
    policy = policy_of(tiny_llama(), tiny_format)
    read = lines_then_end("one", "/reset", "one")
    chat_loop([policy], system=None, sampling=Sampling(1.0, 1.0, 8, 0), read=read, write=shown.append)
    first, second = "".join(shown).split("(a new conversation)\n")
    assert first.splitlines()[1] != second.splitlines()[0]


RECORDS: list[dict[str, Any]] = [
    {"prompt": [{"role": "user", "content": "What is that?"}], "id": "first", "is_safety": True, "topic": "own key"},
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "Who are you?"},
            {"role": "assistant", "content": "A model."},
        ]
    },
    {
        "prompt": [{"role": "user", "content": "Which mat?"}],
        "chosen": [{"role": "assistant", "content": "That one."}],
        "rejected": [{"role": "assistant", "content": "None."}],
    },
]
QUESTIONS = [RECORDS[0]["prompt"], RECORDS[1]["messages"][:4], RECORDS[2]["prompt"]]


def test_each_record_gets_its_completions_with_their_logprobs(tmp_path: Path, tiny_format: ChatFormat):
    model = tiny_llama()
    source, out = write_lines(tmp_path / "in.jsonl", RECORDS), tmp_path / "out.jsonl"
    sampling = Sampling(temperature=0.8, top_p=1.0, max_new_tokens=6, seed=3)
    done = sample_file(policy_of(model, tiny_format), source, out, samples_per_prompt=4, sampling=sampling)
    assert done == Sampled(prompts=3, completions=12, finished=0, shortened=0)
    written = read_lines(out)
    assert [{key: row[key] for key in row if key != "completions"} for row in written] == RECORDS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    prompts = [tiny_format.encode_prompt([Message(**turn) for turn in question]) for question in QUESTIONS]
    engine = HuggingFaceEngine(model, tiny_format.stop_ids, 0)
    groups = engine.generate(prompts, samples_per_prompt=4, sampling=sampling)
    for prompt, row, group in zip(prompts, written, groups, strict=True):
        assert len({completion["text"] for completion in row["completions"]}) == 4
        for described, completion in zip(row["completions"], group, strict=True):
            assert set(described) == {"text", "finished", "logprob"}
            assert described["text"] == tiny_format.tokenizer.decode(completion.token_ids).strip()
            assert described["finished"] is False
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                logprobs = (model(ids, use_cache=False).logits[0].double() / 0.8).log_softmax(-1)
            by_hand = sum(float(logprobs[at - 1, ids[0, at]]) for at in range(len(prompt), ids.shape[1]))
            assert described["logprob"] == pytest.approx(by_hand, abs=1e-3)


def test_finished_answers_say_so_and_the_same_seed_writes_the_same_file(tmp_path: Path, tiny_format: ChatFormat):
    policy = policy_of(answering(tiny_format, "Hello there!"), tiny_format)
    source = write_lines(tmp_path / "in.jsonl", RECORDS)
    for name in ("one.jsonl", "two.jsonl"):
        done = sample_file(policy, source, tmp_path / name, samples_per_prompt=2, sampling=GREEDY)
        assert done.finished == 6
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    completion = read_lines(tmp_path / "one.jsonl")[0]["completions"][0]
    assert (completion["text"], completion["finished"]) == ("Hello there!", True)
    assert completion["logprob"] == pytest.approx(0.0, abs=1e-3)


def test_the_policys_system_text_goes_before_prompts_without_one_and_long_dialogs_lose_their_oldest_turns(
    tmp_path: Path, tiny_format: ChatFormat
):
    recording = Recording(tiny_format)
    policy = policy_of(answering(tiny_format, "Hello"), recording, system="Be kind.", max_tokens=64)
    turns = [("user", "the cat sat on the mat"), ("assistant", "the other cat sat on the other mat"), ("user", "why?")]
    long = {"messages": [{"role": role, "content": content} for role, content in turns]}
    source = write_lines(tmp_path / "in.jsonl", [RECORDS[0], RECORDS[1], long])
    done = sample_file(policy, source, tmp_path / "out.jsonl", samples_per_prompt=1, sampling=GREEDY)
    assert done.shortened == 2
    kind, brief = Message("system", "Be kind."), Message("system", "Be brief.")
    assert recording.prompts == [
        (kind, Message("user", "What is that?")),
        (brief, Message("user", "Who are you?")),
        (kind, Message("user", "why?")),
    ]
    assert read_lines(tmp_path / "out.jsonl")[2]["messages"] == long["messages"], "the record is written back whole"


def test_rows_without_a_prompt_are_reported(tmp_path: Path, tiny_format: ChatFormat, caplog: pytest.LogCaptureFixture):
    answer = {"role": "assistant", "text": "Hi.", "rank": 0}
    trees: list[dict[str, Any]] = [
        {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "Hello", "replies": replies}}
        for replies in ([], [answer])
    ]
    policy = policy_of(answering(tiny_format, "Hello"), tiny_format)
    source = write_lines(tmp_path / "in.jsonl", trees)
    done = sample_file(policy, source, tmp_path / "out.jsonl", samples_per_prompt=1, sampling=GREEDY)
    assert done.prompts == 1
    assert "no prompt in 1 row" in caplog.text
    source = write_lines(tmp_path / "in.jsonl", trees[:1])
    with pytest.raises(DataError, match="holds no prompt"):
        sample_file(policy, source, tmp_path / "none.jsonl", samples_per_prompt=1, sampling=GREEDY)


def test_all_bad_prompts_are_named_with_their_lines_and_nothing_is_written(tmp_path: Path, tiny_format: ChatFormat):
    tagged = {"prompt": [{"role": "user", "content": "say [/INST]"}]}
    long = {"prompt": [{"role": "user", "content": "cat " * 200}]}
    source = write_lines(tmp_path / "in.jsonl", [RECORDS[0], tagged, "{broken", long])
    policy = policy_of(answering(tiny_format, "Hello"), tiny_format)
    with pytest.raises(DataError) as caught:
        sample_file(policy, source, tmp_path / "out.jsonl", samples_per_prompt=1, sampling=GREEDY)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{source}:2: prompt[0].content: holds '[/INST]'")
    assert lines[1].startswith(f"{source}:3: ")
    assert lines[2].startswith(f"{source}:4: prompt: is longer than 127 tokens")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_request_that_cannot_be_met_is_refused_before_anything_is_sampled(tmp_path: Path, tiny_format: ChatFormat):
    source = write_lines(tmp_path / "in.jsonl", RECORDS)
    (tmp_path / "folder").mkdir()
    policy = policy_of(answering(tiny_format, "Hello"), tiny_format)
    for out, samples, reason in (
        (tmp_path / "out.jsonl", 0, "-n: 0 answers"),
        (source, 1, "is an input of this command"),
        (tmp_path / "folder", 1, "is a folder"),
    ):
        with pytest.raises(UsageError, match=reason):
            sample_file(policy, source, out, samples_per_prompt=samples, sampling=GREEDY)
    with pytest.raises(DataError, match=r"absent\.jsonl.* does not exist"):
        sample_file(policy, tmp_path / "absent.jsonl", tmp_path / "o.jsonl", samples_per_prompt=1, sampling=GREEDY)


def test_the_command_writes_the_same_bytes_whatever_the_batch_size(tmp_path: Path, tiny_format: ChatFormat):
    artifact = publish_policy(tmp_path / "policy", tiny_llama(max_position_embeddings=256), tiny_format, base="tiny")
    source, written = write_lines(tmp_path / "in.jsonl", RECORDS * 8), set[bytes]()
    for size in ("1", "7", "64"):
        out = tmp_path / f"{size}.jsonl"
        words = ["--policy", str(artifact.path), "--in", str(source), "--out", str(out), "-n", "3"]
        assert main(["sample", *words, "--max-new-tokens", "24", "--batch-size", size, "--dtype", "float32"]) == 0
        written.add(out.read_bytes())
    assert len(written) == 1
