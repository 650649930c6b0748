"""Dialogs of one or a few turns: open questions, stories, arithmetic, and role play with a persona."""

import re
from pathlib import Path

from llamachat.data.sources import SOURCES
from tools.cutting.choosing import Dialog, chosen, dialog_of, distinct, pick, turns_of
from tools.cutting.cleaning import capitalised, ended, is_decent, plain, sentences, words
from tools.cutting.files import read_rows
from tools.split import is_kept_for_tuning


def _converted(source: str, rows: list[dict], *, max_characters: int) -> list[Dialog]:
    """Normalised dialogs of a known data set, up to a maximum length."""
    dialogs = []
    for row in rows:
        for record in SOURCES[source].convert(row):
            turns = [plain(turn["content"]) for turn in record["messages"]]
            if all(turns) and is_decent("\n".join(turns)) and sum(map(len, turns)) <= max_characters:
                dialogs.append(dialog_of(turns))
    return [dialog for dialog in dialogs if dialog and "".join(turns_of(dialog)).isascii()]


def dolly(root: Path) -> list[Dialog]:
    rows = read_rows(root / "dolly-15k-387/databricks-dolly-15k-safety-only.jsonl.gz")
    return _converted("dolly", rows, max_characters=1500)


def oasst(root: Path) -> list[Dialog]:
    """Best-ranked paths, truncated after the last answer that fits; one per question, since forks share a beginning."""
    dialogs = []
    for row in read_rows(root / "oasst-en-100/en_100_tree.jsonl.gz"):
        for record in SOURCES["oasst"].convert(row):
            turns = [plain(turn["content"]) for turn in record["messages"]]
            while turns and sum(map(len, turns)) > 2000:
                turns = turns[:-2]
            if turns and is_decent("\n".join(turns)) and "".join(turns).isascii():
                dialogs.append(dialog_of(turns))
    # Keep a question's longest path, the first in a tie.
    return distinct(sorted(dialogs, key=len, reverse=True), key=lambda dialog: dialog[0]["content"])


def self_instruct(root: Path) -> list[Dialog]:
    """The seed tasks, and user-oriented tasks whose instruction is in our part of PandaLM.

    PandaLM uses the same instructions and reserves some as an unseen test set: instructions outside our part might be
    in that test set.
    """
    folder = root / "self-instruct"
    ours = {row["instruction"].strip() for row in read_rows(root / "pandalm-testset/testset-v1.json.gz")}
    rows = read_rows(folder / "seed_tasks.jsonl")
    rows += [
        row for row in read_rows(folder / "user_oriented_instructions.jsonl") if row["instruction"].strip() in ours
    ]
    return _converted("self_instruct", rows, max_characters=1300)


def gsm8k(root: Path) -> list[Dialog]:
    """Short arithmetic problems, without the calculator annotations.

    Only questions that need no normalisation, so that their hash still matches the split from pretraining.
    """
    dialogs = []
    for row in read_rows(root / "gsm8k/train.jsonl.gz"):
        question = row["question"].strip()
        if is_kept_for_tuning(question) and len(question) <= 160 and question == plain(question):
            steps = re.sub(r"<<.*?>>", "", plain(row["answer"])).replace("\n#### ", "\nThe answer is ")
            answer = ended(steps)
            if answer.isascii() and len(answer) <= 200:
                dialogs.append(dialog_of([question, answer]))
    return dialogs


_STORY_QUESTIONS = ("Read this story and answer my question.", "Here is a part of a story.", "Please read this:")


def fairytale(root: Path) -> list[Dialog]:
    """Up to three questions per dialog on a short section of a story, which is in the first turn."""
    folder = root / "fairytaleqa"
    sections = {row["name"]: row["sections"] for row in read_rows(folder / "stories.jsonl.gz")}
    pairs_by_section: dict[tuple[str, int], list[tuple[str, str]]] = {}
    for row in read_rows(folder / "questions.jsonl.gz"):
        place = str(row["cor_section"]).split(",")
        if not is_kept_for_tuning(row["name"].strip()) or len(place) != 1 or not place[0].strip().isdigit():
            continue
        question, answer = capitalised(plain(row["question"])), ended(capitalised(plain(row["answer1"])))
        if len(words(answer)) >= 2 and question.endswith("?"):
            pairs_by_section.setdefault((row["name"], int(place[0]) - 1), []).append((question, answer))
    dialogs = []
    for (name, index), pairs in sorted(pairs_by_section.items()):
        of_story = sections.get(name, [])
        section = plain(of_story[index]) if index < len(of_story) else ""
        if not section or len(section) > 1100 or not (section + str(pairs)).isascii():
            continue
        pairs = distinct(pairs, key=lambda pair: pair[1])[:3]
        introduction = pick(_STORY_QUESTIONS, section, salt="story")
        turns = [f"{introduction}\n\n{section}\n\n{pairs[0][0]}", pairs[0][1]]
        for question, answer in pairs[1:]:
            turns += [question, answer]
        dialogs.append(dialog_of(turns))
    return dialogs


