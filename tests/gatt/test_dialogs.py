"""Dialogs of Ghost Attention: what trains in them, how they are made, what is left out, and what is refused."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gatt import train as gatt_train
from gatt.synthesize import (
    PLAIN,
    Conversation,
    GattDialog,
    TurnSampler,
    conversation,
    counted_drops,
    dialog_text,
    sample_dialogs,
)
from gatt.train import dialog_step, make_dialogs
from llamachat.answers.dialog_step import DialogStep
from llamachat.chat_format import ChatFormat, TrainOn, load_chat_format
from llamachat.chat_format.tokenizer import load_tokenizer
from llamachat.config.sections import Data, DataSource, Split
from llamachat.constraints.instruction import Instruction, constrain
from llamachat.constraints.values import side_of
from llamachat.errors import DataError
from llamachat.rollout.decoder import LlamaEngine
from sft.config import Config as SftConfig
from sft.examples import load_examples
from tests.gatt.tiny_gatt import ALL, CUT, HOBBIES, ScriptedEngine, sampling, write_recipe, write_roomy_base
from tests.sft.tiny_sft import pair, write_dialogs
from tests.tiny_steps import inputs_of, summary_of

ROOT = Path(__file__).resolve().parents[2]


def instruct(*pairs: tuple[str, str]) -> Instruction:
    """Constraints in their first long wording."""
    constraints = []
    for family, value in pairs:
        one = constrain(ALL[family], value)
        constraints.append(
            type(one)(family, value, ALL[family].long[0].format(value), one.short, one.checker, one.recall)
        )
    return Instruction(tuple(constraints), " ".join(one.long for one in constraints), is_shortened=False)


SUN = instruct(("ends_with", "sun"))

# --- what trains

STORED = GattDialog(
    instruction="Always end with sun.",
    families=["ends_with"],
    turns=["Who are you?", "And now?", "Bye!"],
    answers=["I am here, sun.", "I am, sun.", "Bye, sun."],
    tokens=7,
    passing=1.0,
    is_repaired=False,
)
# Ids by hand from the template of the format ("[INST] <<SYS>>...") and the pieces of the bundled vocabulary: 1 opens a pair
# of turns and 2 closes it, 13 is a line's end, 3995 a space that begins no word.
INST = [3995, 4084, 2839, 4028, 4024, 4085]  # [INST]
END_INST = [3995, 4084, 4066, 2839, 4028, 4024, 4085]  # " [/INST]"
SYS = [3995, 4092, 4092, 4028, 4034, 4028, 4087, 4087, 13]  # " <<SYS>>" and a line's end
END_SYS = [13, 4092, 4092, 4066, 4028, 4034, 4028, 4087, 4087, 13, 13]  # line's end, "<</SYS>>", two line's ends
ALWAYS_END_WITH_SUN = [4022, 4005, 875, 926, 373, 1681, 4014]
FIRST = [*INST, *SYS, *ALWAYS_END_WITH_SUN, *END_SYS, 3899, 3999, 393, 307, 4026, *END_INST]  # Who are you?
SECOND = [*INST, 682, 653, 4026, *END_INST]  # And now?
THIRD = [*INST, 1757, 3996, 4038, *END_INST]  # Bye!
ANSWERS = (
    [281, 547, 1124, 4017, 1681, 4014, 3995],  # I am here, sun.
    [281, 547, 4017, 1681, 4014, 3995],  # I am, sun.
    [1757, 3996, 4017, 1681, 4014, 3995],  # Bye, sun.
)
IGNORED = -100


@pytest.fixture(scope="module")
def bundled() -> ChatFormat:
    return load_chat_format("llama2", load_tokenizer(ROOT / "assets/base"))


def learnt_from(folder: Path, chat_format: ChatFormat) -> Any:
    """The one training example of a folder of dialogs, as the tuning reads it."""
    nowhere = Data(sft=(), split=Split(test=0, validation=0, judge=0))
    examples = load_examples(
        nowhere, chat_format, system=None, train_on=TrainOn.LAST_ANSWER, max_tokens=512, num_prompts=0, seed=0,
        step_dialogs=folder,
    )  # fmt: skip
    (example,) = examples.train
    return example


def test_only_the_last_answer_trains_and_the_instruction_stands_once(bundled: ChatFormat, tmp_path: Path) -> None:
    for name in ("dialogs", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text(dialog_text(STORED, "gatt"))
    example = learnt_from(tmp_path, bundled)
    closed = [[1, *FIRST, *ANSWERS[0], 2], [1, *SECOND, *ANSWERS[1], 2], [1, *THIRD, *ANSWERS[2], 2]]
    assert list(example.input_ids) == [*closed[0], *closed[1], *closed[2]]
    labels = [id if learns else IGNORED for id, learns in zip(example.input_ids, example.loss_mask, strict=True)]
    before = len(closed[0]) + len(closed[1]) + 1 + len(THIRD)
    assert labels == [IGNORED] * before + [1757, 3996, 4017, 1681, 4014, 3995, 2]
    pieces = [bundled.tokenizer.decode([id]) for id in (1757, 3996, 4017, 1681, 4014)]
    assert [piece.strip() for piece in pieces] == ["By", "e", ",", "sun", "."]
    read = bundled.tokenizer.decode([id for id in example.input_ids[:before] if id > 2])
    trained = bundled.tokenizer.decode(list(example.input_ids[before:-1]))
    print(f"read: {read!r}\ntrained: {trained.strip()!r} and the end of the answer")
    assert trained.strip() == "Bye, sun."
    assert read.count("Always end with sun.") == 1
    assert "<<SYS>>\nAlways end with sun.\n<</SYS>>\n\nWho are you? [/INST] I am here, sun." in read


def test_dialogs_of_the_sft_data_that_are_learnt_too_train_all_their_answers(
    base: Path, bundled: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier answers of the made dialogs are masked by `train: false`, not by the way of training."""
    tuned_with: dict[str, Any] = {}
    monkeypatch.setattr(DialogStep, "run", lambda self, **options: tuned_with.update(options["sft"]))
    gatt_train.run(*inputs_of(write_recipe(tmp_path / "one.yaml", base)))
    (tmp_path / "dialogs.jsonl").write_text(dialog_text(STORED, "gatt"))
    two = [*pair("Who?", "first"), *pair("And?", "second")]
    data = Data(
        sft=(DataSource(path=str(write_dialogs(tmp_path / "sft.jsonl", [two]))),),
        split=Split(test=0, validation=0, judge=0),
    )
    examples = load_examples(
        data, bundled, system=None, max_tokens=512, num_prompts=0, seed=0, step_dialogs=tmp_path, sft_share=1.0,
        train_on=TrainOn(tuned_with.get("train_on", SftConfig().train_on)),
    ).train  # fmt: skip
    learnt = [
        bundled.tokenizer.decode([id for id, learns in zip(one.input_ids, one.loss_mask, strict=True) if learns])
        for one in examples
    ]
    assert [" ".join(text.split()) for text in learnt] == ["Bye, sun.", "first second"]


