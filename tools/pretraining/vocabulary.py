"""A SentencePiece BPE model with the options of Llama 2's tokenizer (byte fallback, digits split, identity normaliser)."""

import string
from collections.abc import Iterable
from pathlib import Path


def train_vocabulary(texts: Iterable[str], folder: Path, *, pieces: int) -> Path:
    """Write `folder/tokenizer.model` with `<unk>` 0, `<s>` 1, `</s>` 2, then 256 byte pieces, then merges by rank."""
    import sentencepiece

    lines = (line for text in texts for line in text.split("\n") if line.strip())
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]  # the wheel ships no stubs
        sentence_iterator=lines,
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        split_digits=True,
        character_coverage=0.9998,
        required_chars="".join(sorted(set(string.printable) - set(string.whitespace))),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=16384,
        num_threads=2,
        minloglevel=1,
    )
    (folder / "tokenizer.vocab").unlink()
    return folder / "tokenizer.model"
