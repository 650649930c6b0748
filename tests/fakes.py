"""Small stand-ins that the tests share: each is the real thing at toy size, or a second implementation of it."""

import io
from collections.abc import Sequence
from typing import Any

import sentencepiece

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
