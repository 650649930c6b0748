"""`data convert`: what is repaired, dropped and counted, and that its output passes `data check`."""

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamachat.chat_format import ChatFormat
from llamachat.data.check import check_path
from llamachat.data.convert.command import ConvertReport, convert_path
from llamachat.data.convert.turns import Repair, html_in, without_html
from llamachat.errors import DataError, UsageError
from pipelines.cli.main import main
from tests.llamachat.data.lines import GOOD, answer, dialog, pair, prompt, shared, system, turns, user
from tests.llamachat.data.test_check import BROKEN_DIALOGS, BROKEN_PREFERENCES, BROKEN_PROMPTS

ROOT = Path(__file__).resolve().parents[3]
Case = tuple[object, object, dict[Repair, int]]


class Bench:
    """Converts and checks in a folder of its own."""

    def __init__(self, folder: Path, chat_format: ChatFormat) -> None:
        self.folder, self.forbidden = folder, chat_format.forbidden

    def convert(self, content: bytes | str, name: str = "in.jsonl", out: str = "out.jsonl", **options: Any) -> tuple:
        source, target = self.folder / name, self.folder / out
        source.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
        target.unlink(missing_ok=True)
        report = convert_path(str(source), target, forbidden=self.forbidden, **options)
        return report, self.checked(target, report)

    def checked(self, target: Path, report: ConvertReport) -> list[Any]:
        """The records written, which the checking command passes, all of one kind."""
        check = check_path(str(target), None, "auto", self.forbidden)
        assert check.problems == [] and check.exit_status == 0
        assert (check.kind, check.num_records, check.num_duplicates) == (report.kind, report.written, 0)
        # HTML stays where nobody asked for plain text.
        warned = [warning for warning in check.warnings if warning.field not in ("content", "data.split")]
        assert warned == [], "nothing is left that nothing reads"
        raw = gzip.decompress(target.read_bytes()) if target.suffix == ".gz" else target.read_bytes()
        return [json.loads(line) for line in raw.split(b"\n")[:-1]]


@pytest.fixture
def bench(tmp_path: Path, tiny_format: ChatFormat) -> Bench:
    return Bench(tmp_path, tiny_format)


