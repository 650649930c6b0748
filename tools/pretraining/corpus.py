"""The training texts of the bundled tokenizer and base model, as one shuffled stream of documents.

Reads a folder of openly licensed data sets (one sub-folder each). Old novels are down-weighted; modern and simple prose
and dialogue are up-weighted. Data for tuning and evaluation is excluded: shared sets are split by the hash of a
conversation's first turn (`tools.split.is_kept_for_tuning`), and other tuning sets are not read here.
"""

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamachat.data.loading import fraction
from tools.split import is_kept_for_tuning

HELD_OUT = 0.01  # share of each source's documents that is held out
PASSAGE_CHARACTERS = 4000
SPEAKERS = (("User: ", "Assistant: "), ("A: ", "B: "), ("- ", "- "))


@dataclass(frozen=True, slots=True)
class Document:
    source: str
    key: str
    text: str
    is_end: bool = True  # False for a passage continued by the next one, which has BOS but no EOS

    @property
    def is_held_out(self) -> bool:
        return fraction(self.key, salt=f"held-out {self.source}") < HELD_OUT


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def passages(source: str, name: str, text: str) -> Iterator[Document]:
    """Split a long text at paragraph ends into passages of about `PASSAGE_CHARACTERS` characters."""
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
    block: list[str] = []
    size, index = 0, 0
    for position, paragraph in enumerate(paragraphs):
        block.append(paragraph)
        size += len(paragraph)
        is_last = position == len(paragraphs) - 1
        if size >= PASSAGE_CHARACTERS or is_last:
            yield Document(source, f"{name} {index}", "\n\n".join(block), is_end=is_last)
            block, size, index = [], 0, index + 1


def dialogue(source: str, key: str, turns: list[tuple[bool, str]]) -> Document:
    """A dialogue of (is the first speaker, text) turns, written in one of a few plain styles selected by the key."""
    first, second = SPEAKERS[int(fraction(key, salt="style") * len(SPEAKERS))]
    lines = [(first if is_first else second) + text.strip() for is_first, text in turns if text.strip()]
    return Document(source, key, "\n".join(lines))


def _books(folder: Path, source: str) -> Iterator[Document]:
    for path in sorted(folder.glob("*.txt.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
        yield from passages(source, path.name, text)


def _articles(folder: Path, source: str) -> Iterator[Document]:
    for path in sorted(folder.glob("*.txt.gz")):
        for number, line in enumerate(gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")):
            if len(line) > 200:
                yield from passages(source, f"{path.name} {number}", re.sub(r"\n", "\n\n", line))


def _tiny_stories(folder: Path, source: str) -> Iterator[Document]:
    for path in sorted(folder.glob("*.txt.gz")):
        text = gzip.decompress(path.read_bytes()).decode("utf-8")
        for number, story in enumerate(re.split(r"<\|endoftext\|>|\n\n(?=One day|Once upon|Once,)", text)):
            if len(story.strip()) > 100:
                yield Document(source, f"{number} {story[:40]}", story.strip())


def _json_texts(folder: Path, source: str) -> Iterator[Document]:
    for path in sorted(folder.glob("*.jsonl.gz")):
        for number, row in enumerate(_rows(path)):
            title = row.get("title")
            text = f"{title}\n\n{row['text']}" if title else row["text"]
            yield from passages(source, f"{path.name} {number}", re.sub(r"\n+", "\n\n", text.strip()))


def _self_dialogues(folder: Path, source: str) -> Iterator[Document]:
    for row in _rows(folder / "dialogues.jsonl.gz"):
        turns = row["turns"]
        if turns and not is_kept_for_tuning(turns[0]):
            yield dialogue(source, turns[0], [(i % 2 == 0, text) for i, text in enumerate(turns)])


def _speaker_dialogues(folder: Path, source: str) -> Iterator[Document]:
    for path in sorted(folder.glob("*.jsonl.gz")):
        for row in _rows(path):
            turns = row["turns"]
            if turns and not is_kept_for_tuning(turns[0][1]):
                opener = turns[0][0]
                yield dialogue(source, f"{row['id']} {turns[0][1]}", [(t[0] == opener, t[1]) for t in turns])


def _fairy_tales(folder: Path, source: str) -> Iterator[Document]:
    questions: dict[str, list[tuple[str, str]]] = {}
    for row in _rows(folder / "questions.jsonl.gz"):
        questions.setdefault(row["name"], []).append((row["question"], row["answer1"]))
    for row in _rows(folder / "stories.jsonl.gz"):
        if is_kept_for_tuning(row["name"]):
            continue
        yield from passages(source, row["name"], "\n\n".join(row["sections"]))
        pairs = [f"Question: {question}\nAnswer: {answer}" for question, answer in questions.get(row["name"], [])]
        for start in range(0, len(pairs), 12):
            yield Document(source, f"{row['name']} questions {start}", "\n".join(pairs[start : start + 12]))


def _word_problems(folder: Path, source: str) -> Iterator[Document]:
    for row in _rows(folder / "train.jsonl.gz"):
        if not is_kept_for_tuning(row["question"]):
            answer = re.sub(r"<<.*?>>", "", row["answer"]).replace("####", "The answer is")
            yield Document(source, row["question"], f"Question: {row['question']}\nAnswer: {answer}.")


@dataclass(frozen=True, slots=True)
class Source:
    name: str
    read: Callable[[Path, str], Iterator[Document]]
    weight: float  # how often each document is seen in one pass over the mix


SOURCES = (
    Source("standard-ebooks", _books, 1.0),
    Source("eltec-eng", _books, 0.12),
    Source("openstax", _books, 0.8),
    Source("self-dialogue", _self_dialogues, 1.6),
    Source("topical-chat", _speaker_dialogues, 2.0),
    Source("taskmaster-4", _speaker_dialogues, 1.5),
    Source("schema-guided-dialogue", _speaker_dialogues, 0.5),
    Source("onestopenglish", _json_texts, 1.6),
    Source("wikipedia-sample", _articles, 1.6),
    Source("pratham-books-en", _json_texts, 3.0),
    Source("african-storybook-en", _json_texts, 3.0),
    Source("tinystories-sample", _tiny_stories, 4.0),
    Source("fairytaleqa", _fairy_tales, 2.0),
    Source("gsm8k", _word_problems, 0.8),
    Source("tinyshakespeare", _books, 0.3),
)


def read_documents(folder: Path) -> Iterator[Document]:
    """Every document of every source once, in a fixed order."""
    for source in SOURCES:
        yield from source.read(folder / source.name, source.name)


def training_stream(documents: list[Document], *, seed: int) -> list[Document]:
    """Documents repeated by their source's weight and shuffled; fractional repeats are selected by hash."""
    weights = {source.name: source.weight for source in SOURCES}
    stream: list[Document] = []
    for document in documents:
        weight = weights[document.source]
        extra = fraction(document.key, salt=f"repeat {document.source}") < weight % 1.0
        stream.extend([document] * (int(weight) + extra))
    random.Random(seed).shuffle(stream)
    return stream
