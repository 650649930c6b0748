"""Each source turns rows of its set's real shape into the records written out here, and refuses broken rows in words."""

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format import ChatFormat
from llamachat.chat_format.dialog import Dialog, DialogError
from llamachat.config.sections import DataSource, Split
from llamachat.data.check import check_path
from llamachat.data.convert.command import convert_path
from llamachat.data.loading import load_mixture, read_records
from llamachat.data.records import KIND_OF, Preference
from llamachat.data.sources import SOURCES
from llamachat.data.sources.judged import FINE_GRAINED, OVERALL, STRENGTH
from llamachat.data.sources.source import rating_of_difference
from llamachat.errors import DataError
from tests.llamachat.data.lines import answer, system, turns, user, write


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


def pair(chosen: str, rejected: str, rating: str | None = None, *prompt: dict[str, str]) -> dict[str, Any]:
    record = {"prompt": list(prompt) or [user("q")], "chosen": [answer(chosen)], "rejected": [answer(rejected)]}
    return record if rating is None else record | {"rating": rating}


def shared(*texts: str, **more: object) -> dict[str, Any]:
    senders = ("human", "gpt", "user", "chatgpt")[: len(texts)]
    conversation = [{"from": sender, "value": text} for sender, text in zip(senders, texts, strict=True)]
    return {"conversations": conversation, **more}


def completion(
    text: str, score: float | None = None, *, ratings: str = "3 3 3 3", overall: float = 7.0
) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    annotations = {
        name: {"Rating": grade, "Rationale": "r"} for name, grade in zip(aspects, ratings.split(), strict=True)
    }
    row = {"annotations": annotations, "custom_system_prompt": f"As {text} would.", "model": "gpt-4", "response": text}
    row["overall_score"] = overall
    return row if score is None else row | {"fine-grained_score": score}


def ultra(*completions: Any) -> dict[str, Any]:
    return {"source": "evol_instruct", "instruction": "q", "models": ["gpt-4"], "completions": list(completions)}


def binarized(chosen: Any, rejected: Any, better: object = 8.5, worse: object = 8.0) -> dict[str, Any]:
    beside = {"prompt": "q", "prompt_id": "f0", "messages": chosen}
    return {**beside, "chosen": chosen, "rejected": rejected, "score_chosen": better, "score_rejected": worse}


def graded(text: str, helpfulness: object, prompt: str = "q") -> dict[str, Any]:
    others = {"correctness": 4, "coherence": 4, "complexity": 2, "verbosity": 1}
    return {"prompt": prompt, "response": text, "helpfulness": helpfulness, **others}


PKU = {
    "prompt": "q", "response_0": "how", "response_1": "no", "prompt_source": "Alpaca3-70B",
    "is_response_0_safe": False, "is_response_1_safe": True, "response_0_severity_level": 2,
    "response_0_harm_category": {"Economic Crime": True}, "better_response_id": 0, "safer_response_id": 1,
}  # fmt: skip
HARMS = {"animal_abuse": False, "drug_abuse,weapons,banned_substance": True}
BEAVER = {"prompt": "q", "response": "how", "category": HARMS, "is_safe": False}
HELP2 = {"split": "train", "prompt": "q", "response_1": "a", "response_2": "b", "preference_strength": 1}
HELP3 = {
    "domain": "code", "language": "python", "context": [user("q")], "response1": "a", "response2": "b",
    "overall_preference": 1, "individual_preference": [{"score": 1, "reasoning": "r"}],
}  # fmt: skip
TURNS = "q\n<extra_id_1>Assistant\nr\nand more\n<extra_id_1>User\ns"
SPOKEN = (user("q"), answer("r\nand more"), user("s"))
RATED = {"id": "1", "prompt": list(SPOKEN), "answer_a": "a", "answer_b": "b", "choice": "b", "rating": "better"}
RATED |= {"a_is_safe": False, "b_is_safe": None, "policy_a": "runs/one"}
SAFETY, HELP = "pku_saferlhf_safety", "pku_saferlhf_helpfulness"
A, B = turns("q", "a"), turns("q", "b")
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Steal?\nOr not?\n\nAssistant: "

