"""What is said and asked for in Ghost Attention: sides of values, values that a policy names, sequences of user turns."""

from pathlib import Path

import pytest

from gatt.config import Config, Lists
from gatt.session import LISTS_SAMPLED, QUESTIONS, lists_of
from llamachat.answers.consistency import load_sequences
from llamachat.chat_format import ChatFormat
from llamachat.config.sections import Data, DataSource, Split
from llamachat.errors import ConfigError, DataError
from pipelines.recipe.recipe import load
from tests.gatt.tiny_gatt import HOBBIES, ScriptedEngine, sampling, talks
from tests.recipes import write_recipe
from tests.sft.tiny_sft import write_dialogs


def test_values_may_be_named_by_the_policy(tiny_format: ChatFormat) -> None:
    lists = [
        "1. Golf\n2. chess\n3. Sailing",
        "- golf: my love\n- Chess\n- knitting",
        "Here they are:\n* tennis\n* golf",
    ]
    answers = [*lists, *(f"1. {hobby}\n2. golf" for hobby in HOBBIES), *[""] * (LISTS_SAMPLED - 15)]
    engine = ScriptedEngine(tiny_format, [[answers]])
    config = Config(families=("hobby", "quoted"), values="policy")
    hobbies = lists_of(config, engine, tiny_format, sampling())["hobbies"]
    assert engine.prompts == [[f"[INST] {QUESTIONS['hobbies']} [/INST]"]]
    # As first spelt; golf was named sixteen times, chess three times.
    assert hobbies[:2] == ["Golf", "chess"] and {name.casefold() for name in hobbies} == set(HOBBIES)
    assert len(hobbies) == len(HOBBIES)
    engine = ScriptedEngine(tiny_format, [[["1. golf\n2. Chess\n3. chess"] * LISTS_SAMPLED]])
    with pytest.raises(
        DataError, match=r"gatt\.values: policy, but the policy named only 2 hobbies in 32 answers, and 12 are"
    ):
        lists_of(config, engine, tiny_format, sampling())


def data_of(path: Path) -> Data:
    return Data(sft=(DataSource(path=str(path)),), split=Split(test=0.3, validation=0.2, judge=0))


def test_sequences_are_whole_and_no_dialog_is_on_two_sides(tiny_format: ChatFormat, tmp_path: Path) -> None:
    dialogs = [*talks(40), [{"role": "user", "content": "cat " * 90}, {"role": "assistant", "content": "mat"}]]
    data = data_of(write_dialogs(tmp_path / "dialogs.jsonl", dialogs))
    sequences = load_sequences(data, tiny_format, turns=3, context=480, seed=1)
    sides = [
        {turn for turns in side for turn in turns} for side in (sequences.train, sequences.validation, sequences.test)
    ]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert {len(turns) for side in (sequences.train, sequences.validation, sequences.test) for turns in side} == {3}
    said = {message["content"] for dialog in talks(40) for message in dialog if message["role"] == "user"}
    assert set().union(*sides) <= said, "the long turn is nowhere, and no answer is"
    assert load_sequences(data, tiny_format, turns=3, context=480, seed=1) == sequences
    assert load_sequences(data, tiny_format, turns=3, context=480, seed=2).train != sequences.train


def test_dialogs_without_enough_user_turns_are_refused(tiny_format: ChatFormat, tmp_path: Path) -> None:
    few = data_of(write_dialogs(tmp_path / "few.jsonl", talks(6)))
    with pytest.raises(
        DataError, match=r"data\.sft: its dialogs give 0 sequences of 20 user turns of at most 60 tokens"
    ):
        load_sequences(few, tiny_format, turns=20, context=480, seed=1)
    with pytest.raises(DataError, match=r"Add dialogs, or lower gatt\.turns and gatt\.evaluation_turns"):
        load_sequences(few, tiny_format, turns=2, context=40, seed=1)
    said_by_none = [[{"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "I am."}]]
    none = data_of(write_dialogs(tmp_path / "none.jsonl", said_by_none))
    with pytest.raises(DataError, match=r"none\.jsonl:1"):
        load_sequences(none, tiny_format, turns=2, context=480, seed=1)


def test_weights_of_families_that_are_not_drawn_are_refused(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, gatt={"families": ["hobby", "quoted"], "weights": {"hobby": 2, "figure": 3}})
    with pytest.raises(ConfigError, match="gatt: weights contains figure, but families has only hobby, quoted"):
        load(path)


def test_an_entry_with_a_tag_of_the_chat_format_is_named(tmp_path: Path, tiny_format: ChatFormat) -> None:
    path = tmp_path / "hobbies.txt"
    path.write_text("chess\n[INST] golf\n" + "\n".join(HOBBIES))
    config = Config(families=("hobby",), lists=Lists(hobbies=str(path)))
    with pytest.raises(DataError, match=r"hobbies\.txt: the entry '\[INST\] golf' holds '\[INST\]' .* Reword it"):
        lists_of(config, ScriptedEngine(tiny_format, []), tiny_format, sampling())