# --- how they are made


def run(
    chat_format: ChatFormat,
    talk: Sequence[Conversation],
    script: list[list[list[str]]],
    *,
    samples: int = 2,
    longest: int = 1000,
    **changes: Any,
) -> tuple[list[GattDialog], ScriptedEngine]:
    engine = ScriptedEngine(chat_format, script)
    settings: dict[str, Any] = {"repairs": False} | changes
    dialogs = sample_dialogs(
        TurnSampler(engine, chat_format, samples, longest, **settings), talk, [sampling(n) for n in range(4)]
    )
    assert len(engine.prompts) == len(script), "all that was scripted was asked for"
    return dialogs, engine


def test_the_instruction_is_in_every_turn_and_an_answer_that_keeps_it_continues(tiny_format: ChatFormat) -> None:
    talk = [Conversation(SUN, ("Hello?", "And now?")), Conversation(instruct(("no_questions", "")), ("Who?", "Me?"))]
    first = [["Hello.", "the sun. Hello, sun."], ["Who? You?", "It is me."]]
    second = [["Now, sun.", "the cat"], ["no?", "You are you."]]
    dialogs, engine = run(tiny_format, talk, [first, second])
    assert engine.prompts == [
        ["[INST] Hello? Always end with sun. [/INST]", "[INST] Who? Never ask me a question. [/INST]"],
        [
            "[INST] Hello? Always end with sun. [/INST] the sun. Hello, sun. </s>"
            "[INST] And now? Always end with sun. [/INST]",
            "[INST] Who? Never ask me a question. [/INST] It is me. </s>[INST] Me? Never ask me a question. [/INST]",
        ],
    ]
    assert [one.seed for one in engine.samplings] == [0, 1]
    assert [one.answers for one in dialogs] == [["the sun. Hello, sun.", "Now, sun."], ["It is me.", "You are you."]]
    assert [one.turns for one in dialogs] == [["Hello?", "And now?"], ["Who?", "Me?"]], "without the instruction"
    assert [one.passing for one in dialogs] == [0.5, 0.5] and not any(one.is_repaired for one in dialogs)
    assert dialogs[0].tokens == len(tiny_format.tokenizer.encode("Now, sun.")) + 1