FORSAKEN = tree(node("q", node("best", rank=0), node("second", rank=1)))
FORSAKEN["prompt"]["replies"][0]["deleted"] = True
GOOD: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    (
        "hh_rlhf",
        {"chosen": f"{HH}No.\n\nNever.", "rejected": f"{HH}Sure."},
        [pair("No.\n\nNever.", "Sure.", None, *turns("Hi", "Hello.", "Steal?\nOr not?"))],
    ),
    (
        "dolly",
        {"instruction": "When?", "context": "In 1990.", "response": "1990", "category": "closed_qa"},
        [{"messages": turns("When?\n\nIn 1990.", "1990")}],
    ),
    ("alpaca", {"instruction": "Add.", "input": "1, 2", "output": "3"}, [{"messages": turns("Add.\n\n1, 2", "3")}]),
    (
        "alpaca",
        {"instruction": "And now?", "input": None, "output": "4", "system": "Count.", "history": [["Start", "1"], ["Next", "2"]]},
        [{"messages": [system("Count."), *turns("Start", "1", "Next", "2", "And now?", "4")]}],
    ),
    ("gpteacher", {"instruction": "Be a cat.", "input": "", "response": "Meow."}, [{"messages": turns("Be a cat.", "Meow.")}]),
    (
        "self_instruct",
        {"id": "seed_task_0", "instruction": "Rhyme.", "instances": [{"input": "cat", "output": "hat"}, {"input": "", "output": "time"}]},
        [{"messages": turns("Rhyme.\n\ncat", "hat")}, {"messages": turns("Rhyme.", "time")}],
    ),
    ("sharegpt", shared("Hi", "Hello", "Bye", "Bye", id="x"), [{"messages": turns("Hi", "Hello", "Bye", "Bye")}]),
    ("sharegpt", shared("Hi", "Hello", system="Be brief."), [{"messages": [system("Be brief."), *turns("Hi", "Hello")]}]),
    (
        "llamafactory_preference",
        shared("Hi", "Hello", "1+1?", chosen={"from": "gpt", "value": "2"}, rejected={"from": "gpt", "value": "3"}, system=""),
        [pair("2", "3", None, *turns("Hi", "Hello", "1+1?"))],
    ),
    # Best answers all the way: the path ends in an answer, and a thread after a worse answer is not taken.
    ("oasst", TREE, [{"messages": turns("q", "best", "more?", "only answer")}]),
    (
        "oasst_preference",
        TREE,
        [
            pair("best", "second", "slightly_better"),
            pair("best", "worst", "significantly_better"),
            pair("second", "worst", "better"),
        ],
    ),
    # An answer that the moderators deleted is no answer, and a question without one gives no dialog.
    ("oasst", FORSAKEN, [{"messages": turns("q", "second")}]),
    ("oasst_preference", FORSAKEN, []),
    ("oasst", tree(node("q")), []),
    (SAFETY, PKU, [pair("no", "how") | {"chosen_is_safe": True, "rejected_is_safe": False}]),
    (HELP, PKU, [pair("how", "no") | {"chosen_is_safe": False, "rejected_is_safe": True}]),
    ("beavertails", BEAVER, [{"messages": turns("q", "how"), "is_safe": False}]),
    # Fine-grained scores 4.5, 3.5, 3.5 and 4.25: the two equal answers give no pair.
    (
        "ultrafeedback",
        ultra(completion("a", 4.5), completion("b", 3.5), completion("c", 3.5), completion("d", 4.25)),
        [
            pair("a", "b", "better"),
            pair("a", "c", "better"),
            pair("a", "d", "negligibly_better"),
            pair("d", "b", "slightly_better"),
            pair("d", "c", "slightly_better"),
        ],
    ),
    # Without it, means of the ratings that are given: (5 + 4) / 2 against (2 + 2 + 2 + 3) / 4.
    (
        "ultrafeedback",
        ultra(completion("a", ratings="5 N/A 4 N/A"), completion("b", ratings="2 2 2 3", overall=10.0)),
        [pair("a", "b", "significantly_better")],
    ),
    ("ultrafeedback", ultra(), []),
    ("ultrafeedback_binarized", binarized(A, B), [pair("a", "b", "negligibly_better")]),
    ("ultrafeedback_binarized", binarized(A, B, 7, 7), []),
    ("helpsteer2_preference", HELP2 | {"preference_strength": -3}, [pair("a", "b", "significantly_better")]),
    ("helpsteer2_preference", HELP2 | {"prompt": TURNS}, [pair("b", "a", "slightly_better", *SPOKEN)]),
    ("helpsteer2_preference", HELP2 | {"preference_strength": 0}, []),
    (
        "helpsteer2",
        {"prompt": TURNS, "graded_responses": [graded("a", 1), graded("b", 4), graded("c", 4)]},
        [pair("b", "a", "significantly_better", *SPOKEN), pair("c", "a", "significantly_better", *SPOKEN)],
    ),
    ("helpsteer3", HELP3 | {"overall_preference": 2, "context": list(SPOKEN)}, [pair("b", "a", "better", *SPOKEN)]),
    ("helpsteer3", HELP3 | {"overall_preference": -1}, [pair("a", "b", "slightly_better")]),
    ("helpsteer3", HELP3 | {"overall_preference": 0}, []),
    ("rated_pairs", RATED, [pair("b", "a", "better", *SPOKEN) | {"rejected_is_safe": False}]),
    ("rated_pairs", RATED | {"choice": None, "rating": None}, []),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "records"), GOOD)