AB = {"messages": turns("a", "b")}
DIALOGS: dict[str, tuple[str, object, dict[Repair, int]]] = {
    "sharegpt": (shared(("human", "a"), ("gpt", "b")), AB, {Repair.KEY: 5, Repair.ROLE: 2}),
    "capitals": (dialog({"role": " User", "content": "a"}, answer("b")), AB, {Repair.ROLE_SPELLING: 1}),
    "a word of the error texts": (
        dialog({"role": "prompter", "content": "a"}, {"role": "model", "content": "b"}),
        AB,
        {Repair.ROLE: 2},
    ),
    "misspelt keys": ('{"mesages": [{"role": "user", "conten": "a"}, {"role": "bot", "content": "b"}]}', AB,
                      {Repair.KEY: 2, Repair.ROLE: 1}),
    "misspelt mask": (dialog(*turns("a", "b", "c"), answer("d", trian=False)),
                      {"messages": [*turns("a", "b", "c"), answer("d", train=False)]}, {Repair.KEY: 1}),
    "OpenAI's mask": (dialog(*turns("a", "b", "c"), answer("d", weight=0)),
                      {"messages": [*turns("a", "b", "c"), answer("d", train=False)]}, {Repair.KEY: 1}),
    "leading answers": (dialog(answer("x"), answer("y"), user("a"), answer("b")), AB, {Repair.LEADING_ANSWER: 2}),
    "open question": (dialog(*turns("a", "b", "c")), AB, {Repair.OPEN_QUESTION: 1}),
    "two open questions": (dialog(*turns("a", "b", "c"), user("d")), AB, {Repair.MERGED: 1, Repair.OPEN_QUESTION: 1}),
    "same speaker": (dialog(user("a \n"), user("\n  c"), answer("b")), {"messages": turns("a\n\n  c", "b")},
                     {Repair.MERGED: 1}),
    "merged masks": (dialog(*turns("q", "r", "a"), answer("b"), answer("c", train=False)),
                     {"messages": [*turns("q", "r", "a"), answer("b\n\nc", train=False)]}, {Repair.MERGED: 1}),
    "empty turn": (dialog(user("a"), answer(" "), user("c"), answer("b")), {"messages": turns("a\n\nc", "b")},
                   {Repair.EMPTY: 1, Repair.MERGED: 1}),
    "null content": (dialog(user("a"), answer(None), answer("b")), AB, {Repair.EMPTY: 1}),
    "parts": (dialog(user([{"type": "text", "text": "a"}, "c"]), answer({"parts": ["b"]})),
              {"messages": turns("a\nc", "b")}, {Repair.PARTS: 2}),
    "late system": (dialog(user("a"), system("s"), answer("b")), {"messages": [system("s"), *turns("a", "b")]},
                    {Repair.SYSTEM_MOVED: 1}),
    "systems": (dialog(system("s"), user("a"), system("t"), system("s"), answer("b")),
                {"messages": [system("s\n\nt"), *turns("a", "b")]}, {Repair.SYSTEMS_JOINED: 1}),
    "late empty system": (dialog(user("a"), system(""), answer("b")), AB, {Repair.EMPTY: 1}),
    "system beside": (dialog(*turns("a", "b"), system="s"), {"messages": [system("s"), *turns("a", "b")]},
                      {Repair.KEY: 1}),
    "tool": (
        dialog(user("a"), answer(None, tool_calls=[1]), {"role": "tool", "content": "x"}, answer("b")),
        AB,
        {Repair.EMPTY: 1, Repair.TOOL: 1, Repair.LEFT_OUT: 1},
    ),
    "answers around a tool": (shared(("human", "a"), ("gpt", "b"), ("observation", "x"), ("gpt", "c")),
                              {"messages": turns("a", "b\n\nc")},
                              {Repair.KEY: 9, Repair.ROLE: 3, Repair.TOOL: 1, Repair.MERGED: 1}),
    "train on a question": (dialog(user("a", train=True), answer("b")), AB, {Repair.TRAIN_ON_QUESTION: 1}),
    "nulls": (dialog(user("a", train=None), answer("b"), is_safe=None), AB, {Repair.NULL: 2}),
    "quoted label": (dialog(*turns("a", "b"), is_safe="False"), {**AB, "is_safe": False}, {Repair.LABEL: 1}),
    "foreign keys": (dialog(*turns("a", "b"), source="x", id=3), AB, {Repair.LEFT_OUT: 2}),
    "bare turns": (json.dumps(AB["messages"]), AB, {Repair.BARE_TURNS: 1}),
    "texts": ('{"question": "a", "answer": "b"}', AB, {Repair.KEY: 1, Repair.TEXT: 2, Repair.HALVES: 1}),
    "TRL's halves": (json.dumps({"prompt": [user("a")], "completion": [answer("b")]}), AB, {Repair.HALVES: 1}),
    "alpaca": ('{"instruction": "a", "input": "", "output": "b"}', AB, {Repair.KNOWN_SET: 1}),
    "JSON text": (json.dumps({"messages": json.dumps(AB["messages"])}), AB, {Repair.JSON_TEXT: 1}),
    "ShareGPT as JSON text": (
        json.dumps({"conversations": json.dumps([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}])}),
        AB,
        {Repair.JSON_TEXT: 1, Repair.KEY: 5, Repair.ROLE: 2},
    ),
    "columns": (json.dumps({"messages": {"role": ["user", "assistant"], "content": ["a", "b"]}}), AB,
                {Repair.COLUMNS: 1}),
    "columns with a mask": (
        json.dumps({"messages": {"content": [*"abcd"], "role": ["user", "assistant"] * 2, "train": [None, False, None, True]}}),
        {"messages": [user("a"), answer("b", train=False), user("c"), answer("d", train=True)]},
        {Repair.COLUMNS: 1},
    ),
    "ShareGPT in columns": (json.dumps({"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}}), AB,
                            {Repair.COLUMNS: 1, Repair.KEY: 5, Repair.ROLE: 2}),
    "Llama 2's format": (json.dumps({"text": "<s>[INST] a [/INST] b </s>"}), AB, {Repair.MARKED_TEXT: 1}),
    "Llama 2's format, two turns": (
        json.dumps({"text": "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b </s><s>[INST] c\nc [/INST] d\n\nd </s>\n"}),
        {"messages": [system("s"), *turns("a", "b", "c\nc", "d\n\nd")]},
        {Repair.MARKED_TEXT: 1},
    ),
    "Llama 2's format, bare": (json.dumps({"text": "[INST]a[/INST]b[INST]c[/INST]d"}), {"messages": turns(*"abcd")},
                               {Repair.MARKED_TEXT: 1}),
    "headings": (json.dumps({"text": "### Human: a### Assistant: b\n### Human: c\n### Assistant: # d\n#### e"}),
                 {"messages": turns("a", "b", "c", "# d\n#### e")}, {Repair.MARKED_TEXT: 1}),
    "Alpaca's headings": (
        json.dumps({"text": "Below.\n\n### Instruction:\na\n\n### Input:\nc\n\n### Response:\nb"}),
        {"messages": [system("Below."), *turns("a\n\nc", "b")]},
        {Repair.MARKED_TEXT: 1, Repair.MERGED: 1},
    ),
    "headings and the ends of a text": (json.dumps({"text": "<s>### Human: a### Assistant: b</s>\n"}), AB,
                                        {Repair.MARKED_TEXT: 1}),
    "a label that is none": ('{"prompt": "a", "output": "b", "label": 0}', AB,
                             {Repair.TEXT: 2, Repair.HALVES: 1, Repair.LEFT_OUT: 1}),
    "a good answer": ('{"prompt": "a", "completion": "b", "label": true}', AB,
                      {Repair.TEXT: 2, Repair.HALVES: 1, Repair.LEFT_OUT: 1}),
}  # fmt: skip
ABC = {"prompt": [user("a")], "chosen": [answer("b")], "rejected": [answer("c")]}
WHOLE = {"chosen": turns("a", "b"), "rejected": turns("a", "c")}
PREFERENCES: dict[str, tuple[str, object, dict[Repair, int]]] = {
    "texts": ('{"prompt": "a", "chosen": "b", "rejected": "c"}', ABC, {Repair.TEXT: 3}),
    "whole dialogs": (pair(prompt="a", prompt_id="x", **WHOLE), ABC,
                      {Repair.TEXT: 1, Repair.WHOLE_DIALOGS: 1, Repair.LEFT_OUT: 1}),
    "whole dialogs without a prompt": (json.dumps(WHOLE), ABC, {Repair.WHOLE_DIALOGS: 1}),
    "system of one": (pair(prompt=[system("s"), user("a")], **WHOLE), {**ABC, "prompt": [system("s"), user("a")]},
                      {Repair.WHOLE_DIALOGS: 1}),
    "one side whole": (pair(prompt=[user("a")], chosen=turns("a", "b"), rejected=[answer("c")]), ABC,
                       {Repair.WHOLE_DIALOGS: 1}),
    "turns after the prompt": (
        pair(prompt=[user("q")], chosen=[answer("r"), *turns("a", "b")], rejected=[answer("r"), *turns("a", "c")]),
        {**ABC, "prompt": turns("q", "r", "a")},
        {Repair.WHOLE_DIALOGS: 1},
    ),
    "LLaMA-Factory": (
        shared(("human", "a"), chosen={"from": "gpt", "value": "b"}, rejected={"from": "gpt", "value": "c"}),
        ABC,
        {Repair.KEY: 7, Repair.ROLE: 3, Repair.TEXT: 2},
    ),
    "hh-rlhf": (json.dumps({side: f"\n\nHuman: a\n\nAssistant: {text}" for side, text in
                            (("chosen", "b"), ("rejected", "c"))}), ABC, {Repair.KNOWN_SET: 1}),
    "hh-rlhf in three": (
        json.dumps({"prompt": "\n\nHuman: a\n\nAssistant:", "chosen": " b", "rejected": " c"}),
        ABC,
        {Repair.KNOWN_SET: 1},
    ),
    "prompt with its answer": (pair(prompt=turns("a", "b"), chosen=[answer("b ")], rejected=[answer("c")]),
                               {**ABC, "chosen": [answer("b ")]}, {Repair.CLOSING_ANSWER: 1}),
    "labels": (
        json.dumps({**ABC, "rating": "Slightly better", "chosen_is_safe": "true", "ratting": 1}),
        {**ABC, "rating": "slightly_better", "chosen_is_safe": True},
        {Repair.LABEL: 2, Repair.LEFT_OUT: 1},
    ),
    "capitals": (json.dumps({f" {name.upper()}": value for name, value in ABC.items()}), ABC, {Repair.KEY: 3}),
    "paper's rating": (json.dumps({**ABC, "rating": "Unsure"}), {**ABC, "rating": "negligibly_better"},
                       {Repair.LABEL: 1}),
}  # fmt: skip
PROMPT = {"prompt": [user("a")]}
PROMPTS: dict[str, tuple[str, object, dict[Repair, int]]] = {
    "text": ('{"prompt": "a", "id": 7}', {**PROMPT, "id": "7"}, {Repair.TEXT: 1, Repair.LABEL: 1}),
    "answered": (prompt(turns("a", "b"), is_safety=True), {**PROMPT, "is_safety": True}, {Repair.CLOSING_ANSWER: 1}),
    "of a dialog": (dialog(*turns("a", "b"), is_safety="true"), {**PROMPT, "is_safety": True},
                    {Repair.CLOSING_ANSWER: 1, Repair.AS_PROMPT: 1, Repair.LABEL: 1}),
    "of a preference": (json.dumps(ABC), PROMPT, {Repair.AS_PROMPT: 1}),
    "of alpaca": ('{"instruction": "a", "output": "b"}', PROMPT,
                  {Repair.KNOWN_SET: 1, Repair.CLOSING_ANSWER: 1, Repair.AS_PROMPT: 1}),
}  # fmt: skip
CASES = [
    *(pytest.param(None, *case, id=name) for name, case in DIALOGS.items()),
    *(pytest.param(None, *case, id=name) for name, case in PREFERENCES.items()),
    *(pytest.param("prompt", *case, id=name) for name, case in PROMPTS.items()),
]


@pytest.mark.parametrize(("kind", "line", "expected", "times"), CASES)
def test_repairs_and_how_they_are_counted(
    kind: Any, line: str, expected: object, times: dict[Repair, int], bench: Bench
):
    report, written = bench.convert(f"{line}\n", kind=kind)
    assert written == [expected]
    assert report.times == times
    assert (report.written, report.untouched, report.problems) == (1, int(not times), [])
    for repair, number in times.items():
        row = next(line for line in report.text().splitlines() if line.startswith(f"  {repair.value}  "))
        assert row.split()[-1] == str(number)


# The broken lines of `data check` that are repaired; all others are dropped.
REPAIRED = {
    "dialog": {"blank", "two on a line", "trailing comma", "parts as content", "two questions", "two answers",
               "leading answer", "open question", "late system", "train on a question"},
    "preference": {"text as prompt", "text as answer", "whole dialog", "foreign role", "wrong rating",
                   "paper's rating", "misspelt rating"},
    "prompt": {"ends with answer", "number as id", "mark of no boolean"},
}  # fmt: skip
BROKEN = {
    **{("dialog", name): case for name, case in BROKEN_DIALOGS.items()},
    **{("preference", name): case for name, case in BROKEN_PREFERENCES.items()},
    **{("prompt", name): case for name, case in BROKEN_PROMPTS.items()},
}
SOUND = {"dialog": GOOD, "preference": pair(rating="better"), "prompt": prompt([user("Hi")])}


@pytest.mark.parametrize(("kind", "name"), BROKEN, ids=[f"{kind}: {name}" for kind, name in BROKEN])
def test_a_broken_line_is_repaired_or_named(kind: str, name: str, bench: Bench):
    sound = SOUND[kind]
    report, written = bench.convert(f"{sound}\n{BROKEN[kind, name][0]}\n")
    assert written[0] == json.loads(sound)
    is_repaired = name in REPAIRED[kind]
    assert [fault.line for fault in report.problems] == ([] if is_repaired else [2])
    assert report.kind == kind
    if not is_repaired:
        assert f"in.jsonl:2: {report.problems[0].field}: " in report.dropped()


def test_strict_writes_nothing_where_a_record_cannot_be_repaired(bench: Bench):
    lines = [GOOD, *(case[0] for case in BROKEN.values())]
    report, _ = bench.convert("\n".join(lines))
    with pytest.raises(DataError, match=f"{len(report.problems)} records cannot be repaired"):
        bench.convert("\n".join(lines), strict=True)


# -- sound records stay


def bundled() -> Iterator[Path]:
    for folder in ("sft", "helpfulness", "prompts"):
        yield from sorted((ROOT / "data" / folder).glob("*.jsonl*"))[:1]


@pytest.mark.parametrize("path", bundled(), ids=lambda path: path.parent.name)
def test_sound_files_stay_as_they_are(path: Path, bench: Bench):
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = list(dict.fromkeys(raw.split(b"\n")[:-1]))[:200]
    report, written = bench.convert(b"".join(line + b"\n" for line in lines))
    assert written == [json.loads(line) for line in lines]
    assert (report.untouched, report.times, report.problems) == (len(lines), {}, [])


def test_what_is_odd_but_sound_stays(bench: Bench):
    lines = [
        dialog(
            system(""), user(" a\n", train=False), answer("b </s>", train=False), user("c"), answer("d", train=True)
        ),
        dialog(user("\u2028 \x85 \ufeff \U0001f600"), answer("\x00 "), is_safe=False),
    ]
    report, written = bench.convert("\n".join(lines))
    assert written == [json.loads(line) for line in lines] and report.untouched == 2


# -- refusals


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "a", "completion": "b", "label": false}', "label: says that the answer is a bad one"),
        (dialog(*turns("a", "b"), label=False), "label: says that the answer is a bad one"),
        (dialog(*turns("a", "b"), kto_tag="False"), "label: says that the answer is a bad one"),
        ('{"prompt": "a", "completion": "b", "label": 0}', "label: says that the answer is a bad one"),
        ('{"prompt": "a", "response": "b", "label": 0}', "label: says that the answer is a bad one"),
        ('{"prompt": "a", "completion": "b", "label": -1}', "label: says that the answer is a bad one"),
        ('{"prompt": "a", "completion": "b", "label": "0"}', "label: says that the answer is a bad one"),
        ('{"question": "a", "answer": "b", "label": "Rejected"}', "label: says that the answer is a bad one"),
        (dialog(*turns("a", "b"), kto_tag=0), "label: says that the answer is a bad one"),
        (dialog(*turns("a", "b"), label="undesirable"), "label: says that the answer is a bad one"),
        (dialog(*turns("a", "b"), desirable=False), "label: says that the answer is a bad one"),
        (dialog({"full_text": "a"}), r"messages\[0\].role: is missing; the message holds 'full_text'"),
        ('{"text": "a [INST] b"}', "messages: is missing"),
        ('{"text": "[INST] a [/INST] b [/INST]"}', "holds '.*INST.'"),
        (json.dumps({"messages": "[1, 2]"}), "messages: is a string"),
        (json.dumps({"messages": {"role": ["user"], "content": ["a", "b"]}}), "messages: is an object"),
        (dialog(user("a")), "messages: holds no answer to a question"),
        (dialog(answer("a")), "messages: holds no answer to a question"),
        (dialog(system("s")), "messages: holds no answer to a question"),
        (dialog(user([{"type": "image"}]), answer("b")), r"messages\[0\].content: is a list"),
        (dialog(*turns("a", "b [INST]")), r"messages\[1\].content: holds '\[INST\]'"),
        (dialog(*turns("a", "\ud83d")), r"messages\[1\].content: holds '\\ud83d'"),
        (dialog(*turns("a", "b"), is_safe=1), "is_safe: is 1"),
        ('{"text": "a"}', "messages: is missing"),
        ('{"a": NaN}', "holds NaN"),
        (prompt([answer("a")]), "prompt: holds no question"),
        (json.dumps({**ABC, "rejected": "b "}), "rejected: is the same answer"),
        (json.dumps({**ABC, "chosen": None}), "chosen: is missing"),
        (json.dumps({**ABC, "chosen": []}), "chosen: does not end with an answer"),
        ('{"chosen": "b", "rejected": "c"}', "prompt: is missing, but a pair"),
        (json.dumps({**ABC, "chosen": turns("x", "b"), "rejected": turns("x", "c")}), "do not start with 'prompt'"),
        (json.dumps({**ABC, "chosen": turns("a", "b"), "rejected": turns("x", "c")}), "differs from 'chosen'"),
        (json.dumps({**ABC, "prompt": turns("a", "x")}), "ends with an answer that is neither"),
    ],
)
def test_what_cannot_be_repaired_is_named_and_nothing_is_written(line: str, reason: str, bench: Bench):
    with pytest.raises(DataError, match=rf"in\.jsonl:1: .*{reason}(.|\n)*so nothing was\."):
        bench.convert(line)
    assert [path.name for path in bench.folder.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"question": "a", "response_j": "b", "response_k": "c"}, "'response_j' and 'response_k'"),
        (
            {"instruction": "a", "chosen_response": "b", "rejected_response": "c"},
            "'chosen_response' and 'rejected_resp",
        ),
        ({"prompt": "a", "better": "it is so", "worse": "it is not so"}, "'better' and 'worse'"),
        ({"prompt": [user("a")], "answers": [{"text": "b"}]}, "'answers'"),
        ({"prompt": "a", "response": "b", "rejected_response": "c"}, "'rejected_response'"),
    ],
)
def test_answers_under_unknown_names_are_not_lost(row: dict[str, Any], names: str, bench: Bench):
    rows = [
        {name: f"{value}{index}" if isinstance(value, str) else value for name, value in row.items()}
        for index in range(9 if "answers" not in row else 1)
    ]
    content = "\n".join(map(json.dumps, rows))
    with pytest.raises(DataError, match=f"most rows hold texts under {names}.*--columns chosen=.*--kind"):
        bench.convert(content)
    kind = "dialog" if "response" in row else "prompt"
    report, written = bench.convert(content, kind=kind)
    assert len(written) == len(rows) and report.left_out, "asked for by name, the others are left out and counted"