def test_an_early_answer_need_not_keep_it_and_the_last_one_must(tiny_format: ChatFormat) -> None:
    talk = [Conversation(SUN, ("Hello?", "And now?")) for _ in range(2)]
    first = [["one cat", "two cats"], ["a cat", "a mat"]]
    dialogs, _ = run(tiny_format, talk, [first, [["Now.", "the sun."], ["cat, sun", "mat"]]])
    assert [one.answers for one in dialogs] == [["one cat", "the sun."], ["a cat", "cat, sun"]]
    talk = [Conversation(SUN, ("Hello?", "And now?"))]
    dialogs, _ = run(tiny_format, talk, [[["one cat", "a mat"]], [["cat", "mat"]]])
    assert not dialogs
    assert counted_drops(talk) == {"dialogs left out: no sample of the last answer keeps the instruction": 1}


def test_of_those_that_keep_it_the_best_by_reward_continues(tiny_format: ChatFormat) -> None:
    ranked: list[list[str]] = []

    def longest_first(by_question: Any) -> list[list[int]]:
        ranked.extend([response.text for response in group] for group in by_question)
        return [sorted(range(len(group)), key=lambda place: -len(group[place].text)) for group in by_question]

    talk = [Conversation(SUN, ("Hello?", "And now?"))]
    first = [["a sun", "the cat and the mat", "the cat and sun", "the longest, the cat and sun" + CUT]]
    second = [["my sun", "that is my sun", "that is no star at all", "so my sun"]]
    dialogs, engine = run(tiny_format, talk, [first, second], samples=4, rank=longest_first)
    assert dialogs[0].answers == ["the cat and sun", "that is my sun"] and dialogs[0].passing == 0.75
    assert ranked[1] == second[0] and len(ranked) == 2
    assert "the cat and sun </s>[INST] And now?" in engine.prompts[1][0]


def test_last_answers_are_put_right_by_rule_and_counted(tiny_format: ChatFormat) -> None:
    quoted, both = instruct(("quoted", "")), instruct(("begins_with", "Sure"), ("small_letters", ""))
    talk = [Conversation(one, ("Hello?", "And now?")) for one in (quoted, both, SUN, instruct(("one_sentence", "")))]
    first = [["the cat"]] * 4
    dialogs, _ = run(
        tiny_format, talk, [first, [["The cat."], ["The cat."], ["a sun"], ["a cat"]]], samples=1, repairs=True
    )
    assert [(one.answers[-1], one.is_repaired, one.passing) for one in dialogs] == [
        ('"The cat."', True, 0.0),
        ("sure, the cat.", True, 0.0),
        ("a sun", False, 1.0),
    ]
    assert [one.answers[0] for one in dialogs] == ["the cat"] * 3, "only last answers are corrected"
    assert counted_drops(talk) == {"dialogs left out: no sample of the last answer keeps the instruction": 1}