def test_a_row_becomes_its_records(name: str, row: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
    before = json.dumps(row)
    assert list(SOURCES[name].convert(row)) == records
    assert json.dumps(row) == before


ROLE_OF_TOOLS = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "{}"}]
BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("hh_rlhf", {"chosen": "\n\nHuman: Hi\n\nAssistant: Yes"}, "rejected", "is missing"),
    ("hh_rlhf", {"chosen": 3, "rejected": ""}, "chosen", "holds a number"),
    ("hh_rlhf", {"chosen": "Hi", "rejected": "Hi"}, "chosen", "does not begin with 'Human:'"),
    ("hh_rlhf", {"chosen": f"{HH}Yes", "rejected": "\n\nHuman: Hi"}, "rejected", "does not end with an answer"),
    ("hh_rlhf", {"chosen": f"{HH}Yes", "rejected": f"{HH}No".replace("Hi", "Ho")}, "rejected", "differs from 'chosen'"),
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
        "rejected.from", "says that it is the user's",
    ),
    ("oasst", {"message_tree_id": "t", "prompt": "q"}, "prompt", "holds text"),
    ("oasst", {"prompt": {"text": "q", "role": "system"}}, "role", "is 'system'"),
    ("oasst", {"prompt": {"text": "q", "role": "prompter", "replies": {"a": 1}}}, "replies", "is not a list"),
    ("oasst_preference", {"prompt": {"text": None, "role": "prompter"}}, "text", "holds nothing"),
    (SAFETY, PKU | {"safer_response_id": 2}, "safer_response_id", "is 2"),
    (SAFETY, PKU | {"safer_response_id": True}, "safer_response_id", "is True"),
    (SAFETY, PKU | {"safer_response_id": 0}, "safer_response_id", "names the unsafe answer"),
    (HELP, PKU | {"better_response_id": None}, "better_response_id", "is None"),
    (HELP, PKU | {"is_response_1_safe": "no"}, "is_response_1_safe", "holds text"),
    (HELP, PKU | {"response_0": None}, "response_0", "holds nothing"),
    ("beavertails", BEAVER | {"is_safe": None}, "is_safe", "holds nothing"),
    ("beavertails", BEAVER | {"response": 3}, "response", "holds a number"),
    ("ultrafeedback", ultra("a"), "completions[0]", "holds text"),
    ("ultrafeedback", ultra() | {"completions": {}}, "completions", "holds an object"),
    ("ultrafeedback", ultra(completion("a", float("nan"))), "fine-grained_score", "holds no number (NaN)"),
    ("ultrafeedback", ultra(completion("a", ratings="N/A N/A N/A 7")), "completions[0]", "has no grade"),
    ("ultrafeedback", ultra({"response": None}), "completions[0].response", "holds nothing"),
    ("ultrafeedback_binarized", binarized(A, B, None), "score_chosen", "holds nothing"),
    ("ultrafeedback_binarized", binarized(A, B, 3, 4), "score_chosen", "is below 'score_rejected'"),
    ("ultrafeedback_binarized", binarized(A, B[1:]), "rejected", "does not end with an answer to a question"),
    ("ultrafeedback_binarized", binarized(A, [user("p"), answer("b")]), "rejected", "differs from 'chosen'"),
    ("ultrafeedback_binarized", binarized([{"role": 1}], B), "chosen.role", "holds a number"),
    ("helpsteer2_preference", HELP2 | {"preference_strength": -100}, "preference_strength", "is -100"),
    ("helpsteer2_preference", HELP2 | {"preference_strength": 1.5}, "preference_strength", "is 1.5"),
    ("helpsteer2_preference", HELP2 | {"preference_strength": "2"}, "preference_strength", "holds text"),
    ("helpsteer2", {"prompt": "q", "graded_responses": [graded("a", [3, 3, 4])]}, "helpfulness", "holds a list"),
    ("helpsteer3", HELP3 | {"overall_preference": 4}, "overall_preference", "is 4"),
    ("helpsteer3", HELP3 | {"overall_preference": True}, "overall_preference", "holds a boolean"),
    ("helpsteer3", HELP3 | {"context": []}, "context", "holds an empty list"),
    ("helpsteer3", HELP3 | {"context": [{"role": "user"}]}, "context.content", "holds nothing"),
    ("rated_pairs", RATED | {"choice": "c"}, "choice", "is 'c'"),
    ("rated_pairs", RATED | {"choice": " A"}, "choice", "is ' A'"),
    ("rated_pairs", RATED | {"choice": 1}, "choice", "is 1"),
    ("rated_pairs", RATED | {"choice": None}, "choice", "is null, but 'rating' is 'better'"),
    ("rated_pairs", RATED | {"b_is_safe": "no"}, "b_is_safe", "holds text"),
    ("rated_pairs", RATED | {"answer_b": None}, "answer_b", "holds nothing"),
    ("rated_pairs", {name: RATED[name] for name in RATED if name != "choice"}, "choice", "is null, but 'rating'"),
    ("ultrafeedback", {"instruction": "q"}, "completions", "is missing"),
    ("helpsteer3", {"response1": "a", "response2": "b", "overall_preference": 1}, "context", "holds nothing"),
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
    assert all(SOURCES[name].fits(row) for name, row, _ in GOOD)
    assert {name for name, _, _ in GOOD} == SOURCES.keys()


