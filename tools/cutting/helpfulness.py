"""data/helpfulness: which of two answers is more helpful, with a rating if the origin says by how much.

The mapping to ratings is ours, since no origin asked its annotators for the paper's four grades:

    oasst      distance of the two ranks: 1 slightly_better, 2 better, 3 and more significantly_better
    pandalm    three annotators: all for it significantly_better, two and a tie better, two against one slightly_better,
               one and two ties negligibly_better; three ties or one against one are left out
    vicuna     difference of GPT-4's two scores out of 10: up to 0.5 negligibly_better, up to 1.5 slightly_better,
               up to 2.5 better, above significantly_better
    qa_feedback, general, xstest, coconot: no strength, no rating
"""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

from llamachat.data.sources import SOURCES
from tools.cutting.choosing import answer_of, user_prompt
from tools.cutting.cleaning import declines, is_about_abuse_of_children, plain
from tools.cutting.files import read_rows
from tools.cutting.xstest import training_pairs

Record = dict[str, Any]

# Maximum length of a pair (the prompt and its longer answer); a longer one would fill a context of 1,024 tokens.
_MAX_CHARACTERS = 2800


def plain_pair(record: Record) -> Record:
    """The pair with normalised text."""
    plain_turns = {
        side: [{**turn, "content": plain(turn["content"])} for turn in record[side]]
        for side in ("prompt", "chosen", "rejected")
    }
    return {**record, **plain_turns}


def fits(record: Record) -> bool:
    answers = [len(record[side][0]["content"]) for side in ("chosen", "rejected")]
    return sum(len(turn["content"]) for turn in record["prompt"]) + max(answers) <= _MAX_CHARACTERS


def pair(prompt: str, chosen: str, rejected: str, **fields: object) -> Record:
    answers = {"chosen": [answer_of(plain(chosen))], "rejected": [answer_of(plain(rejected))]}
    return {"prompt": user_prompt(plain(prompt)), **answers, **fields}


def _of_source(name: str, rows: list[Record]) -> Iterator[Record]:
    for row in rows:
        for record in SOURCES[name].convert(row):
            yield plain_pair(record)


def _pandalm(root: Path) -> Iterator[Record]:
    ratings = {
        (3, 0): "significantly_better",
        (2, 0): "better",
        (2, 1): "slightly_better",
        (1, 0): "negligibly_better",
    }
    for row in read_rows(root / "pandalm-testset/testset-v1.json.gz"):
        votes = [row[f"annotator{number}"] for number in (1, 2, 3)]
        first, second = votes.count(1), votes.count(2)
        rating = ratings.get((max(first, second), min(first, second)))
        if rating:
            prompt = f"{row['instruction']}\n\n{row['input']}" if row["input"].strip() else row["instruction"]
            better, worse = ("response1", "response2") if first > second else ("response2", "response1")
            # The one-word answers "True" and "False" are booleans in the file.
            yield pair(prompt, str(row[better]), str(row[worse]), rating=rating)


def _qa_feedback(root: Path) -> Iterator[Record]:
    """Pairs of model answers to a question, without the passages, which exceed the context."""
    for row in read_rows(root / "qa-feedback/dev_feedback.json.gz"):
        for (first, second), preferred in zip(combinations((1, 2, 3, 4), 2), row["preference"], strict=True):
            if preferred:
                better, worse = (first, second) if preferred == 1 else (second, first)
                yield pair(row["question"], row[f"prediction {better}"], row[f"prediction {worse}"])


def _rating_of_score_difference(difference: float) -> str:
    if difference <= 0.5:
        return "negligibly_better"
    if difference <= 1.5:
        return "slightly_better"
    return "better" if difference <= 2.5 else "significantly_better"


def _vicuna(root: Path) -> Iterator[Record]:
    folder = root / "vicuna-bench-gpt4-reviews"
    questions = {row["question_id"]: row["text"] for row in read_rows(folder / "question.jsonl")}
    answers = {row["answer_id"]: row for path in sorted(folder.glob("answer/*.jsonl")) for row in read_rows(path)}
    reviews = [row for path in sorted(folder.glob("review/*/*.jsonl")) for row in read_rows(path)]
    # By question, so that identical texts are adjacent and compress well.
    for row in sorted(reviews, key=lambda row: (int(row["question_id"]), row["answer1_id"], row["answer2_id"])):
        first, second = answers.get(row["answer1_id"]), answers.get(row["answer2_id"])
        scores = row["score"]
        if first is None or second is None or len(scores) != 2 or scores[0] == scores[1] or min(scores) < 0:
            continue
        better, worse = (first, second) if scores[0] > scores[1] else (second, first)
        rating = _rating_of_score_difference(abs(scores[0] - scores[1]))
        yield pair(questions[row["question_id"]], better["text"], worse["text"], rating=rating)


def _xstest(root: Path) -> Iterator[Record]:
    """Harmless prompts of the training half: an answer beats a refusal."""
    for prompt, complied, refused in training_pairs(root, label="safe"):
        yield pair(prompt, complied, refused)


def _coconot(root: Path) -> Iterator[Record]:
    """Harmless requests that look harmful: a helpful answer beats an over-cautious or worse one."""
    for row in read_rows(root / "coconot/coconot_pref.jsonl.gz"):
        if not declines(row["chosen"]):  # a few of the chosen answers refuse
            yield pair(row["prompt"], row["chosen"], row["rejected"])


def helpfulness(root: Path) -> dict[str, list[Record]]:
    """File name -> records."""
    trees = read_rows(root / "oasst-en-100/en_100_tree.jsonl.gz")
    general = read_rows(root / "llamafactory-dpo-en-demo/dpo_en_demo.json.gz")
    files = {
        "oasst": _of_source("oasst_preference", trees),
        "pandalm": _pandalm(root),
        "qa_feedback": _qa_feedback(root),
        "vicuna": _vicuna(root),
        "general": _of_source("llamafactory_preference", general),
        "xstest": _xstest(root),
        "coconot": _coconot(root),
    }
    return {
        name: [record for record in records if fits(record) and not is_about_abuse_of_children(str(record["prompt"]))]
        for name, records in files.items()
    }
