"""Pairs that people have rated, as preferences: what is read, what is counted, what is refused, what is learnt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Message
from llamachat.config.sections import DataSource, Split
from llamachat.data.check import check_path
from llamachat.data.convert.command import convert_path
from llamachat.data.loading import load_mixture, read_records
from llamachat.data.records import Preference
from llamachat.errors import DataError
from reward.pairs import UNSAFE_CHOSEN, Encoder, Sourced


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def rated(choice: Any, **more: Any) -> dict[str, Any]:
    return {
        "id": "7",
        "prompt": [{"role": "user", "content": "q"}],
        "answer_a": "first",
        "answer_b": "second",
        "choice": choice,
        "rating": None,
        "a_is_safe": None,
        "b_is_safe": None,
        "policy_a": "x",
        **more,
    }


def test_rated_pairs_become_preferences_and_unrated_ones_are_counted(tmp_path: Path, tiny_format: ChatFormat) -> None:
    rows = [
        rated("a", rating="better", a_is_safe=True, b_is_safe=False),
        rated(None),
        rated("b", a_is_safe=False),
        rated(None),
    ]
    path = write_lines(tmp_path / "rated.jsonl", rows)
    prompt, first, second = (Message("user", "q"),), Message("assistant", "first"), Message("assistant", "second")
    expected = [
        Preference(
            prompt=prompt, chosen=first, rejected=second, rating="better", chosen_is_safe=True, rejected_is_safe=False
        ),
        Preference(prompt=prompt, chosen=second, rejected=first, rejected_is_safe=False),
    ]
    for form in ("auto", "rated_pairs"):
        sources = [DataSource(path=str(path), format=form)]
        nothing = Split(test=0, validation=0, judge=0)
        found = load_mixture(sources, nothing, Preference, forbidden=tiny_format.forbidden, seed=0)
        assert (found.train, found.dropped) == (expected, {f"{path}: row without a preference": 2})
    checked = check_path(str(path), None, "auto", tiny_format.forbidden)
    assert (checked.kind, checked.num_records, checked.problems, checked.warnings) == ("preference", 2, [], [])
    report = convert_path(str(path), tmp_path / "out.jsonl", forbidden=tiny_format.forbidden)
    assert (report.kind, report.written, report.without, report.problems) == ("preference", 2, 2, [])
    converted = read_records(DataSource(path=report.out, format="native"), Preference, forbidden=tiny_format.forbidden)
    assert converted == expected


@pytest.mark.parametrize(
    ("row", "found"),
    [
        (rated("c"), r":1: choice: is 'c'\. .*Write 'a', 'b' or null\."),
        (rated(" A"), r":1: choice: is ' A'\. .*Write 'a'\."),
        (rated(1), ":1: choice: is 1"),
        (rated(None, rating="better"), ":1: choice: is null, but 'rating' is 'better'.*take the rating out"),
        (rated("a", rating="best"), ":1: rating: is 'best', but the ratings are significantly_better"),
        (rated("a", b_is_safe="no"), ":1: b_is_safe: holds text.*true or false"),
        (rated("b", answer_b=None), ":1: answer_b: holds nothing"),
        (rated("a", prompt=[]), ":1: prompt: holds an empty list"),
        (rated("a", answer_b="first"), ":1: rejected: is the same answer as 'chosen'"),
    ],
)
def test_a_wrong_rating_is_an_error_with_its_line(
    row: dict[str, Any], found: str, tmp_path: Path, tiny_format: ChatFormat
) -> None:
    path = write_lines(tmp_path / "rated.jsonl", [row, rated("a")])
    with pytest.raises(DataError, match=found):
        read_records(DataSource(path=str(path)), Preference, forbidden=tiny_format.forbidden)


def test_no_reward_model_learns_that_an_unsafe_answer_beats_a_safe_one(tmp_path: Path, tiny_format: ChatFormat) -> None:
    path = write_lines(tmp_path / "rated.jsonl", [rated("a", a_is_safe=False, b_is_safe=True), rated("b")])
    (unsafe, plain) = read_records(DataSource(path=str(path)), Preference, forbidden=tiny_format.forbidden)
    encoder = Encoder(tiny_format, None, 64, "small")
    sourced = [Sourced(record, "helpfulness", str(path)) for record in (unsafe, plain)]
    assert [example.preference for example in encoder.pairs(sourced)] == [plain]
    assert encoder.dropped == {UNSAFE_CHOSEN: 1}