def test_every_source_is_in_the_table_of_formats_with_its_fields_and_kind() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "data_formats.md").read_text(encoding="utf-8")
    table = page.partition("## Known sets")[2].partition("|---|")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \|(.*\| \w+.*)\|$", table, flags=re.MULTILINE))
    assert rows.keys() == SOURCES.keys()
    for name, row in rows.items():
        assert row.rpartition("|")[2].split()[0].rstrip(",") == f"{SOURCES[name].kind}s", name
        if "the same" not in row and "see above" not in row:
            assert all(f"`{field}`" in row or field == "graded_responses" for field in SOURCES[name].fields), name


def test_strengths_become_the_ratings_of_the_table() -> None:
    words = ["negligibly_better", "slightly_better", "better", "significantly_better"]
    assert [rating_of_difference(value, STRENGTH) for value in (1, 2, 3, 4)] == [*words[1:], words[3]]
    assert [rating_of_difference(value, FINE_GRAINED) for value in (0.25, 0.5, 1.75, 2)] == words
    assert [rating_of_difference(value, OVERALL) for value in (0.5, 1, 3.5, 4)] == words


# -- files


def read(path: str, kind: str, chat_format: ChatFormat, **more: Any) -> Any:
    record: Any = next(record for record, name in KIND_OF.items() if name == kind)
    return read_records(DataSource(path=path, **more), record, forbidden=chat_format.forbidden)