def test_answers_are_named_by_columns(bench: Bench):
    rows = [{"question": f"a{index}", "response_j": f"b{index}", "response_k": f"c{index}"} for index in range(9)]
    content = "\n".join(map(json.dumps, rows))
    # Asked for preferences, rows whose answers nothing reads are no prompts of another file.
    with pytest.raises(DataError, match=r"'response_j' and 'response_k'.*chosen=response_j,rejected=response_k"):
        bench.convert(content, kind="preference")
    report, written = bench.convert(content, columns={"chosen": "response_j", "rejected": "response_k"})
    assert (report.kind, len(written), report.left_out) == ("preference", 9, {})
    assert [(one["prompt"], one["chosen"], one["rejected"]) for one in written] == [
        ([user(f"a{index}")], [answer(f"b{index}")], [answer(f"c{index}")]) for index in range(9)
    ]
    with pytest.raises(DataError, match="has no column 'response_m' in any row"):
        bench.convert(content, columns={"chosen": "response_j", "rejected": "response_m"})


def test_near_duplicates_are_dropped_where_asked(bench: Bench):
    words = [f"word{index}" for index in range(20)]
    texts = [" ".join(words), " ".join([*words, "today"]), " ".join(reversed(words)), " ".join(words)]
    content = "\n".join(json.dumps({"messages": [user(text), answer("Yes.")]}) for text in texts)
    report, written = bench.convert(content, drop_near_duplicates=True)
    assert (report.near, report.repeated) == (1, 1)
    assert [one["messages"][0]["content"] for one in written] == [texts[0], texts[2]]
    assert "nearly the same as a record before it" in report.text()


