"""data/prompts, data/adversarial, data/borderline, data/benchmarks: questions for sampling and for evaluation."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamachat.data.sources import SOURCES
from tools.cutting import chat, constraints, instructions, xstest
from tools.cutting.choosing import Dialog, chosen, distinct, text_of, turns_of, user_prompt
from tools.cutting.cleaning import is_about_abuse_of_children, plain
from tools.cutting.files import read_json, read_rows
from tools.cutting.sft import sft

Record = dict[str, Any]

# Prompts about child abuse are left out; the project does not need them.
_CHILDREN = re.compile(
    r"child|minor\b|minors|underage|under-age|teen|\bkid|lolita|\bboys?\b|\bgirls?\b|pedo|infant|toddler|student|school",
    re.IGNORECASE,
)
# CatQA topics of taste or licensing rather than harm, and the one about children.
_LEFT_OUT = ("Child Abuse", "Adult Content", "Political Campaigning", "Tailored Financial Advice")


def _safety_prompts(texts: Iterable[str], *, origin: str) -> list[Record]:
    sound = [text for text in distinct((plain(text) for text in texts), key=str) if not _CHILDREN.search(text)]
    return [
        {"prompt": user_prompt(text), "is_safety": True, "id": f"{origin}-{number:04d}"}
        for number, text in enumerate(sound)
    ]


def _some(records: list[Record], count: int) -> list[Record]:
    return chosen(records, count, key=lambda record: record["id"], salt="prompts")


def _red_instruct(root: Path, name: str) -> list[Record]:
    topics = read_json(root / f"red-instruct/{name}.json")
    questions = [
        question
        for topic, of_topic in topics.items()
        if topic not in _LEFT_OUT
        for of_subtopic in of_topic.values()
        for question in of_subtopic
    ]
    return _safety_prompts(questions, origin=name)


def _catqa_parts(root: Path) -> tuple[list[Record], list[Record]]:
    """CatQA in two disjoint parts: for sampling, and for attacks."""
    records = _red_instruct(root, "catqa_english")
    sampled = _some(records, len(records) // 2)
    return sampled, [record for record in records if record not in sampled]


def _as_prompt(dialog: Dialog) -> Dialog:
    """A dialog without its last answer."""
    return dialog[:-1]


def _general(root: Path) -> list[Record]:
    """Questions that do not start any dialog of data/sft: chat, orders, role play, and chat under a constraint."""
    used = {turns_of(record["messages"])[0] for records in sft(root).values() for record in records}
    personas, plays = instructions.role_play(root)
    pools = {
        "self-dialogue": (chat.self_dialogue(root), 600),
        "schema-guided": (chat.schema_guided(root), 200),
        "taskmaster": (chat.taskmaster(root), 100),
        "persona": (personas, 250),
        "role-play": (plays, 150),
    }
    records = []
    spoken: list[Dialog] = []
    for origin, (pool, count) in pools.items():
        fresh = [dialog for dialog in pool if turns_of(dialog)[0] not in used]
        ordered = chosen(fresh, len(fresh), key=text_of, salt="prompts")
        selected = [_as_prompt(dialog) for dialog in ordered[:count]]
        if origin == "self-dialogue":
            spoken = ordered[count:]
        records += [{"prompt": dialog, "id": f"{origin}-{number:04d}"} for number, dialog in enumerate(selected)]
    under_constraint = [_as_prompt(dialog) for dialog in constraints.constrained_dialogs(spoken, 250)]
    return records + [
        {"prompt": dialog, "id": f"constraint-{number:04d}"} for number, dialog in enumerate(under_constraint)
    ]


def _hh_prompts(root: Path) -> list[Record]:
    """Short contexts of harmlessness pairs, up to the last question."""
    contexts = []
    for row in read_rows(root / "hh-rlhf-harmless-base/test.jsonl.gz"):
        try:
            contexts += [record["prompt"] for record in SOURCES["hh_rlhf"].convert(row)]
        except ValueError:
            continue
    contexts = [[{**turn, "content": plain(turn["content"])} for turn in prompt] for prompt in contexts]
    short = [prompt for prompt in contexts if len(text_of(prompt)) <= 600 and not _CHILDREN.search(text_of(prompt))]
    return [
        {"prompt": prompt, "is_safety": True, "id": f"hh-rlhf-{number:04d}"}
        for number, prompt in enumerate(distinct(short, key=text_of))
    ]


def _xstest(root: Path, *, label: str, half: str) -> list[Record]:
    return [
        {
            "prompt": user_prompt(row["prompt"]),
            **({"is_safety": True} if label == "unsafe" else {}),
            "id": f"xstest-{row['id']}",
        }
        for row in xstest.prompts(root)
        if (row["label"], row["half"]) == (label, half) and not is_about_abuse_of_children(row["prompt"])
    ]


def prompts(root: Path) -> dict[str, list[Record]]:
    """File name -> prompts to sample answers to."""
    unsafe = _xstest(root, label="unsafe", half="training") + _catqa_parts(root)[0] + _some(_hh_prompts(root), 300)
    return {"general": _general(root), "safety": unsafe}


def adversarial(root: Path) -> dict[str, list[Record]]:
    """File name -> prompts that ask for harm."""
    hazards = read_rows(root / "ailuminate-demo/airr_official_1.0_demo_en_us_prompt_set_release.csv")
    texts = [row["prompt_text"] for row in hazards if row["hazard"] not in ("cse", "sxc_prn")]
    goals = [row["goal"] for row in read_rows(root / "advbench/harmful_behaviors.csv")]
    return {
        "ailuminate": _some(_safety_prompts(texts, origin="ailuminate"), 600),
        "red_instruct": _catqa_parts(root)[1] + _some(_red_instruct(root, "harmfulqa"), 400),
        "advbench": _some(_safety_prompts(goals, origin="advbench"), 250),
    }


def borderline(root: Path) -> dict[str, list[Record]]:
    """File name -> harmless prompts that look unsafe and unsafe twins: XSTest's evaluation half, CoCoNot's contrast set."""
    contrast = read_rows(root / "coconot/coconot_contrast_eval.jsonl.gz")
    return {
        "coconot_contrast": [
            {"prompt": user_prompt(plain(row["prompt"])), "id": f"coconot-{row['id']}"}
            for row in contrast
            if not is_about_abuse_of_children(row["prompt"])
        ],
        "xstest_safe": _xstest(root, label="safe", half="evaluation"),
        "xstest_unsafe_twins": _xstest(root, label="unsafe", half="evaluation"),
    }


def _question(origin: str, name: Any, question: str, **measured: Any) -> Record:
    return {"prompt": user_prompt(question), "id": f"{origin}-{name}", "benchmark": measured}


def _ifeval(root: Path) -> list[Record]:
    return [
        _question(
            "ifeval",
            row["key"],
            row["prompt"],
            instructions=[
                {"kind": kind, "arguments": {name: value for name, value in arguments.items() if value is not None}}
                for kind, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True)
            ],
        )
        for row in read_rows(root / "ifeval/input_data.jsonl.gz")
    ]


def _gsm8k(root: Path) -> list[Record]:
    return [
        _question("gsm8k", number, row["question"], number=row["answer"].rpartition("####")[2].strip().replace(",", ""))
        for number, row in enumerate(read_rows(root / "gsm8k/test.jsonl.gz"))
    ]


def _truthfulqa(root: Path) -> list[Record]:
    return [
        _question(
            "truthfulqa",
            number,
            row["Question"],
            best=_closed(row["Best Answer"]),
            true=_answers(row["Correct Answers"]),
            false=_answers(row["Incorrect Answers"]),
        )
        for number, row in enumerate(read_rows(root / "truthfulqa/TruthfulQA.csv"))
    ]


def _answers(text: str) -> list[str]:
    """The distinct answers of a cell, split as by the authors' code (truthfulqa/utilities.py, split_multi_answer)."""
    return list(dict.fromkeys(_closed(part) for part in text.split(";") if part.strip()))


def _closed(answer: str) -> str:
    answer = answer.strip()
    return answer if answer.endswith(".") else f"{answer}."


def _mt_bench(root: Path) -> list[Record]:
    return [
        _question("mt-bench", row["question_id"], row["turns"][0], follow_up=row["turns"][1])
        for row in read_rows(root / "mt-bench-questions/question.jsonl.gz")
    ]


def benchmarks(root: Path) -> dict[str, list[Record]]:
    """File name -> questions of published benchmarks, verbatim, with the data needed to score answers."""
    return {
        "ifeval": _ifeval(root),
        "gsm8k": _gsm8k(root),
        "truthfulqa": _truthfulqa(root),
        "mt_bench": _mt_bench(root),
    }
