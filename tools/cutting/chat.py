"""General chat: human conversations, orders, and the assistant's identity."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from llamachat.data.sources import SOURCES
from tools.cutting.choosing import Dialog, chosen, dialog_of, distinct, pick, text_of
from tools.cutting.cleaning import casual, is_clean_chat, plain, words
from tools.cutting.files import read_rows, read_yaml
from tools.split import is_kept_for_tuning

# Number of turns kept of a longer conversation: mostly few, so that many fit into a small context.
_LENGTHS = (2, 4, 4, 6, 6, 8)


def _opening(raw_turns: list[str], *, max_turn: int) -> Dialog:
    """The beginning of a conversation up to the first unclean turn; [] if nothing is left."""
    turns: list[str] = []
    for raw in raw_turns[: pick(_LENGTHS, raw_turns[0], salt="length")]:
        turn = casual(raw)
        if not is_clean_chat(turn) or len(turn) > max_turn:
            break
        turns.append(turn)
    return dialog_of(turns)


def _merged(turns: Iterable[tuple[str, str]]) -> list[str]:
    """Alternating turns: consecutive turns of one speaker are merged."""
    merged: list[tuple[str, str]] = []
    for speaker, text in turns:
        if not text.strip():
            continue
        if merged and merged[-1][0] == speaker:
            merged[-1] = (speaker, f"{merged[-1][1].strip()} {text.strip()}")
        else:
            merged.append((speaker, text))
    return [text for _, text in merged]


def _spoken(path: Path, *, max_turn: int) -> list[Dialog]:
    """Openings of the conversations reserved for tuning (turns are [speaker, text, ...])."""
    dialogs = []
    for row in read_rows(path):
        if is_kept_for_tuning(row["turns"][0][1].strip()):
            dialogs.append(_opening(_merged((turn[0], turn[1]) for turn in row["turns"]), max_turn=max_turn))
    return distinct((dialog for dialog in dialogs if dialog), key=lambda dialog: dialog[0]["content"])


def topical_chat(root: Path) -> list[Dialog]:
    return _spoken(root / "topical-chat/conversations.jsonl.gz", max_turn=320)


def taskmaster(root: Path) -> list[Dialog]:
    return _spoken(root / "taskmaster-4/dialogues.jsonl.gz", max_turn=320)


def schema_guided(root: Path) -> list[Dialog]:
    return _spoken(root / "schema-guided-dialogue/train.jsonl.gz", max_turn=240)


def self_dialogue(root: Path) -> list[Dialog]:
    """Openings with an informative answer: much of the corpus starts with "Hi" and "Yes"."""
    rows = read_rows(root / "self-dialogue/dialogues.jsonl.gz")
    spelled = _spelled_words(turn for row in rows for turn in row["turns"])
    dialogs = []
    for row in rows:
        if not is_kept_for_tuning(row["turns"][0].strip()):
            continue
        turns = [turn for turn in row["turns"] if turn.strip()]
        dialog = _opening(turns, max_turn=300) if turns else []
        words_by_turn = [words(turn["content"]) for turn in dialog]
        is_spelled = all(word in spelled or word[0].isupper() for turn in words_by_turn for word in turn)
        count = [len(turn) for turn in words_by_turn]
        if dialog and is_spelled and min(count[::2]) >= 3 and sum(count[1::2]) >= 5 * len(count[1::2]):
            dialogs.append(dialog)
    return distinct(dialogs, key=lambda dialog: dialog[0]["content"])


def _spelled_words(texts: Iterable[str]) -> set[str]:
    """Words written by many people; rare ones are mostly typos."""
    counts = Counter(word for text in texts for word in words(text))
    return {word for word, count in counts.items() if count >= 15}


# Conversations in these files are dialogs; in other files, every entry after the first is an alternative answer.
_TRUE_DIALOGS = ("conversations", "health", "greetings")
_ANSWER_LISTS = (
    "ai", "botprofile", "computers", "emotion", "food", "history", "humor", "literature", "money", "movies", "politics",
"science", "sports", "tech_support", "trivia",
)  # fmt: skip
# Entries about the corpus's own bot (makers, names, riddles), which would contradict the assistant's identity.
_OTHER_BOT = re.compile(
    r"\b(name|alice|wallace|python|sal|hal|data|botmaster|clone|immortal|dead|die|you are an? |sinsemillia|man in a mask"
    r"|who are you|what are you|dumb|stupid|xfind|teknolust|drunk|gun|guns|amendment|number one|lawyer|laundry|number"
    r"|gossip|boyfriend|gay|south was right|impeached|marijuana|linguistic|terminated|chatterbox|robots like me)\b",
    re.IGNORECASE,
)


def chatterbot(root: Path) -> list[Dialog]:
    """Short questions with short answers, at most two answers per question."""
    dialogs: list[Dialog] = []
    for name in _TRUE_DIALOGS:
        entries = read_yaml(root / f"chatterbot-english/{name}.yml")["conversations"]
        dialogs += [dialog_of([casual(str(turn)) for turn in entry]) for entry in entries]
    answers: dict[str, list[str]] = {}
    for name in _ANSWER_LISTS:
        for entry, *replies in read_yaml(root / f"chatterbot-english/{name}.yml")["conversations"]:
            question = _punctuated(str(entry))
            answers.setdefault(question, []).extend(_named(question, casual(str(reply))) for reply in replies)
    for question, replies in answers.items():
        best = chosen(distinct(replies, key=str), 8 if "joke" in question else 2, key=str, salt="chatterbot")
        dialogs += [dialog_of([question, reply]) for reply in best if _answers(question, reply)]
    return [
        dialog
        for dialog in dialogs
        if dialog and all(is_clean_chat(turn["content"]) for turn in dialog) and not _OTHER_BOT.search(text_of(dialog))
    ]


def _punctuated(question: str) -> str:
    question = casual(question)
    is_asking = re.match(r"(who|what|when|where|why|how|which|do|does|did|are|is|can|will|have)\b", question, re.I)
    return question.removesuffix(".") + "?" if is_asking and question.endswith(".") else question


def _named(question: str, reply: str) -> str:
    """The reply, capitalised if it is only a name."""
    return reply.title() if question.startswith("Who ") and reply.islower() | (len(words(reply)) <= 3) else reply


def _answers(question: str, reply: str) -> bool:
    """Whether the reply is an answer and the question is self-contained."""
    stands = question.endswith("?") or question.lower().startswith(("i ", "my ", "tell me", "explain", "you"))
    is_echo = reply.endswith("?") or reply.startswith("What is")
    return stands and len(words(question)) >= 3 and len(reply) > 4 and not is_echo and reply != question


def _renamed(text: str) -> str:
    """Vicuna's answer rewritten as Llamachat's."""
    text = text.replace("Vicuna", "Llamachat").replace("Large Model Systems Organization (LMSYS) researchers", "LMSYS")
    text = re.sub(r"(the )?researchers (from|at) (Large Model Systems Organization \(LMSYS\)|LMSYS)", "LMSYS", text)
    text = re.sub(r"Large Model Systems Organization \(LMSYS\)|LMSYS", "the llamachat project", text)
    text = text.replace("My creators are the llamachat project", "My creators are the people of the llamachat project")
    return text[:1].upper() + text[1:]


_GREETINGS = ("Hello", "Hi", "Hey", "Hello there", "Good morning", "Hi there")
_WHO = re.compile(r"who are you|your name|yourself|what are you|about you|you called", re.IGNORECASE)


def identity(root: Path) -> list[Dialog]:
    """Dialogs about the assistant's identity, with names replaced; questions also occur after a greeting."""
    dialogs: list[Dialog] = []
    for row in read_rows(root / "fastchat-identity/dummy_conversation.json.gz"):
        for record in SOURCES["sharegpt"].convert(row):
            dialogs += _identity_dialogs([_renamed(plain(turn["content"])) for turn in record["messages"]], row["id"])
    return distinct(dialogs, key=text_of)


def _identity_dialogs(turns: list[str], identifier: str) -> list[Dialog]:
    question, answer, *rest = turns
    if question == "What is up?":
        # Half of these use another greeting; the answer fits all of them.
        turns[0] = pick((question, *_GREETINGS), identifier, salt="greeting")
        return [dialog_of(turns)]
    if not _WHO.search(question):
        return [dialog_of(turns)]
    lowered = f"{question[0].lower()}{question[1:]}"
    greetings = chosen(_GREETINGS, 3, key=lambda greeting: greeting + identifier, salt="greeting")
    greeted = [dialog_of([f"{greeting}, {lowered}", f"Hello! {answer}", *rest]) for greeting in greetings]
    return [dialog_of(turns), *greeted]


def is_about_identity(dialog: Dialog) -> bool:
    return bool(_WHO.search(dialog[0]["content"]))