def test_columns_that_are_no_answers_are_left_out_and_counted(bench: Bench):
    rows = [
        {"prompt": f"a{index}", "response_id": f"x{index}", "category": "open questions of many words", "n": index}
        for index in range(9)
    ]
    report, written = bench.convert("\n".join(map(json.dumps, rows)))
    assert len(written) == 9 and report.left_out == {"response_id": 9, "category": 9, "n": 9}


def test_labelled_answers_become_pairs(bench: Bench):
    rows = [
        *({"prompt": "q", "completion": text, "label": label} for text, label in (("a", True), ("b", False))),
        {"messages": turns("m", "n"), "label": "true"},
        {"prompt": [user("q2")], "completion": [answer("c")], "label": True},
        {"prompt": "q", "completion": "d", "label": False},
        {"messages": json.dumps(turns("m", "o")), "label": False},
        {"prompt": "q", "chosen": "e", "rejected": "f"},
    ]
    report, written = bench.convert("\n".join(map(json.dumps, rows)), kind="preference")
    texts = [
        (row["prompt"][-1]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in written
    ]
    assert texts == [("q", "e", "f"), ("q", "a", "b"), ("q", "a", "d"), ("m", "n", "o")]
    assert report.records[Repair.LABELLED] == 3
    assert [(fault.line, fault.field) for fault in report.problems] == [(4, "label")], "the only answer to its prompt"
    report, written = bench.convert("\n".join(map(json.dumps, rows[:-1])))
    assert [row["messages"][-1]["content"] for row in written] == ["a", "n", "c"]
    assert [fault.line for fault in report.problems] == [2, 5, 6]


def test_the_kind_and_the_format_can_be_set(bench: Bench):
    tree = {"role": "prompter", "text": "a", "replies": [
        {"role": "assistant", "text": "b", "rank": 0}, {"role": "assistant", "text": "c", "rank": 1}
    ]}  # fmt: skip
    line = json.dumps({"message_tree_id": "x", "prompt": tree})
    assert bench.convert(line)[1] == [AB]
    assert bench.convert(line, kind="preference")[1] == [{**ABC, "rating": "slightly_better"}]
    assert bench.convert(line, format="oasst-preference")[1] == [{**ABC, "rating": "slightly_better"}]
    with pytest.raises(DataError, match="output: is missing"):
        bench.convert('{"instruction": "a"}', format="alpaca")
    mixed = f"{GOOD}\n{pair()}\n{prompt([user('z')])}\n"
    assert bench.convert(mixed, kind="preference")[1] == [json.loads(pair())]
    assert bench.convert(mixed, kind="prompt")[1] == [{"prompt": [user("Hi")]}, {"prompt": [user("z")]}]


# -- whatever it holds

PLAIN = st.sampled_from(["a", "b", "c", "d ", " e\n"])
ODD = st.sampled_from(["", " ", "\n\nHuman: a\n\nAssistant: b", "x [INST] y", "\ud83d", "caf\u00e9\u2028", "better"])
ATOMS = st.one_of(st.none(), st.booleans(), st.integers(0, 2), PLAIN, ODD)
WILD = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PLAIN, inner, max_size=3))
PARTS = st.sampled_from([None, 3, ["a", {"type": "text", "text": "b"}], [{"type": "image"}], {"text": "a"}])
CONTENTS = st.integers(0, 19).flatmap(lambda n: ODD if n == 9 else PARTS if n == 8 else PLAIN)
ROLES = st.sampled_from(["user", "assistant", "user", "assistant", "system", "human", " GPT", "tool", "User "])
MASKS = {"train": st.sampled_from([True, False, None]), "weight": st.sampled_from([0, 1]), "name": ATOMS}
OWN = st.fixed_dictionaries({"role": ROLES, "content": CONTENTS})
MASKED = st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}, optional={**MASKS, "trian": st.booleans()})
SHARED = st.fixed_dictionaries({"from": ROLES, "value": CONTENTS})
TURNS = st.integers(0, 39).flatmap(lambda n: WILD if n == 20 else MASKED if n > 33 else SHARED if n > 26 else OWN)
LISTS = st.lists(TURNS, min_size=1, max_size=6)
SAID = st.integers(0, 9).flatmap(lambda n: WILD if n == 9 else TURNS if n == 8 else LISTS if n > 4 else PLAIN)
SYSTEM = {"system": PLAIN}
LABELS = {**SYSTEM, "is_safe": ATOMS, "is_safety": ATOMS, "rating": ATOMS, "ratting": ATOMS, "id": ATOMS}
NAMES = (
    *("messages", "mesages", "conversations", "prompt", "prompt_id", "question", "answer", "completion", "input"),
    *("chosen", "rejected", "rejectd", "instruction", "output", "response", "context", "history", "instances"),
    *("message_tree_id", *LABELS),
)
ROWS = st.one_of(
    st.fixed_dictionaries({"messages": LISTS}, optional=LABELS),
    st.fixed_dictionaries({"messages": LISTS}, optional=SYSTEM),
    st.fixed_dictionaries({"conversations": LISTS}, optional=SYSTEM),
    st.fixed_dictionaries({"prompt": SAID, "chosen": SAID, "rejected": SAID}, optional=SYSTEM),
    st.fixed_dictionaries({"prompt": PLAIN, "chosen": PLAIN, "rejected": PLAIN}, optional=LABELS),
    LISTS.map(lambda turns: {"chosen": [*turns, answer("x")], "rejected": [*turns, answer("y")]}),
    st.fixed_dictionaries({"prompt": SAID}, optional=LABELS),
    st.fixed_dictionaries({"question": SAID, "answer": SAID}),
    st.fixed_dictionaries({"instruction": PLAIN, "output": CONTENTS}),
    st.lists(st.fixed_dictionaries({"messages": LISTS}), max_size=3),
    LISTS,
    st.dictionaries(st.sampled_from(NAMES), SAID, max_size=6),
    WILD,
)
ODD_LINES = (
    *("Hello there", "{", '{"messages": [', '{"a": NaN}', '{"a": 1, "a": 2}', "{'a': 1}", "1e9999", "]", '"x"', "3"),
    *("", "  ", "\t", "\r", "[" * 5000, "9" * 5000, GOOD[:-7], f"{GOOD} x", GOOD, "null"),
    *(f"{GOOD},", f"{GOOD}\r", f"\ufeff{GOOD}"),
)
KNOWN_SETS = (
    {"instruction": "a", "context": "c", "response": "b", "category": "open_qa"},
    {"prompt": "a", "response": "b", "category": {"x": True}, "is_safe": False},
    {"context": [user("a")], "response1": "b", "response2": "c", "overall_preference": 2},
    {"context": [user("a")], "response1": "b", "response2": "c", "overall_preference": 9},
    {side: f"\n\nHuman: a\n\nAssistant: {side}" for side in ("chosen", "rejected")},
)
LINES = st.one_of(
    ROWS.map(json.dumps),
    st.lists(ROWS, min_size=2, max_size=3).map(lambda rows: ", ".join(map(json.dumps, rows))),
    st.sampled_from([*ODD_LINES, *map(json.dumps, KNOWN_SETS)]),
)


