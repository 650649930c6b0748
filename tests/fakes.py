"""Small stand-ins that the tests share: each is the real thing at toy size, or a second implementation of it."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llamachat.chat_format.proof import PLAIN_DIALOGS

_LINES = (
    "What is the capital of France? The capital of France is Paris.",
    "Hello, who are you? I am a small model, and I like to talk about the weather.",
    "[INST] Be brief. [/INST] I will. [INST] Thanks! [/INST] You are welcome.",
    "<<SYS>> Always answer in one sentence. <</SYS>>",
    "def f(x):    return x    if x > 10 else    None;  a = [1, 2, 34, 567]",
    "the cat sat on the mat, then the other cat sat on the other mat; that is that.",
    "aaaaaaaa abababab ======== -------- ........",
    "na\u00efve caf\u00e9 \u2013 \u201cquotes\u201d",
)


def train_sentencepiece(lines: Sequence[str] = _LINES, **options: Any) -> bytes:
    """A tokenizer with the options of the bundled one (those of Llama's), small; `options` replaces some of them."""
    model = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "normalization_rule_name": "identity",
        "character_coverage": 1.0,
        "unk_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "pad_id": -1,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]  # the wheel ships no stubs
        sentence_iterator=iter(list(lines) * 4), model_writer=model, **(settings | options)
    )
    return model.getvalue()


def reference_dialog(model: bytes, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and answer mask by Meta's `chat_completion`, on SentencePiece alone: slow, plain, and no code of ours."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    turns = [dict(message) for message in messages]
    if turns[0]["role"] == "system":
        merged = "<<SYS>>\n" + turns[0]["content"] + "\n<</SYS>>\n\n" + turns[1]["content"]
        turns = [{"role": turns[1]["role"], "content": merged}, *turns[2:]]
    ids: list[int] = []
    mask: list[int] = []
    for question, answer in zip(turns[::2], turns[1::2], strict=False):
        prompt = processor.encode(f"[INST] {question['content'].strip()} [/INST]")
        pair = processor.encode(f"[INST] {question['content'].strip()} [/INST] {answer['content'].strip()} ")
        ids += [1, *pair, 2]
        mask += [0] * (1 + len(prompt)) + [1] * (len(pair) - len(prompt) + 1)
    if turns[-1]["role"] == "user":
        prompt = processor.encode(f"[INST] {turns[-1]['content'].strip()} [/INST]")
        ids += [1, *prompt]
        mask += [0] * (1 + len(prompt))
    return ids, mask


def write_byte_level(
    folder: Path, *, unknown: str = "<|other|>", bos: str = "<|begin|>", eos: str = "<|end|>", trim: bool = False
) -> Path:
    """A base with GPT-2's kind of BPE, as SmolLM2's is, in the files of transformers."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim)
    special = list(dict.fromkeys([unknown, bos, eos]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([m.content for dialog in PLAIN_DIALOGS for m in dialog], trainer)
    names = {"bos_token": bos, "eos_token": {"content": eos}, "pad_token": eos, "unk_token": unknown}
    (folder / "tokenizer.json").write_text(bpe.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder
