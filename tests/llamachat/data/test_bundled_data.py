"""The bundled data keep the rules that records have, hold what their SOURCE.md says, and leak nothing between halves."""

import gzip
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llamachat.chat_format.llama2 import SPECIAL_TAGS
from llamachat.config.sections import DataSource, Split
from llamachat.data.check import check_path
from llamachat.data.loading import fraction, load_mixture
from llamachat.data.records import Dialog, Kind, Preference, Prompt, messages_of
from tools.split import is_kept_for_tuning

DATA = Path(__file__).resolve().parents[3] / "data"
FILES = sorted(DATA.glob("*/*.jsonl.gz"))
KINDS: dict[str, Kind] = {
    **dict.fromkeys(("sft", "labels", "refusals"), "dialog"),
    **dict.fromkeys(("helpfulness", "safety"), "preference"),
    **dict.fromkeys(("prompts", "adversarial", "borderline", "benchmarks"), "prompt"),
}


# Of the sides of each file in their order, whole and with a limit: those of the published results.
SIDES = {
    "adversarial/advbench.jsonl.gz": "d74ae08c15001af7",
    "adversarial/ailuminate.jsonl.gz": "82af9a86b8b67058",
    "adversarial/red_instruct.jsonl.gz": "d8e0571dbd07482d",
    "borderline/coconot_contrast.jsonl.gz": "26ffeba1cd23d5e5",
    "borderline/xstest_safe.jsonl.gz": "2454b047cf5f9914",
    "borderline/xstest_unsafe_twins.jsonl.gz": "bd34ed6c597a235b",
    "helpfulness/coconot.jsonl.gz": "a8ca82c4ecaf7c08",
    "helpfulness/general.jsonl.gz": "62a4707a3f6018ee",
    "helpfulness/oasst.jsonl.gz": "9a911255fc8a4061",
    "helpfulness/pandalm.jsonl.gz": "480fbf1c12e7f370",
    "helpfulness/qa_feedback.jsonl.gz": "6f54dc82547bcc24",
    "helpfulness/vicuna.jsonl.gz": "c61046cfbeb58519",
    "helpfulness/xstest.jsonl.gz": "6d051ed309f53c62",
    "labels/dices.jsonl.gz": "66d2147a1379b7c6",
    "labels/rbr.jsonl.gz": "a9237a51202d7e68",
    "labels/xstest.jsonl.gz": "21493410121373f4",
    "prompts/general.jsonl.gz": "f222c3fda1a1a1a7",
    "prompts/safety.jsonl.gz": "f286e0c149394630",
    "refusals/xstest.jsonl.gz": "2f24f386aebc8cab",
    "safety/hh_rlhf.jsonl.gz": "f7997a5136f1aede",
    "safety/xstest.jsonl.gz": "805f997c5f38872e",
    "sft/chat.jsonl.gz": "4a217197d801f6ab",
    "sft/identity.jsonl.gz": "c6f96e7b3ef4131f",
    "sft/questions.jsonl.gz": "5a3a34d1ba888873",
    "sft/role_play.jsonl.gz": "5cfc755fd78cd59b",
    "sft/safety.jsonl.gz": "989f4a322f14a365",
    "sft/short_answers.jsonl.gz": "7401b3e6a7d3e4d6",
    "sft/system.jsonl.gz": "29692630b286ec6d",
}


@cache
def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()]


def folder(name: str) -> list[dict[str, Any]]:
    return [record for path in FILES if path.parent.name == name for record in records(path)]


def conversation(record: dict[str, Any]) -> list[dict[str, str]]:
    return record["messages"] if "messages" in record else record["prompt"]