def records_of(line: str) -> list[object]:
    """The records of a line: several objects on it, or in a list, are one each; a line that cannot be read is one."""
    decoder, position, values, text = json.JSONDecoder(), 0, [], line.strip().lstrip("\ufeff")
    try:
        while position < len(text):
            value, position = decoder.raw_decode(text, position)
            values.append(value)
            position += len(text[position:]) - len(text[position:].lstrip(" ,"))
    except (ValueError, RecursionError):
        return [None]
    if not all(isinstance(value, dict | list) for value in values):
        return [None]
    return [record for value in values for record in _unrolled(value)]


def _unrolled(value: object) -> list[object]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict | list) for item in value):
        return [value]
    is_dialog = all(
        isinstance(item, dict) and {"role", "from"} & item.keys() and "messages" not in item for item in value
    )
    return [value] if is_dialog else value


@settings(
    deadline=None, max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(lines=st.lists(LINES, max_size=12), kind=st.sampled_from([None, "dialog", "preference", "prompt"]))
def test_every_record_is_kept_repaired_or_named_and_counted(lines: list[str], kind: Any, bench: Bench):
    lines = [*SOUND.values(), *lines, dialog(user("the last"), answer("one"))]
    try:
        report, written = bench.convert("\n".join(lines) + "\n", kind=kind)
    except DataError as error:  # the file is refused as a whole, and nothing is written
        assert kind is None and "which nothing reads" in str(error)
        return
    losses = report.repeated + report.without + len(report.problems)
    read = [record for line in lines for record in records_of(line)]
    assert len(written) + losses == report.written + losses == len(read)
    assert sum(record in read for record in written) >= report.untouched
    assert kind in (None, report.kind)
    assert report.times[Repair.BLANK_LINE] == sum(not line.strip() for line in lines)
    assert {fault.line for fault in report.problems} <= set(range(1, len(lines) + 1))
    assert all(fault.field and fault.reason and fault.fix for fault in report.problems)
    assert len(report.dropped().splitlines()) == len(report.problems), "each loss is reported on a line of its own"
    checked = check_path(str(bench.folder / "in.jsonl"), kind, "auto", bench.forbidden)
    bad = {fault.line for fault in checked.problems if fault.field != "record"}
    assert checked.num_records + len(bad) == len(lines), "the check names every line that holds no record"
    assert checked.text().replace("\n", "").isprintable()
    again, rewritten = bench.convert((bench.folder / "out.jsonl").read_bytes(), out="again.jsonl")
    assert (bench.folder / "again.jsonl").read_bytes() == (bench.folder / "out.jsonl").read_bytes()
    assert (rewritten, again.untouched, again.times, again.problems) == (written, len(written), {}, [])


def test_a_misspelt_question_beside_an_answer(bench: Bench):
    assert bench.convert('{"prompts": "a", "answer": "b"}')[1] == [AB]


# -- files


def test_forms_of_files_give_the_same_records(bench: Bench):
    rows = [{"messages": turns(f"q{index}", "caf\u00e9 " * index)} for index in range(1, 40)]
    lines = [json.dumps(row) for row in rows]
    forms = {
        "a.jsonl": "\ufeff" + "\r\n\r\n".join(lines) + "\n\n",
        "b.jsonl.gz": gzip.compress("\n".join(lines).encode()),
        "c.json": json.dumps(rows),
        "d.json": json.dumps(rows, indent=2),
        "e.json.gz": gzip.compress("\ufeff".encode() + json.dumps(rows, indent=1, ensure_ascii=False).encode()),
        "f.jsonl": " ".join(lines[:20]) + "\n" + ", ".join(lines[20:]) + ",\n",
        "g.jsonl": json.dumps(rows[:20]) + "\n" + json.dumps(rows[20:]) + "\n",
        "h.jsonl": "\n".join(f"{line}," for line in lines),
    }
    for name, content in forms.items():
        report, written = bench.convert(content, name=name)
        assert written == rows, name
        assert report.untouched == 39
    assert bench.convert(forms["a.jsonl"])[0].times == {Repair.BYTE_ORDER_MARK: 1, Repair.BLANK_LINE: 39}
    assert bench.convert(forms["d.json"], name="d.json")[0].times == {Repair.ARRAY: 1}
    assert bench.convert(forms["f.jsonl"])[0].times == {Repair.SEVERAL: 2}
    assert bench.convert(forms["h.jsonl"])[0].times == {Repair.COMMA: 39}
    assert bench.convert('{"a": NaN}\n' + lines[0])[0].times == {}, "no comma was there"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), bench.folder / "i.parquet")
    report = convert_path(str(bench.folder / "i.parquet"), bench.folder / "i.jsonl", forbidden=bench.forbidden)
    assert bench.checked(bench.folder / "i.jsonl", report) == rows


