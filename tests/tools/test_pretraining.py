"""How the bundled base is made: documents and their weights, what is kept out, the stream, training, resuming, bits."""

import gzip
import hashlib
import json
import math
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llamachat.errors import ConfigError, DataError
from tools.pretraining.command import read_config
from tools.pretraining.command import run as pretrain
from tools.pretraining.config import Config
from tools.pretraining.corpus import SOURCES, Document, dialogue, passages, read_documents, training_stream
from tools.pretraining.evaluation import SourceBits, bits_per_byte, mix
from tools.pretraining.model import new_model, token_losses
from tools.pretraining.training import prepare, rate_factor, train

WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "and", "said", "that", "it", "would"),
    *("rain", "again", "over", "every", "little", "green", "hill", "by", "the", "quiet", "sea"),
)
TINY = Config(
    pieces=512, hidden_size=64, intermediate_size=64, layers=1, heads=2, key_value_heads=1, context=64,
    tokens=64 * 4 * 40, rows_per_step=4, rows_per_microbatch=2, save_seconds=1e-9,
)  # fmt: skip


def prose(seed: int, count: int) -> str:
    """Sentences with a rule in them: each word is followed by one of two words."""
    place, words = seed, []
    for step in range(count):
        place = (3 * place + 1 + (seed + step) % 2) % len(WORDS)
        words.append(WORDS[place])
    return " ".join(words) + "."


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a little of every source, in the form that each has."""
    folder = tmp_path_factory.mktemp("texts")
    book = "\n\n".join(prose(n, 120) for n in range(30))
    for name in ("standard-ebooks", "eltec-eng", "openstax", "tinyshakespeare"):
        write_text(folder / name / "one.txt.gz", book)
    write_text(folder / "wikipedia-sample" / "a.txt.gz", "\n".join(prose(n, 60) for n in range(20)))
    stories = "<|endoftext|>".join(f"Once upon a time {prose(n, 40)}" for n in range(60))
    write_text(folder / "tinystories-sample" / "a.txt.gz", stories)
    for name in ("onestopenglish", "pratham-books-en", "african-storybook-en"):
        write_lines(folder / name / "a.jsonl.gz", [{"title": f"T {n}", "text": prose(n, 80)} for n in range(20)])
    turns = [[f"Hello {n}, {prose(n, 8)}", prose(n + 1, 9), prose(n + 2, 7)] for n in range(300)]
    write_lines(folder / "self-dialogue" / "dialogues.jsonl.gz", [{"turns": each} for each in turns])
    spoken = [{"id": str(n), "turns": [["x", each[0]], ["y", each[1]]]} for n, each in enumerate(turns[:50])]
    for name in ("topical-chat", "taskmaster-4", "schema-guided-dialogue"):
        write_lines(folder / name / "a.jsonl.gz", spoken)
    tales = [{"name": f"tale {n}", "sections": [prose(n, 60), prose(n + 1, 60)]} for n in range(20)]
    write_lines(folder / "fairytaleqa" / "stories.jsonl.gz", tales)
    questions = [{"name": f"tale {n % 20}", "question": f"Who sat {n}?", "answer1": "the cat"} for n in range(60)]
    write_lines(folder / "fairytaleqa" / "questions.jsonl.gz", questions)
    sums = [
        {"question": f"What is {n} and {n}?", "answer": f"It is <<{n}+{n}={2 * n}>>{2 * n}\n#### {2 * n}"}
        for n in range(40)
    ]
    write_lines(folder / "gsm8k" / "train.jsonl.gz", sums)
    return folder


@pytest.fixture(scope="module")
def documents(texts: Path) -> list[Document]:
    return list(read_documents(texts))


@pytest.fixture(scope="module")
def prepared(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("prepared")
    prepare(TINY, texts, run)
    return run


def hashed(text: str, salt: str) -> float:
    return int(hashlib.sha256(f"{salt}\n{text.strip()}".encode()).hexdigest()[:12], 16) / 16**12


# --- documents


def test_passages_are_cut_at_paragraphs_and_only_the_last_one_ends():
    paragraphs = [letter * 1500 for letter in "abcdefg"]
    pieces = list(passages("books", "novel", "\n\n".join(paragraphs) + "\n\n \n"))
    assert (
        [document.text for document in pieces]
        == [
            "\n\n".join(paragraphs[0:3]),  # 4,500 characters are the first sum over 4,000
            "\n\n".join(paragraphs[3:6]),
            "g" * 1500,
        ]
    )
    assert [document.is_end for document in pieces] == [False, False, True]
    assert [document.key for document in pieces] == ["novel 0", "novel 1", "novel 2"]


def test_a_dialogue_names_its_speakers_in_one_style():
    turns = [(True, " Hello. "), (False, "Hi!"), (True, "  "), (True, "Bye.")]
    styles = {dialogue("talk", str(key), turns).text for key in range(40)}
    assert styles == {
        "User: Hello.\nAssistant: Hi!\nUser: Bye.",
        "A: Hello.\nB: Hi!\nA: Bye.",
        "- Hello.\n- Hi!\n- Bye.",
    }


def test_every_source_is_read_and_marks_of_its_form_are_gone(documents: list[Document]):
    assert {document.source for document in documents} == {source.name for source in SOURCES}
    sums = [document.text for document in documents if document.source == "gsm8k"]
    assert "Question: What is 5 and 5?\nAnswer: It is 10\nThe answer is 10." in sums
    assert not any("<<" in text or "<|" in text for text in (document.text for document in documents))


def test_conversations_that_serve_tuning_are_kept_out(texts: Path, documents: list[Document]):
    lines = gzip.decompress((texts / "self-dialogue" / "dialogues.jsonl.gz").read_bytes()).splitlines()
    openings = [json.loads(line)["turns"][0] for line in lines]
    expected = {text for text in openings if hashed(text, "pretraining") >= 0.25}
    assert {document.key for document in documents if document.source == "self-dialogue"} == expected
    assert 0.15 < 1 - len(expected) / len(openings) < 0.35


def test_what_is_held_out_follows_from_the_key_and_is_never_trained_on(documents: list[Document], prepared: Path):
    held_out = [d for d in documents if hashed(d.key, f"held-out {d.source}") < 0.01]
    assert held_out == [document for document in documents if document.is_held_out]
    kept = json.loads((prepared / "held_out.json").read_text())
    assert Counter(text for texts in kept.values() for text in texts) == Counter(d.text for d in held_out)
    encoder: Any = SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))
    stream = np.load(prepared / "stream.npy").tolist()
    pieces = Counter(encoder.decode(part) for part in split_at(stream, 1))
    weights = {source.name: source.weight for source in SOURCES}
    trained = [document for document in documents if document not in held_out]
    is_drawn = [weights[d.source] >= 1 or hashed(d.key, f"repeat {d.source}") < weights[d.source] for d in trained]
    assert pieces.keys() == {d.text for d, is_in in zip(trained, is_drawn, strict=True) if is_in}


def split_at(stream: list[int], bos: int) -> list[list[int]]:
    """The documents of a stream, without BOS and EOS."""
    parts: list[list[int]] = []
    for token in stream:
        if token == bos:
            parts.append([])
        elif token != 2:
            parts[-1].append(token)
    return parts


def test_the_stream_carries_bos_before_each_document_and_eos_after_whole_ones(
    documents: list[Document], prepared: Path
):
    encoder: Any = SentencePieceProcessor(model_file=str(prepared / "tokenizer.model"))
    stream = np.load(prepared / "stream.npy")
    ends = {document.text: document.is_end for document in documents}
    starts = np.flatnonzero(stream == 1)
    assert starts[0] == 0
    for start, end in pairwise(starts.tolist()):
        part = stream[start + 1 : end].tolist()
        assert (part[-1] == 2) == ends[encoder.decode([token for token in part if token != 2])]
    assert len(stream) >= TINY.tokens + TINY.context * TINY.rows_per_step


def test_weights_repeat_documents_and_draw_the_fraction_by_hash():
    pool = [Document("eltec-eng", f"novel {n}", f"text {n}") for n in range(4000)]
    pool += [Document("topical-chat", f"talk {n}", f"talk {n}") for n in range(10)]
    pool += [Document("self-dialogue", f"talk {n}", f"other {n}") for n in range(4000)]
    seen = Counter(document.text for document in training_stream(pool, seed=0))
    assert all(seen[f"talk {n}"] == 2 for n in range(10))  # weight 2.0
    assert {seen[f"other {n}"] for n in range(4000)} == {1, 2}  # weight 1.6
    assert sum(seen[f"other {n}"] for n in range(4000)) / 4000 == pytest.approx(1.6, abs=0.03)
    assert {n for n in range(4000) if seen[f"text {n}"]} == {
        n for n in range(4000) if hashed(f"novel {n}", "repeat eltec-eng") < 0.12
    }
    again = training_stream(pool, seed=0)
    assert again == training_stream(pool, seed=0) != training_stream(pool, seed=1)


# --- training


def test_the_rate_rises_stays_and_falls_by_hand():
    config = Config(warmup_fraction=0.1, decay_fraction=0.5)  # of 20 steps: 2 rising, the last 10 falling
    got = [rate_factor(step, 20, config) for step in (0, 1, 5, 10, 15, 19)]
    assert got == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.02 + 0.98 * 0.5, 0.02 + 0.98 * 0.1])


def test_token_losses_are_those_of_transformers_own_loss():
    model: Any = new_model(TINY).float()
    ids = torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(0))
    assert float(token_losses(model, ids).mean()) == pytest.approx(float(model(ids, labels=ids).loss), abs=1e-5)


def test_it_learns_and_a_stopped_run_ends_with_the_same_bits(prepared: Path, tmp_path: Path):
    runs = []
    for name in ("whole", "stopped"):
        run = tmp_path / name
        run.mkdir()
        (run / "stream.npy").symlink_to(prepared / "stream.npy")
        runs.append(run)
    whole = list(train(TINY, runs[0]))
    losses = [figures["loss"] for figures in whole]
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)
    assert sum(losses[-5:]) / 5 < 4.0
    for count in (7, 20):  # stopped after this many steps
        done = list(islice(train(TINY, runs[1]), count))
    resumed = list(train(TINY, runs[1]))
    assert resumed[0]["step"] == done[-1]["step"]  # its checkpoint was not written any more
    assert [figures["loss"] for figures in resumed] == losses[int(resumed[0]["step"]) - 1 :]
    states = [torch.load(run / "checkpoint.pt", weights_only=True) for run in runs]
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"])
    assert states[0]["step"] == states[1]["step"] == 40


# --- bits per byte


class Unigram(nn.Module):
    """The same distribution at every position, whatever came before."""

    def __init__(self, logprobs_V: Tensor) -> None:
        super().__init__()
        self.logprobs_V = logprobs_V

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logprobs_V.expand(*input_ids.shape, -1))


def write_held_out(run: Path, sentencepiece_model: bytes, held_out: dict[str, list[str]]) -> SentencePieceProcessor:
    (run / "tokenizer.model").write_bytes(sentencepiece_model)
    (run / "held_out.json").write_text(json.dumps(held_out))
    (run / "shares.json").write_text(json.dumps(dict.fromkeys(held_out, 0.5)))
    return SentencePieceProcessor(model_proto=sentencepiece_model)


@pytest.mark.parametrize("context", [16, 17, 4096])
def test_bits_per_byte_by_hand(context: int, tiny_sentencepiece: bytes, tmp_path: Path):
    texts = ["the cat sat on the mat " * 20, "na\u00efve"]
    encoder: Any = write_held_out(tmp_path, tiny_sentencepiece, {"gsm8k": texts, "openstax": texts[:1]})
    ids = [encoder.encode(text) for text in texts]
    uniform = Unigram(torch.zeros(420))
    report = bits_per_byte(uniform, tmp_path, context=context)
    # Each token costs log2(420) bits; "naive" with its two dots has 6 bytes in 5 characters.
    expected = len(ids[0] + ids[1]) * math.log2(420) / (len(texts[0]) + 6)
    assert report["gsm8k"].bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert report["gsm8k"].tokens == len(ids[0] + ids[1])
    logprobs = torch.randn(420, generator=torch.Generator().manual_seed(0)).log_softmax(0)
    bits = -sum(float(logprobs[token]) for token in ids[0]) / math.log(2)
    result = bits_per_byte(Unigram(logprobs), tmp_path, context=context)["openstax"]
    assert result.bits_per_byte == pytest.approx(bits / len(texts[0]), rel=1e-5)


def test_the_mix_is_weighted_by_the_share_of_training():
    report = {"gsm8k": SourceBits(1.0, 10, 0.1), "openstax": SourceBits(2.0, 1000, 0.3)}
    assert mix(report) == pytest.approx((0.1 * 1.0 + 0.3 * 2.0) / 0.4)


# --- the command


def test_the_command_leaves_a_model_folder_with_its_card(texts: Path, tmp_path: Path):
    config = {**TINY.model_dump(), "tokens": 64 * 4 * 4}
    overrides = [f"{name}={value}" for name, value in config.items()]
    pretrain(overrides, texts, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16 and model.config.num_key_value_heads == 1
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    card = (tmp_path / "model" / "README.md").read_text()
    assert "held-out bits per byte" in card
    assert all(f"| {source} |" in card for source in json.loads((tmp_path / "held_out.json").read_text()))
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
    stamp = (tmp_path / "model").stat().st_mtime_ns
    pretrain(overrides, texts, tmp_path)  # done already
    assert (tmp_path / "model").stat().st_mtime_ns == stamp


def test_a_missing_source_is_reported(tmp_path: Path):
    (tmp_path / "gsm8k").mkdir()
    with pytest.raises(DataError, match=r"holds no folder standard-ebooks, .* Put the texts there"):
        pretrain([], tmp_path, tmp_path / "run")


def test_wrong_overrides_are_reported_together():
    with pytest.raises(ConfigError) as refused:
        read_config(["layer=3", "heads=0"])
    assert "layer" in str(refused.value) and "Did you mean 'layers'?" in str(refused.value)
    assert "heads" in str(refused.value)