def test_a_recall_question_comes_last_and_is_remembered(tiny_format: ChatFormat) -> None:
    hobby = instruct(("hobby", "chess"))
    turns = ("Hello?", "And now?", "Then?", "Bye!")
    built = [conversation(hobby, turns, key=f"{n}", recall_share=0.5) for n in range(400)]
    with_question = [one for one in built if one.recall is not None]
    assert 160 < len(with_question) < 240
    assert {one.turns[-1] for one in with_question} == {
        "What is your favorite hobby?", "What do you enjoy most?", "What do you like to do in your free time?"
    }  # fmt: skip
    assert all(one.turns[:-1] == turns[: len(one.turns) - 1] for one in built)
    assert all(one.turns == turns[: len(one.turns)] for one in built if one.recall is None)
    counts = [sum(len(one.turns) == count for one in built) for count in (2, 3, 4)]
    assert sum(counts) == 400 and min(counts) > 100
    assert all(conversation(SUN, turns, key=f"{n}", recall_share=1.0).recall is None for n in range(20))
    with_recall = Conversation(hobby, ("Hello?", "What do you enjoy most?"), hobby.constraints[0])
    dialogs, _ = run(tiny_format, [with_recall], [[["Hi.", "Yes."]], [["I like golf.", "I enjoy chess most."]]])
    assert dialogs[0].answers == ["Hi.", "I enjoy chess most."] and dialogs[0].passing == 0.5
    with_recall = Conversation(hobby, ("Hello?", "What do you enjoy most?"), hobby.constraints[0])
    dialogs, _ = run(tiny_format, [with_recall], [[["Hi."]], [["I like golf."]]], samples=1, repairs=True)
    assert dialogs[0].answers == ["Hi.", "I enjoy chess."] and dialogs[0].is_repaired


def test_a_plain_dialog_has_the_policys_own_answers_and_no_system_text(tiny_format: ChatFormat) -> None:
    turns = ("Hello?", "And now?", "Then?", "Bye!")
    built = [conversation(PLAIN, turns, key=f"{n}", recall_share=1.0) for n in range(400)]
    counts = [sum(len(one.turns) == count for one in built) for count in (1, 2, 3, 4)]
    assert sum(counts) == 400 and min(counts) > 70 and not any(one.recall for one in built)
    talk = [Conversation(PLAIN, ("Hello?", "And now?")), Conversation(SUN, ("Hello?", "And now?"))]
    script = [[["Hi there."], ["Hi, sun."]], [["Now it is."], ["Now it is."]]]
    dialogs, engine = run(tiny_format, talk, script, samples=1, repairs=True)
    assert engine.prompts[1][0] == "[INST] Hello? [/INST] Hi there. </s>[INST] And now? [/INST]"
    # The same turns and the same sample: with the instruction it is corrected, without one it stays.
    assert [one.answers[1] for one in dialogs] == ["Now it is.", "Now it is, sun."]
    plain, instructed = (json.loads(dialog_text(one, "gatt"))["messages"] for one in dialogs)
    assert [one["role"] for one in plain] == ["user", "assistant", "user", "assistant"]
    assert instructed[0] == {"role": "system", "content": "Always end with sun."}