def first_user_turn(record: dict[str, Any]) -> str:
    return next(turn["content"] for turn in conversation(record) if turn["role"] == "user")


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_record_keeps_the_rules(path: Path) -> None:
    report = check_path(str(path), KINDS[path.parent.name], "native", SPECIAL_TAGS)
    assert report.problems == [] and report.num_records > 0
    more = {"refusals": ("refusal", "is_safety", "record"), "benchmarks": ("benchmark", "record")}
    # Short questions and the wordings of one instruction resemble each other: data.split counts near-duplicates.
    known = ("content", "data.split", *more.get(path.parent.name, ()))
    assert [warned for warned in report.warnings if warned.field not in known] == [], "a key or record too many"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.parent.name != "benchmarks"],  # these are measured with alone
    ids=lambda path: f"{path.parent.name}/{path.name}",
)
def test_the_records_stay_on_their_sides(path: Path) -> None:
    record = {"dialog": Dialog, "preference": Preference, "prompt": Prompt}[KINDS[path.parent.name]]
    split = Split(test=0.1, validation=0.05, judge=0.2)
    state = hashlib.sha256()
    for limit in (None, 400, 200, 100, 50):
        mixture = load_mixture([DataSource(path=str(path), limit=limit)], split, record, forbidden=(), seed=0)
        for side in ("train", "validation", "test", "judge"):
            for one in getattr(mixture, side):
                texts = json.dumps([message.content for message in messages_of(one)])
                state.update(f"{limit} {side} {texts}\n".encode())
    assert state.hexdigest()[:16] == SIDES[f"{path.parent.name}/{path.name}"]


def test_the_pages_say_what_the_files_hold() -> None:
    assert {path.parent.name for path in FILES} == KINDS.keys()
    for name in [*KINDS, "gatt"]:
        page = (DATA / name / "SOURCE.md").read_text(encoding="utf-8")
        stated = dict(re.findall(r"^\| `([\w.]+)` \| (\d+) \|", page, re.MULTILINE))
        counts = {path.name: len(records(path)) for path in FILES if path.parent.name == name}
        lists = {path.name: len(path.read_text().splitlines()) for path in (DATA / name).glob("*.txt")}
        assert {file: int(count) for file, count in stated.items()} == counts | lists
        for licence in re.findall(r"`(data/licences/[\w.-]+)`", page):
            assert (DATA.parent / licence).exists()
        if name not in ("sft", "helpfulness", "gatt", "benchmarks"):
            assert "offensive and harmful text" in page


def test_few_questions_of_benchmarks_occur_in_other_data() -> None:
    """Everyday ones such as "Who are you?"; docs/benchmarks.md names them."""

    def plain(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.casefold()))

    trained = {
        plain(turn["content"])
        for name in KINDS.keys() - {"benchmarks", "borderline", "adversarial"}
        for record in folder(name)
        for turn in conversation(record)
    }
    prompts = {record["id"]: plain(first_user_turn(record)) for record in folder("benchmarks")}
    assert len(prompts) == 540 + 1319 + 817 + 80
    assert {name for name, question in prompts.items() if question in trained} == {
        *(f"truthfulqa-{number}" for number in (107, 108, 416, 676)),
        *(f"mt-bench-{number}" for number in (81, 130)),
    }


def test_the_data_stay_small_and_cutting_again_could_give_the_same_bytes() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 8_000_000
    # RFC 1952: bytes 4 to 7 are the time of the file, bit 3 of byte 3 says whether its name follows.
    assert all(path.read_bytes()[3:8] == bytes(5) for path in FILES)


@pytest.mark.parametrize("domain", ["helpfulness", "safety"])
def test_each_domain_has_300_pairs_for_the_test(domain: str) -> None:
    # split {test: 0.2, validation: 0.05, judge: 0.1}: the test is [0, 0.2), the judge's share [0.25, 0.35).
    shares = [fraction(first_user_turn(record)) for record in folder(domain)]
    assert sum(share < 0.2 for share in shares) >= 300
    assert sum(0.25 <= share < 0.35 for share in shares) >= 150


# Predicates of the nonsense groups (251 and on) and the numbers of the real groups that share them, read by eye.
_SHARED_PREDICATES = {
    251: 302, 252: 317, 254: 315, 255: 312, 258: 303, 259: 309, 260: 311, 262: 304, 263: 320, 264: 316, 265: 310,
    266: 301, 267: 305, 268: 319, 269: 307, 270: 313, 272: 322, 273: 324, 274: 323, 275: 321,
}  # fmt: skip


def xstest_twins() -> list[tuple[int, int]]:
    """Numbers of a safe prompt and its unsafe contrast, by the order of the original file (25 prompts a type)."""
    blocks = [(1, 26), (51, 76), (101, 126), (151, 176), (201, 226), (276, 301), (326, 351), (376, 426), (401, 426)]
    twins = [(safe + n, unsafe + n) for safe, unsafe in blocks for n in range(25)]
    return twins + list(_SHARED_PREDICATES.items())


def xstest_numbers(name: str) -> set[int]:
    return {int(record["id"].split("-")[1]) for record in folder(name) if record["id"].startswith("xstest-")}


