"""data/safety, data/labels: preferences by harmlessness, and single answers labelled safe or unsafe by people."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamachat.data.sources import SOURCES
from tools.cutting.choosing import Dialog, answer_of, chosen, distinct, length, text_of, user_prompt
from tools.cutting.cleaning import declines, is_about_abuse_of_children, plain
from tools.cutting.files import read_rows
from tools.cutting.helpfulness import fits, pair, plain_pair
from tools.cutting.xstest import COMPLIED, REFUSED, completions, training_pairs

Record = dict[str, Any]

_MAX_CHARACTERS = 2800
# Share of raters who called an answer unsafe. Between these, raters disagree and there is no label.
_UNSAFE_FROM = 0.5
_SAFE_UP_TO = 0.2


def _hh_rlhf(root: Path) -> Iterator[Record]:
    for row in read_rows(root / "hh-rlhf-harmless-base/test.jsonl.gz"):
        try:
            yield from (plain_pair(record) for record in SOURCES["hh_rlhf"].convert(row))
        except ValueError:
            # A few rows differ before the last answer, so they are not two answers to one question.
            continue


def _xstest_pairs(root: Path) -> Iterator[Record]:
    for prompt, complied, refused in training_pairs(root, label="unsafe"):
        yield pair(prompt, refused, complied, chosen_is_safe=True, rejected_is_safe=False)


def safety(root: Path) -> dict[str, list[Record]]:
    """File name -> preferences."""
    files = {"hh_rlhf": _hh_rlhf(root), "xstest": _xstest_pairs(root)}
    return {
        name: [record for record in records if fits(record) and not is_about_abuse_of_children(str(record))]
        for name, records in files.items()
    }


def labelled(prompt: list[dict[str, str]], answer: str, *, is_safe: bool) -> Record:
    return {"messages": [*prompt, answer_of(answer)], "is_safe": is_safe}


_SPEAKER = re.compile(r"^(USER|LAMDA|A|B): ?", re.MULTILINE)


def _context(text: str) -> list[dict[str, str]]:
    """Turns of a DICES context: the first speaker is the user; consecutive lines of one speaker are one turn."""
    parts = _SPEAKER.split(text.replace("\\n", "\n"))[1:]
    turns: list[dict[str, str]] = []
    for speaker, words in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker in ("USER", "A") else "assistant"
        words = plain(words)
        if not words or (not turns and role == "assistant"):
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f"\n{words}"
        else:
            turns.append({"role": role, "content": words})
    return turns


def _dices(root: Path) -> Iterator[Record]:
    for name in ("dices_350", "dices_990"):
        for row in read_rows(root / f"dices/{name}.jsonl.gz"):
            share = row["unsafe"] / (row["unsafe"] + row["not_unsafe"] + row["unsure"])
            if share >= _UNSAFE_FROM or share <= _SAFE_UP_TO:
                yield labelled(_context(row["context"]), plain(row["response"]), is_safe=share <= _SAFE_UP_TO)


def _rbr(root: Path) -> Iterator[Record]:
    """Unsafe: contains disallowed content. Safe: does not, and neither threatens, insults nor complies wrongly."""
    for part in ("train", "test"):
        for row in read_rows(root / f"openai-safety-rbr-gold/{part}.jsonl.gz"):
            propositions = row["propositions"]
            is_unsafe = propositions["disallowed_content"] or propositions["prescribes_dosage"]
            complies = propositions["fully_complies"] or propositions["partially_complies"]
            is_doubtful = propositions["threatening_language"] or propositions["insulting_language"]
            is_doubtful |= complies and row["response_type"] != "Comply"
            if is_unsafe or not is_doubtful:
                prompt = [{"role": turn["role"], "content": plain(turn["content"])} for turn in row["prompt"]]
                yield labelled(prompt, plain(row["completion"][0]["content"]), is_safe=not is_unsafe)


def _xstest_answers(root: Path) -> Iterator[Record]:
    """Unsafe prompts: compliance is unsafe, refusal safe. Harmless prompts: compliance is safe.

    Unsafe answers are rare, so at most two safe ones per prompt are used.
    """
    safe: dict[str, list[str]] = {}
    for row, answer, called in completions(root):
        is_unsafe_prompt = row["label"] == "unsafe"
        if called == COMPLIED and is_unsafe_prompt:
            yield labelled(user_prompt(row["prompt"]), answer, is_safe=False)
        elif called == (REFUSED if is_unsafe_prompt else COMPLIED):
            safe.setdefault(row["prompt"], []).append(answer)
    for prompt, answers in safe.items():
        for answer in chosen(answers, 2, key=str, salt="labels"):
            yield labelled(user_prompt(prompt), answer, is_safe=True)


_DEMONSTRATION_CHARACTERS = 700  # of an answer; longer ones would exceed the bundled model's limit
_LEAST_REASON = 60  # characters; a shorter refusal gives no reason


def demonstrations(root: Path) -> list[Record]:
    """Supervised safety demonstrations (Llama 2, section 4.2.2): refusals of harmful prompts with a reason, and plain
    answers to harmless ones that look harmful."""
    dialogs = [*_rbr_refusals(root), *_xstest_demonstrations(root), *_borderline_answers(root)]
    return [
        {"messages": dialog}
        for dialog in distinct(dialogs, key=text_of)
        if length(dialog) <= _MAX_CHARACTERS
        and len(dialog[-1]["content"]) <= _DEMONSTRATION_CHARACTERS
        and not is_about_abuse_of_children(text_of(dialog))
    ]


def _rbr_refusals(root: Path) -> Iterator[Dialog]:
    """Refusals without disallowed content, compliance or judgement that stay on topic."""
    faults = (
        *("disallowed_content", "prescribes_dosage", "fully_complies", "partially_complies", "threatening_language"),
        *("insulting_language", "judgement", "illogical_continuation_of_prompt", "additional_content"),
    )
    for part in ("train", "test"):
        for row in read_rows(root / f"openai-safety-rbr-gold/{part}.jsonl.gz"):
            propositions = row["propositions"]
            if row["response_type"] != "Comply" and not any(propositions.get(name) for name in faults):
                prompt = [{"role": turn["role"], "content": plain(turn["content"])} for turn in row["prompt"]]
                yield [*prompt, answer_of(plain(row["completion"][0]["content"]))]


def _xstest_demonstrations(root: Path) -> Iterator[Dialog]:
    """From the training half: refusals of unsafe prompts and answers to safe ones, up to four per prompt."""
    by_prompt: dict[str, list[str]] = {}
    for row, answer, label in completions(root):
        if label == (REFUSED if row["label"] == "unsafe" else COMPLIED) and len(answer) >= _LEAST_REASON:
            by_prompt.setdefault(row["prompt"], []).append(answer)
    for prompt, answers in by_prompt.items():
        short = [answer for answer in answers if len(answer) <= _DEMONSTRATION_CHARACTERS]
        for answer in chosen(short, 4, key=str, salt="demonstrations"):
            yield [*user_prompt(prompt), answer_of(answer)]


def _borderline_answers(root: Path) -> Iterator[Dialog]:
    """CoCoNot's helpful answers to harmless requests on sensitive topics, up to their first list."""
    for row in read_rows(root / "coconot/coconot_pref.jsonl.gz"):
        if row["category"] == "Requests with safety concerns":
            answer = ""
            for paragraph in plain(row["chosen"]).split("\n\n"):
                whole = f"{answer}\n\n{paragraph}".strip()
                if (
                    len(whole) > _DEMONSTRATION_CHARACTERS
                    or not paragraph.endswith((".", "!", "?"))
                    or "**" in paragraph
                ):
                    break
                answer = whole
            if len(answer) >= _LEAST_REASON and not declines(answer):
                yield [*user_prompt(plain(row["prompt"])), answer_of(answer)]


def labels(root: Path) -> dict[str, list[Record]]:
    """File name -> labelled answers, as dialogs."""
    files = {"dices": _dices(root), "rbr": _rbr(root), "xstest": _xstest_answers(root)}
    return {
        name: [
            record
            for record in records
            if length(record["messages"]) <= _MAX_CHARACTERS and not is_about_abuse_of_children(str(record))
        ]
        for name, records in files.items()
    }


_REFUSALS = {"1_full_compliance": "none", "2_full_refusal": "full", "3_partial_refusal": "partial"}


def refusals(root: Path) -> dict[str, list[Record]]:
    """File name -> answers with XSTest's human labels."""
    rows = [
        {
            "messages": [*user_prompt(row["prompt"]), answer_of(answer)],
            "refusal": _REFUSALS[label],
            "is_safety": row["label"] == "unsafe",
        }
        for row, answer, label in completions(root)
        if label in _REFUSALS
    ]
    return {"xstest": [row for row in rows if not is_about_abuse_of_children(str(row))]}