@pytest.mark.parametrize(("name", "row", "records"), [case for case in GOOD if case[2]])
def test_a_file_of_such_rows_is_known_by_its_fields(
    name: str, row: dict[str, Any], records: list[dict[str, Any]], tmp_path: Path, tiny_format: ChatFormat
) -> None:
    kind = SOURCES[name].kind
    rows = [row] * 2
    if name == "helpsteer2":  # a row an answer there
        rows = [{**answer, "prompt": row["prompt"]} for answer in row["graded_responses"]]
    path = write(tmp_path / "a.jsonl", rows)
    format = name if name.startswith(("pku", "oasst_preference")) else "auto"
    times = 1 if name == "helpsteer2" else 2
    assert len(read(path, kind, tiny_format, format=format)) == times * len(records)
    assert len(read(path, "prompt", tiny_format)) >= 1
    report = convert_path(path, tmp_path / "out.jsonl", format=format, forbidden=tiny_format.forbidden)
    assert (report.kind, report.written, report.problems) == (kind, len(records), [])
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == records


def test_unrated_pairs_are_counted(tmp_path: Path, tiny_format: ChatFormat) -> None:
    other = RATED | {"choice": "a", "rating": None, "a_is_safe": None}
    dropped = {name: value for name, value in RATED.items() if name not in ("choice", "rating")}  # as a file of columns
    path = write(tmp_path / "rated.jsonl", [RATED, RATED | {"choice": None, "rating": None}, dropped, other])
    expected = [pair("b", "a", "better", *SPOKEN) | {"rejected_is_safe": False}, pair("a", "b", None, *SPOKEN)]
    for form in ("auto", "rated_pairs"):
        sources, nothing = [DataSource(path=path, format=form)], Split(test=0, validation=0, judge=0)
        mixture = load_mixture(sources, nothing, Preference, forbidden=tiny_format.forbidden, seed=0)
        assert mixture.dropped == {f"{path}: row without a preference": 2}
        assert [(one.chosen.content, one.rating, one.rejected_is_safe) for one in mixture.train] == [
            ("b", "better", False),
            ("a", None, None),
        ]
    checked = check_path(path, None, "auto", tiny_format.forbidden)
    assert (checked.kind, checked.num_records, checked.problems, checked.warnings) == ("preference", 2, [], [])
    report = convert_path(path, tmp_path / "out.jsonl", forbidden=tiny_format.forbidden)
    assert (report.written, report.without) == (2, 1)
    assert [(one.line, "'choice'" in one.reason) for one in report.problems] == [(3, False)], "by itself it is a prompt"
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == expected


@pytest.mark.parametrize("label", ["label", "kto_tag"])
@pytest.mark.parametrize("name", ["alpaca", "sharegpt"])
def test_an_answer_with_a_bad_label_is_not_learnt(
    name: str, label: str, tmp_path: Path, tiny_format: ChatFormat
) -> None:
    good = next(row for other, row, _ in GOOD if other == name)
    path = write(tmp_path / "kto.jsonl", [{**good, label: True}, {**good, label: False}])
    (fault,) = check_path(path, None, "auto", tiny_format.forbidden).problems
    assert (fault.line, fault.field) == (2, "label")
    with pytest.raises(DataError, match=r"kto.jsonl:2: label: says that the answer is a bad one"):
        read(path, "dialog", tiny_format)
    assert len(read(path, "dialog", tiny_format, on_bad_record="drop")) == 1
    assert len(read(path, "prompt", tiny_format)) == 2, "the question is no answer"


def test_what_a_set_gives_keeps_the_rules_of_records(tmp_path: Path, tiny_format: ChatFormat) -> None:
    path = write(tmp_path / "rated.jsonl", [RATED | {"rating": "best"}, RATED, RATED | {"answer_a": "b"}])
    with pytest.raises(DataError, match=r":1: rating: (.|\n)*:3: rejected: "):
        read(path, "preference", tiny_format)


def test_an_ambiguous_row_is_refused(tmp_path: Path, tiny_format: ChatFormat) -> None:
    path = write(tmp_path / "a.jsonl", [PKU])
    both = "'pku_saferlhf_helpfulness' and 'pku_saferlhf_safety'"
    with pytest.raises(DataError, match=f"a.jsonl: its rows hold preferences of several.*{both}.*Name one of these"):
        read(path, "preference", tiny_format)
    with pytest.raises(DataError, match=both):
        check_path(path, None, "auto", tiny_format.forbidden)
    with pytest.raises(DataError, match=f"a.jsonl:1: row: .*{both}(.|\n)*Name one of these"):
        convert_path(path, tmp_path / "out.jsonl", forbidden=tiny_format.forbidden)
    assert read(path, "prompt", tiny_format)[0].messages[0].content == "q"


def test_a_row_of_another_kind_is_named_with_its_kind(tmp_path: Path, tiny_format: ChatFormat) -> None:
    sound = {"messages": A}
    path = write(tmp_path / "a.jsonl", [sound, sound, HELP3, PKU, binarized(A, B) | {"messages": B}])
    report = convert_path(path, tmp_path / "out.jsonl", kind="dialog", forbidden=tiny_format.forbidden)
    assert [(fault.line, fault.reason.split(" by ")[0]) for fault in report.problems] == [
        (3, "is a preference"),
        (4, "is a preference"),
    ]
    assert (report.written, report.repeated) == (2, 1), "a dialog stands in the last row too"


# -- a message a row

MESSAGES: list[tuple[str, str | None, str, dict[str, Any]]] = [
    ("1", None, "q", {}),
    ("2", "1", "second", {"rank": 1}),
    ("3", "1", "best", {"rank": 0}),
    ("4", "3", "more?", {}),
    ("5", "4", "only answer", {"rank": None}),
    ("6", "1", "spam", {"rank": 2, "review_result": False}),
    ("7", "1", "gone", {"rank": 3, "deleted": True}),
]


def table(tree: str = "t", **changes: dict[str, Any]) -> list[dict[str, Any]]:
    """A tree as the hub's table has it; a root has no parent, as parquet is read, or null."""
    rows = []
    for name, parent, text, more in MESSAGES:
        role = "prompter" if name in "14" else "assistant"
        row = {
            "message_id": f"{tree}{name}",
            "parent_id": parent and f"{tree}{parent}",
            "user_id": "u",
            "text": text,
            "role": role,
            "lang": "en",
            "review_count": 3,
            "review_result": True,
            "deleted": False,
            "message_tree_id": tree,
            "tree_state": "ready_for_export",
        }
        rows.append(row | more | changes.get(f"m{name}", {}))
    return rows


PATH = {"messages": turns("q", "best", "more?", "only answer")}


def test_a_table_of_messages_is_read_as_its_trees(tmp_path: Path, tiny_format: ChatFormat) -> None:
    first = [{key: value for key, value in row.items() if value is not None} for row in table("s")]
    rows = [*first, *table("t", m3={"text": "finest"}), {"messages": PATH["messages"]}]
    path = write(tmp_path / "a.jsonl", rows[:-1])
    dialogs = read(path, "dialog", tiny_format)
    assert [dialog.messages[1].content for dialog in dialogs] == ["best", "finest"]
    pairs = read(path, "preference", tiny_format, format="oasst-preference")
    assert [(pair.chosen.content, pair.rejected.content, pair.rating) for pair in pairs] == [
        ("best", "second", "slightly_better"),
        ("finest", "second", "slightly_better"),
    ]
    report = convert_path(path, tmp_path / "out.jsonl", forbidden=tiny_format.forbidden)
    assert (report.written, report.problems) == (2, [])
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0]) == PATH
    # Our own rows among them stay what they are.
    report = convert_path(write(tmp_path / "b.jsonl", rows), tmp_path / "c.jsonl", forbidden=tiny_format.forbidden)
    assert (report.written, report.repeated, report.untouched) == (2, 1, 0)


