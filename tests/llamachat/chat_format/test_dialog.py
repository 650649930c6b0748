"""The rules of a conversation: what is accepted, and each fault with its field, reason and fix."""

import pickle
from typing import Any

import pytest

from llamachat import errors
from llamachat.chat_format.dialog import DialogError, EndsWith, Message, check_messages, parse_messages

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("records", "ends_with"),
    [
        ([USER], "user"),
        ([USER, ANSWER], "assistant"),
        ([SYSTEM, USER, ANSWER, USER], "user"),
        ([SYSTEM, USER, ANSWER, USER, ANSWER], "either"),
        ([{"role": "system", "content": ""}, USER], "either"),
        ([USER, {"role": "assistant", "content": "</s> <s> \u2581 \x00", "train": False, "name": "x"}], "assistant"),
    ],
)
def test_conversations_of_the_reference_code_are_accepted(records: list[dict[str, Any]], ends_with: EndsWith) -> None:
    messages = parse_messages(records)
    check_messages(messages, ends_with=ends_with)
    assert [(message.role, message.content) for message in messages] == [(r["role"], r["content"]) for r in records]


def test_the_train_mark_is_kept() -> None:
    records = [USER, {**ANSWER, "train": False}, USER, {**ANSWER, "train": None}]
    assert [message.train for message in parse_messages(records)] == [None, False, None, None]


# The other breaches are in the tests of `data check`.
@pytest.mark.parametrize(
    ("records", "ends_with", "field", "reason", "fix"),
    [
        (None, "either", "messages", "is null", "Write ["),
        ([{"role": "user", "text": "Hi"}], "either", "messages[0].content", "holds 'role', 'text'", "'content'"),
        ([{**USER, "role": "Human"}], "either", "messages[0].role", "is 'Human'", "Write 'user'"),
        ([{**USER, "content": "\u3000"}], "either", "messages[0].content", "is empty", "Write the text"),
        ([SYSTEM, ANSWER], "either", "messages[1].role", "the user speaks first", "Drop the leading answer"),
        ([USER, ANSWER, USER], "assistant", "messages[2].role", "training needs the answer", "drop the question"),
        ([USER, ANSWER], "user", "messages[1].role", "a prompt ends with", "Drop the last answer"),
    ],
)
def test_each_breach_names_field_reason_and_fix(
    records: Any, ends_with: EndsWith, field: str, reason: str, fix: str
) -> None:
    with pytest.raises(DialogError) as caught:
        check_messages(parse_messages(records), ends_with=ends_with)
    assert caught.value.field == field
    assert reason in caught.value.reason
    assert fix in caught.value.fix
    assert str(caught.value) == f"{field}: {caught.value.reason} {caught.value.fix}"


def test_the_field_starts_where_the_reader_says() -> None:
    with pytest.raises(DialogError) as caught:
        check_messages([Message("assistant", "Hello.")], ends_with="user", field="prompt")
    assert caught.value.field == "prompt[0].role"


def test_a_dialog_error_survives_pickling() -> None:
    copy = pickle.loads(pickle.dumps(DialogError("messages", "is empty.", "Drop it.")))
    assert (copy.field, copy.reason, copy.fix) == ("messages", "is empty.", "Drop it.")


def test_exit_status_tells_failure_from_bad_input() -> None:
    bad_input = {errors.UsageError, errors.ConfigError, errors.DataError, errors.ChangedError}
    failures = {errors.LlamachatError, errors.ArtifactError, errors.BusyError, errors.TokenizerError}
    assert {kind.exit_status for kind in bad_input} == {2}
    assert {kind.exit_status for kind in failures} == {1}