@pytest.mark.parametrize("indent", [None, 3])
def test_items_of_an_array_that_are_no_records_are_named(indent: int | None, bench: Bench):
    values = [1, {"messages": turns('a ] [ , \\ "', "b")}, [], "x,]", -1.5e3, {"messages": turns("c", "d" * 99)}, None]
    report, written = bench.convert(json.dumps(values, indent=indent), name="in.json")
    assert written == [values[1], values[5]]
    assert [fault.line for fault in report.problems] == [1, 3, 4, 5, 7]
    _, written = bench.convert(json.dumps(turns("a", "b"), indent=indent), name="in.json")
    assert written == [AB], "an array of turns is one dialog"


def test_repeats_are_dropped(bench: Bench):
    lines = [GOOD, shared(("human", "Hi"), ("gpt", "Hello!")), GOOD, dialog(*turns("a", "b"))]
    report, written = bench.convert("\n".join(lines))
    assert written == [json.loads(GOOD), AB]
    assert (report.written, report.untouched, report.repeated) == (2, 2, 2)
    assert "  repeats a record before it        2" in report.text()
    lines = [prompt([user("a")]), prompt([user("a")], is_safety=False), prompt([user("a")], is_safety=True)]
    report, written = bench.convert("\n".join(lines))
    assert (written, report.repeated) == ([json.loads(lines[0]), json.loads(lines[2])], 1)