_PERSONA = re.compile(
    r"(?:(?:imagine|pretend|assume)(?: that)? (?:you are|you're)|you are|you're|(?:take on|take|assume|play) the role of"
    r"|(?:role ?-?play|act|pretend to be|imagine yourself) as)\s+(?P<who>.+)",
    re.IGNORECASE | re.DOTALL,
)
_TASK = re.compile(
    r"(?:,? and |,? )(?=(?:describe|explain|discuss|write|give|provide|share|tell|recommend|suggest|outline|create|list"
    r"|offer|analyze|present|recount|narrate|compose|introduce|convince|advise|compare|what|how|why)\b)"
)
# Signs that the split between persona and task is in the middle of a clause.
_BROKEN = r"\byou|:|\b(to|of|and|or|for|with|the|an?|in|on|who|that|about|has|have|trying|asked|tasked)$"
_STYLES = ("You are {who}.", "Act as {who}.", "You are {who}. Stay in this role.", "Always speak as {who}.")


def _persona(instruction: str) -> tuple[str, str] | None:
    """(persona, task), or None if the two cannot be separated."""
    first, *rest = sentences(instruction)
    match = _PERSONA.fullmatch(first)
    if not match:
        return None
    who, *task = _TASK.split(match["who"].rstrip(".!?, "), maxsplit=1)
    request = " ".join([ended(capitalised(task[0])) if task else "", *rest]).strip()
    if task and first.endswith("?"):
        request = request.replace(ended(capitalised(task[0])), capitalised(task[0]) + "?", 1)
    is_plain = re.match(r"(an?|the) |[A-Z]", who) and len(who) <= 110 and not re.search(_BROKEN, who)
    is_alone = len(words(request)) >= 3 and not _PERSONA.match(request)
    return (who.rstrip(", "), request) if is_plain and is_alone else None


def role_play(root: Path) -> tuple[list[Dialog], list[Dialog]]:
    """(dialogs with the persona as system text, dialogs with it in the question)."""
    with_system, without = [], []
    for row in read_rows(root / "gpteacher/roleplay-simple-deduped-roleplay-instruct.json.gz"):
        for record in SOURCES["gpteacher"].convert(row):
            question, answer = (plain(turn["content"]) for turn in record["messages"])
            is_short = len(question) + len(answer) <= 900
            if not is_short or not (question + answer).isascii() or not is_decent(question + answer):
                continue
            persona = _persona(plain(row["instruction"]))
            if persona is None:
                without.append(dialog_of([question, answer]))
                continue
            who, request = persona
            context = plain(row["input"])
            system = pick(_STYLES, question, salt="persona").format(who=who)
            with_system.append(dialog_of([f"{request}\n\n{context}" if context else request, answer], system=system))
    return with_system, without


_WHO = ("Who are you?", "Hello, who are you?", "What are you?", "Can you introduce yourself?", "Tell me who you are.")


def introduced(dialogs: list[Dialog], count: int) -> list[Dialog]:
    """Dialogs with a short persona that start by asking who the assistant is; the system text has the answer."""
    introductions = []
    for dialog in chosen(dialogs, len(dialogs), key=lambda dialog: dialog[1]["content"], salt="introduced"):
        match = re.fullmatch(
            r"(?:You are|Act as|Always speak as) ((?:an? |the )?[\w' -]{3,50})\..*", dialog[0]["content"]
        )
        if match and not re.search(r"\b(who|that|has|have|had)\b", match[1]) and len(introductions) < count:
            question = pick(_WHO, dialog[1]["content"], salt="who")
            greeting = "Hello! " if question.startswith("Hello") else ""
            turns = [question, f"{greeting}I am {match[1]}.", *turns_of(dialog)]
            introductions.append(dialog_of(turns, system=dialog[0]["content"]))
    return introductions