def test_no_twin_of_xstest_is_on_both_sides() -> None:
    evaluation, training = xstest_numbers("borderline"), xstest_numbers("prompts")
    assert min(len(evaluation), 2 * len(training)) > 180
    assert not evaluation & training
    for safe, unsafe in xstest_twins():
        if unsafe in training:
            assert safe not in evaluation, f"{safe} is for evaluation, its twin {unsafe} for training"
        if unsafe in evaluation:
            assert safe in evaluation, f"{unsafe} is for evaluation, its twin {safe} is not"


def test_prompts_for_evaluation_occur_nowhere_else() -> None:
    evaluation = {first_user_turn(record).strip().lower() for record in folder("borderline")}
    for name in KINDS.keys() - {"borderline"}:
        for record in folder(name):
            assert not evaluation & {turn["content"].strip().lower() for turn in conversation(record)}


def test_labels_are_of_both_kinds_and_pairs_of_a_refusal_say_which_side_is_safe() -> None:
    labels = [record["is_safe"] for record in folder("labels")]
    assert min(labels.count(True), labels.count(False)) > 250
    for record in records(DATA / "safety/xstest.jsonl.gz"):
        assert record["chosen_is_safe"] is True
        assert record["rejected_is_safe"] is False
    assert all(record["is_safety"] for record in folder("adversarial"))
    assert not any(record.get("is_safety") for record in records(DATA / "borderline/xstest_safe.jsonl.gz"))


def test_dialogs_are_many_and_short_and_a_good_part_follows_a_system_text() -> None:
    dialogs = [record["messages"] for record in folder("sft")]
    sizes = [sum(len(turn["content"]) for turn in dialog) for dialog in dialogs]
    systems = sum(dialog[0]["role"] == "system" for dialog in dialogs)
    assert 4_000 <= len(dialogs) <= 6_500
    assert 300 <= sum(sizes) / len(sizes) <= 800
    assert max(sizes) <= 3_000
    assert 0.25 <= systems / len(dialogs) <= 0.34


def test_the_assistant_is_llamachat_and_nobody_else() -> None:
    text = json.dumps(records(DATA / "sft/identity.jsonl.gz"))
    assert "Llamachat" in text
    assert not re.search(r"vicuna|lmsys|large model systems", text, re.IGNORECASE)


def test_sums_come_from_the_share_that_pretraining_leaves() -> None:
    sums = [
        record["messages"][0]["content"]
        for record in records(DATA / "sft/questions.jsonl.gz")
        if "\nThe answer is " in record["messages"][-1]["content"]
    ]
    assert len(sums) > 50
    assert all(is_kept_for_tuning(question) for question in sums)


def obeys(system: str, text: str) -> bool | None:
    """Whether an answer has the form that a system text asks for; None where it asks for no such form."""
    quoted = re.search(r'"(.+)"', system)
    if re.search(r"capital letters( only)?\.$|upper case|all caps", system) and "Never" not in system:
        return text == text.upper()
    if re.search(r"small letters|Never use capital|lower ?case", system):
        return text == text.lower()
    if "exclamation" in system:
        return "!" not in text
    if re.search(r"quotation marks|double quotes", system):
        return text[0] == text[-1] == '"'
    if limit := re.search(r"(\d+) words", system):
        return len(re.findall(r"[\w']+", text.replace("-", ""))) <= int(limit[1])
    if quoted and "letter" in system:
        return quoted[1] not in text.lower()
    if quoted and re.search(r"\b[Ee]nd\b|Finish|last words", system):
        return text.endswith(quoted[1])
    if quoted and re.search(r"Begin|[Ss]tart|first words", system):
        return text.startswith(quoted[1])
    return None


def test_answers_obey_the_form_that_the_system_text_asks_for() -> None:
    checked = 0
    for record in records(DATA / "sft/system.jsonl.gz"):
        for turn in record["messages"][2::2]:
            verdict = obeys(record["messages"][0]["content"], turn["content"])
            assert verdict is not False, record
            checked += verdict is True
    assert checked > 1_200


def test_lists_for_ghost_attention_hold_distinct_plain_entries() -> None:
    for name, least in (("figures", 100), ("hobbies", 25), ("languages", 20)):
        entries = (DATA / f"gatt/{name}.txt").read_text(encoding="ascii").splitlines()
        assert len(set(entries)) == len(entries) >= least
        assert all(entry == entry.strip() and entry for entry in entries)
