"""Text to token ids and back, and the tokenizer files that an artifact ships.

Ids come from the base's SentencePiece model (`tokenizer.model`) itself: it is what Meta trained with, and text that
spells `</s>` stays text in it. A base that has only a `tokenizer.json` is read through the `tokenizers` library, its
control tokens switched off for text, and has to pass the proof of `chat_format/proof.py` before it is trusted.
The order of merges is a trap: SentencePiece joins the pair whose piece has the best score, and among equal
scores (Llama's runs of spaces all have -1e9) the leftmost; `tokenizers` joins by a fixed rank of pairs. `_merges` turns
the one into the other; ordering by id, as common conversions do, breaks text where spaces run together.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers.models import BPE

from llamachat.errors import TokenizerError, first_line

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIAL_PIECES = ("<unk>", "<s>", "</s>")
SPACE = "\u2581"

BASES_THAT_WORK = (
    "Bases that work: Llama-2 7B, 13B and 70B, TinyLlama-1.1B, models derived from them that kept their tokenizer, "
    "and the bundled tiny base."
)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text <-> ids by Llama's rules. No text, whatever it spells, becomes one of the special ids.

    The pad is `<unk>`, never EOS: a mask that is read off padding would take the stop token with it.
    """

    backend: "SentencePieceBackend | FastBackend"
    unk_id: ClassVar[int] = UNK_ID
    bos_id: ClassVar[int] = BOS_ID
    eos_id: ClassVar[int] = EOS_ID
    pad_id: ClassVar[int] = UNK_ID

    @property
    def vocab_size(self) -> int:
        """Pieces of the tokenizer; a model's embedding may have more rows."""
        return self.backend.vocab_size

    @property
    def sentencepiece_model(self) -> bytes | None:
        """The serialized SentencePiece model, where the base has one."""
        return self.backend.model if isinstance(self.backend, SentencePieceBackend) else None

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone, without BOS and EOS."""
        return self.backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids: BOS and EOS leave nothing, and the one space that encoding puts before a text goes."""
        return self.backend.decode(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entry of each id, for people to look at."""
        return [self.backend.piece(token) for token in ids]

    def fast(self) -> tokenizers.Tokenizer:
        """The same for the `tokenizers` library, as an artifact ships it: there `</s>` in a text IS the token."""
        return self.backend.fast()


class SentencePieceBackend:
    """The base's own SentencePiece model."""

    __slots__ = ("_processor", "model")

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = SentencePieceProcessor(model_proto=model)

    def __reduce__(self) -> tuple[type["SentencePieceBackend"], tuple[bytes]]:
        return type(self), (self.model,)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more rows than the tokenizer has pieces, and sample one of them.
        size = self.vocab_size
        return self._processor.decode([token if token < size else UNK_ID for token in ids])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token) if token < self.vocab_size else SPECIAL_PIECES[UNK_ID]

    def fast(self) -> tokenizers.Tokenizer:
        processor = self._processor
        pieces = [processor.id_to_piece(token) for token in range(self.vocab_size)]
        scores = {
            piece: processor.get_score(token)
            for token, piece in enumerate(pieces)
            if not (processor.is_control(token) or processor.is_unknown(token) or processor.is_byte(token))
        }
        return _fast_tokenizer({piece: token for token, piece in enumerate(pieces)}, _merges(scores))


class FastBackend:
    """A `tokenizer.json`, for a base that ships no SentencePiece model."""

    __slots__ = ("_json", "_tokenizer")

    def __init__(self, tokenizer_json: str) -> None:
        self._json = tokenizer_json
        self._tokenizer = self.fast()
        self._tokenizer.encode_special_tokens = True  # in this library's words: spelled control tokens stay text

    def __reduce__(self) -> tuple[type["FastBackend"], tuple[str]]:
        return type(self), (self._json,)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or SPECIAL_PIECES[UNK_ID]

    def fast(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer.from_str(self._json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model folder, or of a `tokenizer.model` or `tokenizer.json` file."""
    file = _tokenizer_file(Path(path))
    try:
        content = file.read_bytes()
        if file.suffix == ".json":
            tokenizer = Tokenizer(FastBackend(content.decode()))
        else:
            tokenizer = Tokenizer(SentencePieceBackend(content))
    except Exception as error:  # both libraries raise bare Exception or RuntimeError on a broken file
        raise TokenizerError(
            f"{file}: cannot be read as a tokenizer ({first_line(error)}). It must be the file that the base model "
            "was published with. Copy or download it again."
        ) from error
    held = tuple(tokenizer.pieces([UNK_ID, BOS_ID, EOS_ID]))
    if held != SPECIAL_PIECES:
        raise TokenizerError(
            f"{file}: the first three ids are {', '.join(held)}. The chat format needs <unk> 0, <s> 1 and </s> 2, the "
            f"ids that Llama 2 was trained with. Take another base. {BASES_THAT_WORK}"
        )
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str) -> None:
    """Write the files with which `AutoTokenizer.from_pretrained(folder)` gives our ids, and the chat template.

    `chat_format.proof.prove_written` compares what was written with the tokenizer itself.
    """
    unk, bos, eos = SPECIAL_PIECES
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": unk}
    # Not LlamaTokenizer: that class throws our merges away on loading and builds its own, in another order.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.sentencepiece_model is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer.sentencepiece_model)
    else:
        (folder / "tokenizer.model").unlink(missing_ok=True)  # another tokenizer's would be read first
    (folder / "tokenizer.json").write_text(tokenizer.fast().to_str(), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", {**config, "chat_template": chat_template})
    _write_json(folder / "special_tokens_map.json", special)


def _tokenizer_file(path: Path) -> Path:
    candidates = [path / "tokenizer.model", path / "tokenizer.json"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    found = "has neither tokenizer.model nor tokenizer.json" if path.is_dir() else "does not exist"
    raise TokenizerError(
        f"{path}: {found}. A tokenizer is a model folder with one of these files, or such a file. Give the folder of "
        "the base model or of an artifact."
    )


def _fast_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    unk, bos, _ = SPECIAL_PIECES
    tokenizer = tokenizers.Tokenizer(BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    # Prepended to each stretch between control tokens: the text after every `<s>` gets it, as each pair does with us.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, BOS_ID)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in SPECIAL_PIECES])
    return tokenizer


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, in the order in which SentencePiece would choose.

    Among equal scores it takes the leftmost pair, so a run of spaces grows from the left by one space at a time; with
    the longest piece first, the pair that grows the leftmost run outranks the pairs that would start new ones.
    """
    merges: list[tuple[str, str]] = []
    for piece in sorted(scores, key=lambda piece: (-scores[piece], -len(piece))):
        for cut in range(len(piece) - 1, 0, -1):
            left, right = piece[:cut], piece[cut:]
            if left in scores and right in scores:
                merges.append((left, right))
    return merges


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