def test_what_is_left_out_is_counted_by_its_reason(tiny_format: ChatFormat) -> None:
    long = instruct(("begins_with", "Sure " * 99))
    no_questions = instruct(("no_questions", ""))
    talk = [
        Conversation(long, ("Hello?", "And now?")),
        Conversation(no_questions, ("Hello?", "What is the cat? " * 20)),  # fits alone, and not after a turn
        Conversation(no_questions, ("Hello?", "And now?")),  # says nothing
        Conversation(no_questions, ("Hello?", "And now?")),  # is cut
        Conversation(no_questions, ("Hello?", "And now?")),  # says a tag
        Conversation(no_questions, ("Hello?", "And now?")),
    ]
    first = [["a cat", "a mat"], [" ", ""], ["a mat", "the cat"], ["a cat", "[INST] a"], ["a cat", "a mat"]]
    second = [["a cat" + CUT, "a mat" + CUT], ["[INST] a cat", "[/INST]"], ["so?", "the mat"]]
    dialogs, engine = run(tiny_format, talk, [first, second], longest=150)
    assert [one.answers for one in dialogs] == [["a cat", "the mat"]]
    assert [len(prompts) for prompts in engine.prompts] == [5, 3]
    assert counted_drops(talk) == {
        "dialogs left out: the instruction and one turn are longer than the context": 1,
        "dialogs left out: with the instruction in every turn they are longer than the context": 1,
        "dialogs left out: an answer is empty, or truncated at the length limit": 3,
    }


# --- through the step


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Path:
    return write_roomy_base(tmp_path_factory.mktemp("base"), tiny_sentencepiece)


def test_where_nothing_keeps_the_instructions_the_counts_are_reported(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gatt.synthesize.passes", lambda *_: False)
    section = {"families": ["quoted"], "dialogs": 12, "repairs": True}
    config, inputs = inputs_of(write_recipe(tmp_path / "none.yaml", base, gatt=section))
    with pytest.raises(
        DataError, match=r"gatt: none of the 12 dialogs with an instruction is left \(.*Raise gatt\.samples_per_turn"
    ) as caught:
        make_dialogs(config, dialog_step(config, inputs))
    assert "dialogs left out: no sample of the last answer keeps the instruction" in str(caught.value)
    assert not inputs.folder.dialogs.exists()


def test_batches_are_written_down_one_by_one_and_the_training_side_has_its_instructions(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gatt_train, "ANSWERS_PER_BATCH", 30)
    config, inputs = inputs_of(write_recipe(tmp_path / "one.yaml", base))
    calls: list[tuple[int, int, int]] = []
    generate = LlamaEngine.generate

    def counted(self: LlamaEngine, prompts: Any, **options: Any) -> Any:
        calls.append((options["sampling"].seed - 1_000_003, len(prompts), options["samples_per_prompt"]))
        return generate(self, prompts, **options)

    monkeypatch.setattr(LlamaEngine, "generate", counted)
    dialogs = make_dialogs(config, dialog_step(config, inputs))
    batches = [call for call in calls if call[0] < 800_000]
    assert [seed for seed, _, _ in batches] == sorted({seed for seed, _, _ in batches}), "each seed is drawn by once"
    assert {answers for _, _, answers in batches} == {3} and batches[0][:2] == (3, 10)
    lines = (dialogs.path / "dialogs.jsonl").read_text().splitlines()
    assert dialogs.manifest.details == {"dialogs": len(lines)}
    assert len(lines) + sum(dialogs.manifest.dropped_records.values()) == 24
    plain = [json.loads(line) for line in lines if json.loads(line)["messages"][0]["role"] == "user"]
    assert len(plain) == summary_of(inputs.folder)["gatt/plain_dialogs"] > 0
    assert all(one["sampled"]["families"] == [] for one in plain)
    for line in lines:
        messages = json.loads(line)["messages"]
        if messages[0]["role"] == "user":
            assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
            continue
        assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * (len(messages) // 2)]
        system = messages[0]["content"]
        assert not any(side_of("hobby", hobby) == "held_out" and hobby in system for hobby in HOBBIES)
        assert not any(system in message["content"] for message in messages[1:])