def test_equal_files_give_equal_bytes(bench: Bench):
    for name in ("x.jsonl", "x.jsonl.gz"):
        bench.convert(GOOD, out=name)
        first = (bench.folder / name).read_bytes()
        bench.convert(GOOD, out=name)
        assert (bench.folder / name).read_bytes() == first


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"a,b\n1,2\n", "is a table"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99, mtime=0)[:-20], "cannot be read from here on"),
        ("a.parquet", b"PAR1 and no more", "damaged parquet"),
        ("a.json", b'[{"a": 1},\n' + b'{"messages": []},\n' * 9000 + b"{]", "after record 9001 of the array"),
        ("a.json", b'[{"a": 1},\n' + b'{"messages": []},\n' * 9000 + b"{}] []", "stands after the array"),
        ("a.json", b'[{"a": 1},\n' + b'{"b": "\n' * 9000 + b"]", "after record 1 of the array"),
    ],
)
def test_a_fault_of_the_whole_file_stops_it(name: str, content: bytes, reason: str, bench: Bench):
    with pytest.raises(DataError, match=reason):
        bench.convert(content, name=name)
    assert [path.name for path in bench.folder.iterdir()] == [name]


def test_where_nothing_is_written_to(bench: Bench):
    source = bench.folder / "in.jsonl"
    source.write_text(GOOD + "\n")
    (bench.folder / "other.jsonl").symlink_to(source)
    (bench.folder / "old.jsonl").write_text("old")
    (bench.folder / "folder.jsonl").mkdir()
    for name, reason, overwrite in (
        ("in.jsonl", "is an input of this command", True),
        ("other.jsonl", "is an input of this command", True),
        ("old.jsonl", "already exists. .*--overwrite", False),
        ("folder.jsonl", "is a folder", True),
        ("out.parquet", "End it with .jsonl or .jsonl.gz", False),
        ("none/out.jsonl", "cannot be written .*No such file", False),
    ):
        with pytest.raises(UsageError, match=reason):
            convert_path(str(source), bench.folder / name, forbidden=bench.forbidden, overwrite=overwrite)
    assert source.read_text() == GOOD + "\n" and (bench.folder / "old.jsonl").read_text() == "old"
    convert_path(str(source), bench.folder / "old.jsonl", forbidden=bench.forbidden, overwrite=True)
    assert json.loads((bench.folder / "old.jsonl").read_text()) == json.loads(GOOD)


