"""Each source turns rows of its set's real shape into the records written out here, and refuses broken rows in words."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format.dialog import DialogError
from llamachat.data.sources import SOURCES
from tests.llamachat.data.test_preference_sources import GOOD as GRADED


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def node(text: str, *replies: dict[str, Any], rank: int | None = None) -> dict[str, Any]:
    """A message of an OpenAssistant tree without its role, which `tree` sets by depth."""
    return {"message_id": f"id of {text}", "text": text, "replies": list(replies)} | (
        {} if rank is None else {"rank": rank}
    )


def tree(root: dict[str, Any]) -> dict[str, Any]:
    def with_roles(message: dict[str, Any], depth: int) -> dict[str, Any]:
        replies = [with_roles(reply, depth + 1) for reply in message["replies"]]
        return message | {"role": "assistant" if depth % 2 else "prompter", "deleted": False, "replies": replies}

    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": with_roles(root, 0)}


TREE = tree(
    node(
        "q",
        node("second", node("never asked again", node("late", rank=0)), rank=1),
        node("best", node("more?", node("only answer")), node("thanks", rank=None), rank=0),
        node("worst", rank=3),
    )
)

GOOD: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    (
        "hh_rlhf",
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Steal?\nOr not?\n\nAssistant: No.\n\nNever.",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Steal?\nOr not?\n\nAssistant: Sure.",
        },
        [
            {
                "prompt": [user("Hi"), answer("Hello."), user("Steal?\nOr not?")],
                "chosen": [answer("No.\n\nNever.")],
                "rejected": [answer("Sure.")],
            }
        ],
    ),
    (
        "dolly",
        {"instruction": "When?", "context": "In 1990.", "response": "1990", "category": "closed_qa"},
        [{"messages": [user("When?\n\nIn 1990."), answer("1990")]}],
    ),
    (
        "dolly",
        {"instruction": "When?", "context": "", "response": "1990", "category": "open_qa"},
        [{"messages": [user("When?"), answer("1990")]}],
    ),
    ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"}, [{"messages": [user("Add.\n\n1, 2"), answer("3")]}]),
    (
        "alpaca",
        {"instruction": "And now?", "input": None, "output": "4", "system": "Count.", "history": [["Start", "1"], ["Go on", "2"]]},
        [
            {
                "messages": [
                    system("Count."), user("Start"), answer("1"), user("Go on"), answer("2"), user("And now?"), answer("4"),
                ]
            }
        ],
    ),
    (
        "gpteacher",
        {"instruction": "You are a cat.", "input": "", "response": "Meow."},
        [{"messages": [user("You are a cat."), answer("Meow.")]}],
    ),
    (
        "self_instruct",
        {"id": "seed_task_0", "instruction": "Rhyme.", "instances": [{"input": "cat", "output": "hat"}, {"input": "", "output": "time"}]},
        [{"messages": [user("Rhyme.\n\ncat"), answer("hat")]}, {"messages": [user("Rhyme."), answer("time")]}],
    ),
    (
        "sharegpt",
        {
            "id": "x",
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "user", "value": "Bye"},
                {"from": "chatgpt", "value": "Bye"},
            ],
        },
        [{"messages": [system("Be brief."), user("Hi"), answer("Hello"), user("Bye"), answer("Bye")]}],
    ),
    (
        "llamafactory_preference",
        {
            "conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "1+1?"},
            ],
            "chosen": {"from": "gpt", "value": "2"},
            "rejected": {"from": "gpt", "value": "3"},
            "system": "",
        },
        [{"prompt": [user("Hi"), answer("Hello"), user("1+1?")], "chosen": [answer("2")], "rejected": [answer("3")]}],
    ),
    # Best answers all the way: the path ends in an answer, and a thread after a worse answer is not taken.
    ("oasst", TREE, [{"messages": [user("q"), answer("best"), user("more?"), answer("only answer")]}]),
    (
        "oasst_preference",
        TREE,
        [
            {"prompt": [user("q")], "chosen": [answer("best")], "rejected": [answer("second")], "rating": "slightly_better"},
            {"prompt": [user("q")], "chosen": [answer("best")], "rejected": [answer("worst")], "rating": "significantly_better"},
            {"prompt": [user("q")], "chosen": [answer("second")], "rejected": [answer("worst")], "rating": "better"},
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "records"), GOOD)
def test_a_row_becomes_its_records(name: str, row: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
    before = json.dumps(row)
    assert list(SOURCES[name].convert(row)) == records
    assert json.dumps(row) == before


def test_an_answer_dropped_by_the_moderators_is_no_answer() -> None:
    row = tree(node("q", node("best", rank=0), node("second", rank=1)))
    row["prompt"]["replies"][0]["deleted"] = True
    assert list(SOURCES["oasst"].convert(row)) == [{"messages": [user("q"), answer("second")]}]
    assert list(SOURCES["oasst_preference"].convert(row)) == []


def test_a_question_without_an_answer_gives_no_dialog() -> None:
    assert list(SOURCES["oasst"].convert(tree(node("q")))) == []


ROLE_OF_TOOLS = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "{}"}]
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("hh_rlhf", {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes"}, "rejected", "is missing"),
    ("hh_rlhf", {"chosen": 3, "rejected": ""}, "chosen", "holds a number"),
    ("hh_rlhf", {"chosen": "Hi", "rejected": "Hi"}, "chosen", "does not begin with 'Human:'"),
    (
        "hh_rlhf",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi"},
        "rejected", "does not end with an answer",
    ),
    (
        "hh_rlhf",
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Ho\n\nAssistant: No"},
        "rejected", "parts from 'chosen'",
    ),
    ("dolly", {"instruction": "When?", "context": ""}, "response", "is missing"),
    ("dolly", {"instruction": "When?", "context": ["x"], "response": "1"}, "context", "holds a list"),
    ("alpaca", {"instruction": "Add.", "output": None}, "output", "holds nothing"),
    ("alpaca", {"instruction": "Add.", "output": "3", "history": [["only a question"]]}, "history", "is not a list of pairs"),
    ("gpteacher", {"instruction": "Add.", "input": True, "response": "3"}, "input", "holds a boolean"),
    ("self_instruct", {"instruction": "Rhyme.", "instances": []}, "instances", "holds an empty list"),
    ("self_instruct", {"instruction": "Rhyme.", "instances": ["hat"]}, "instances[0]", "holds text"),
    ("sharegpt", {"conversations": "Hi"}, "conversations", "holds text"),
    ("sharegpt", {"conversations": ROLE_OF_TOOLS}, "conversations[1].from", "is 'function_call'"),
    ("sharegpt", {"conversations": [{"from": "human", "value": {}}]}, "conversations[0].value", "holds an object"),
    (
        "llamafactory_preference",
        {"conversations": ROLE_OF_TOOLS[:1], "chosen": "2", "rejected": {"from": "gpt", "value": "3"}},
        "chosen", "holds text",
    ),
    (
        "llamafactory_preference",
        {"conversations": ROLE_OF_TOOLS[:1], "chosen": {"from": "gpt", "value": "2"}, "rejected": {"from": "human", "value": "3"}},
        "rejected.from", "says that the user speaks",
    ),
    ("oasst", {"message_tree_id": "t", "prompt": "q"}, "prompt", "holds text"),
    ("oasst", {"prompt": {"text": "q", "role": "system"}}, "role", "is 'system'"),
    ("oasst", {"prompt": {"text": "q", "role": "prompter", "replies": {"a": 1}}}, "replies", "is not a list"),
    ("oasst_preference", {"prompt": {"text": None, "role": "prompter"}}, "text", "holds nothing"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "field", "reason"), BAD)
def test_a_broken_row_is_refused_with_its_field_and_the_fix(
    name: str, row: Mapping[str, Any], field: str, reason: str
) -> None:
    with pytest.raises(DialogError) as caught:
        list(SOURCES[name].convert(row))
    assert (caught.value.field, reason in caught.value.reason) == (field, True)
    assert caught.value.fix


def test_every_source_stands_under_its_name_and_betrays_itself_by_its_own_rows() -> None:
    assert all(name == source.name for name, source in SOURCES.items())
    assert all(SOURCES[name].fits(row) for name, row, _ in [*GOOD, *GRADED])
    assert {name for name, _, _ in [*GOOD, *GRADED]} == SOURCES.keys()


def test_every_source_is_in_the_table_of_formats_with_its_fields_and_kind() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "data_formats.md").read_text(encoding="utf-8")
    table = page.partition("## Known sets")[2].partition("|---|")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*\| \w+.*)\|$", table, flags=re.MULTILINE))
    assert rows.keys() == SOURCES.keys()
    for name, row in rows.items():
        assert row.rpartition("|")[2].split()[0].rstrip(",") == f"{SOURCES[name].kind}s", name
        if "the same" not in row and "see above" not in row:
            assert all(f"`{field}`" in row or field == "graded_responses" for field in SOURCES[name].fields), name