CHAIN = [
    table()[0] | {"message_id": f"n{index}", "parent_id": f"n{index - 1}" if index else "t1"} for index in range(3000)
]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([table()[0], *CHAIN], "one of more than 100 turns"),
        (table(m1={"parent_id": "t9"}), "1: parent_id: 't9' is not a message in the tree's adjacent rows.*Sort"),
        (table()[1:], "1: parent_id: 't1' is not a message"),
        (table(m2={"parent_id": None}), "parent_id: is null in 2 messages of one tree"),
        (table(m4={"parent_id": "t5"}), "parent_id: does not make a tree of these messages"),
        (table(m2={"message_id": "t3"}), "message_id: 't3' occurs twice"),
        (table(m2={"message_id": 7}), "message_id: holds a number"),
        (table(m2={"parent_id": ["t1"]}), "parent_id: holds a list"),
        (table(m3={"role": "user"}), "role: is 'user'"),
    ],
)
def test_a_broken_tree_of_a_table_is_refused(
    rows: list[Any], message: str, tmp_path: Path, tiny_format: ChatFormat
) -> None:
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=message):
        read(path, "dialog", tiny_format, format="oasst")
    with pytest.raises(DataError, match="holds no dialog that can be written"):
        convert_path(path, tmp_path / "out.jsonl", format="oasst", forbidden=tiny_format.forbidden)


def test_a_shuffled_table_is_never_read_as_other_dialogs(tmp_path: Path, tiny_format: ChatFormat) -> None:
    rows = [row for name in "abcde" for row in table(name)]
    random.Random(0).shuffle(rows)
    with pytest.raises(DataError, match="Sort the file by 'message_tree_id'"):
        read(write(tmp_path / "a.jsonl", rows), "dialog", tiny_format)


def test_a_bad_line_among_the_messages_is_named_beside_the_tree(tmp_path: Path, tiny_format: ChatFormat) -> None:
    lines = [json.dumps(row) for row in table()]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines[:5], "{", *lines[5:]]) + "\n")
    report = check_path(str(path), None, "auto", tiny_format.forbidden)
    assert [fault.line for fault in report.problems] == [6] and report.num_records == 1


def test_a_removed_root_takes_its_tree_along(tmp_path: Path, tiny_format: ChatFormat) -> None:
    path = write(tmp_path / "a.jsonl", [*table("s"), *table("t", m1={"deleted": True})])
    sides = Split(test=0, validation=0, judge=0)
    mixture = load_mixture([DataSource(path=path)], sides, Dialog, forbidden=(), seed=0)
    assert (len(mixture.train), mixture.dropped) == (1, {f"{path}: row without a dialog": 1})


@pytest.mark.parametrize("score", [float("1e999"), 10**400, float("nan")], ids=["infinite", "huge", "nan"])
def test_scores_without_a_difference_are_refused(score: float, tmp_path: Path, tiny_format: ChatFormat) -> None:
    answers = [{"response": text, "fine-grained_score": score} for text in ("a", "b")]
    path = tmp_path / "a.jsonl"
    written = json.dumps({"instruction": "q", "completions": [*answers, completion("c", 1.5)]})
    path.write_text(written.replace("Infinity", "1e999") + "\n")
    report = check_path(str(path), None, "ultrafeedback", tiny_format.forbidden)
    assert report.num_records == 0 and report.num_bad_lines == 1