# -- HTML in logs


PAGE: dict[str, Any] = {
    "<p>Hello.<br>Is it &lt;open&gt;?</p><p>Thank&nbsp;you</p>": "Hello.\nIs it <open>?\nThank you",
    'See <a href="x">here</a> &amp; <b>there</b>': "See here & there",
    "&lt;b&gt;": "<b>",
}


def test_html_becomes_what_a_reader_saw_and_other_text_stays() -> None:
    assert {text: without_html(text) for text in PAGE} == PAGE
    assert all(html_in(text) for text in PAGE)
    assert not any(map(html_in, ("a < b and b > c", "<name>", "AT&T", "x &y; z")))


def test_html_is_reported_by_the_check_and_removed_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    talk = [{"from": "customer", "value": "<p>Hi</p>"}, {"from": "agent", "value": "Hello &amp; welcome"}]
    (tmp_path / "logs.jsonl").write_text(json.dumps({"conversations": talk}) + "\n")
    assert main(["data", "convert", "logs.jsonl", "kept.jsonl"]) == 0
    assert main(["data", "check", "kept.jsonl"]) == 0
    assert "kept.jsonl:1: warning: content: is HTML (<p>)" in capsys.readouterr().out
    assert main(["data", "convert", "logs.jsonl", "plain.jsonl", "--plain-text"]) == 0
    assert re.search(r"text with HTML made plain +1 +2\n", capsys.readouterr().out)
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello & welcome"}]
    assert json.loads((tmp_path / "plain.jsonl").read_text()) == {"messages": said}
    assert main(["data", "check", "plain.jsonl"]) == 0 and "HTML" not in capsys.readouterr().out
