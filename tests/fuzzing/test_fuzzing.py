"""Hundreds of random calls of the command line break none of its rules; `tests/fuzzing/cases.py` makes and judges them."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzzing import cases
from tests.fuzzing.cases import OFFLINE, World, call

NUMBERS = st.integers(0, 2**32 - 1)
ALIKE = settings(
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],  # a smaller number is no simpler case
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory, tiny_sentencepiece: bytes) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("fuzzing")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**OFFLINE, "HOME": str(folder)}.items():
            patch.setenv(name, value)
        for name in ("huggingface_hub.constants", "datasets.config"):
            if name in sys.modules:  # it has read the environment already
                patch.setattr(sys.modules[name], "HF_HUB_OFFLINE", True)
        patch.setattr("llamachat.tracking.curves.panels_of", lambda _: {})  # drawing takes longer than all else
        patch.chdir(folder)
        yield World(folder, lambda: tiny_sentencepiece)


def check(fuzzed: World, kind: str, number: int) -> None:
    faults = list(fuzzed.case(Random(number), kind))
    assert not faults, "\n".join([f"python -m tests.fuzzing.cases --kind {kind} --case {number}", *faults])


@settings(ALIKE, max_examples=150)
@given(number=NUMBERS)
def test_every_record_of_a_random_file_comes_out_or_is_counted(fuzzed: World, number: int) -> None:
    check(fuzzed, "data", number)


@settings(ALIKE, max_examples=80)
@given(number=NUMBERS)
def test_random_recipes_are_planned_or_refused(fuzzed: World, number: int) -> None:
    check(fuzzed, "recipe", number)


@settings(ALIKE, max_examples=15)
@given(number=NUMBERS)
def test_a_damaged_run_is_read_or_refused(fuzzed: World, number: int) -> None:
    check(fuzzed, "damage", number)


@settings(ALIKE, max_examples=40)
@given(number=NUMBERS)
def test_random_command_lines_end_in_words(fuzzed: World, number: int) -> None:
    check(fuzzed, "words", number)


def test_a_file_named_as_an_output_may_be_replaced_where_the_command_does_not_read_it() -> None:
    a, b = Path("/a.jsonl"), Path("/b.jsonl")
    for command, expected in {
        "tokens --in /a.jsonl --out /b.jsonl --overwrite": [b],
        "tokens --in /a.jsonl --out /b.jsonl": [],
        "tokens --in /a.jsonl --out /a.jsonl --overwrite": [],
        "pairs --in /c --out o --key /b.jsonl --overwrite": [b],
        "data convert /a.jsonl /b.jsonl --overwrite": [b],
        "data convert /a.jsonl /a.jsonl --overwrite": [],
    }.items():
        assert cases.replaceable(command.split(), [a, b]) == expected, command


def test_what_breaks_a_rule_is_seen(fuzzed: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(arguments: Sequence[str]) -> int:
        what, path = arguments
        if what == "raise":
            raise KeyError("choice")
        if what == "wait":
            while True:
                pass
        Path(path).write_bytes(b"" if what == "empty" else Path(path).read_bytes())
        return {"quiet": 1, "odd": 7}.get(what, 0)

    monkeypatch.setattr(cases, "main", spoiled)
    file = fuzzed.folder / "file"
    expected = {
        "raise": "KeyError",
        "quiet": "without a word",
        "odd": "status 7",
        "empty": "an input changed",
        "good": "",
    }
    for what, fault in expected.items():
        file.write_bytes(b"rows")
        faults = list(fuzzed.ran([what, str(file)], [file]))
        assert [fault in one for one in faults] == [True] * bool(fault), what
    assert "hang of 1 s" in call(["wait", str(file)], limit=1).traceback
    assert os.environ["HF_HUB_OFFLINE"] == "1"
