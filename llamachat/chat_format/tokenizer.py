"""Text to token ids and back, and the tokenizer files that an artifact ships.

Ids come from the base's SentencePiece model (`tokenizer.model`) itself: it is what Meta trained with, and text that
spells `</s>` stays text in it. A base that has only a `tokenizer.json` is read through the `tokenizers` library, its
control tokens switched off for text, and has to pass the proof of `chat_format/proof.py` before it is trusted.
Which ids begin and end a sequence is read from the base's own files; Llama 2's are `<unk>` 0, `<s>` 1 and `</s>` 2.
The order of merges is a trap: SentencePiece joins the pair whose piece has the best score, and among equal
scores (Llama's runs of spaces all have -1e9) the leftmost; `tokenizers` joins by a fixed rank of pairs. `_merges` turns
the one into the other; ordering by id, as common conversions do, breaks text where spaces run together.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import tokenizers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers.models import BPE

from llamachat.errors import TokenizerError, first_line

SPECIAL_PIECES = ("<unk>", "<s>", "</s>")  # Llama 2's ids 0, 1 and 2
UNKNOWN = SPECIAL_PIECES[0]
# Fills the rows of a batch, which are masked by their lengths or isolated by positions: any row of an embedding will do.
FILLER_ID = 0
SPACE = "\u2581"

# Encoded texts that are remembered: a dialog is measured, shortened and encoded in turn, and pairs share their prompts.
REMEMBERED = 4096

BASES_THAT_WORK = (
    "Bases that work: Llama-2 7B, 13B and 70B, TinyLlama-1.1B, models derived from them that kept their tokenizer, "
    "and the bundled tiny base."
)


@dataclass(frozen=True, slots=True)
class ControlIds:
    """Ids that no text becomes: where a sequence begins and ends, what fills a row, and a tokenizer's other ones."""

    bos: int
    eos: int
    pad: int
    unk: int | None
    others: tuple[int, ...] = ()

    @property
    def every(self) -> frozenset[int]:
        named = {self.bos, self.eos, *self.others}
        return frozenset(named if self.unk is None else named | {self.unk})


LLAMA2_IDS = ControlIds(bos=1, eos=2, pad=0, unk=0)


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text <-> ids. No text, whatever it spells, becomes one of the control ids.

    The pad is never EOS (Llama 2's is `<unk>`): a mask that is read off padding would take the stop token with it.
    """

    backend: "SentencePieceBackend | FastBackend"
    control: ControlIds = LLAMA2_IDS

    @property
    def bos_id(self) -> int:
        return self.control.bos

    @property
    def eos_id(self) -> int:
        return self.control.eos

    @property
    def pad_id(self) -> int:
        return self.control.pad

    @property
    def vocab_size(self) -> int:
        """Pieces of the tokenizer; a model's embedding may have more rows."""
        return max(self.backend.vocab_size, self.bos_id + 1, self.eos_id + 1, self.pad_id + 1)

    @property
    def control_pieces(self) -> tuple[str, ...]:
        """The texts that spell a control token."""
        return tuple(self.pieces(sorted(self.control.every)))

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

    def text_of(self, token: int) -> str:
        """The text that one piece stands for, where it is whole characters."""
        return self.backend.text_of(token)

    def fast(self) -> tokenizers.Tokenizer:
        """The same for the `tokenizers` library, as an artifact ships it: there `</s>` in a text IS the token."""
        return self.backend.fast()


class SentencePieceBackend:
    """The base's own SentencePiece model."""

    __slots__ = ("_encode", "_processor", "model")

    def __init__(self, model: bytes) -> None:
        self.model = model
        self._processor = processor = SentencePieceProcessor(model_proto=model)
        self._encode = lru_cache(REMEMBERED)(lambda text: tuple(processor.encode(text)))

    def __reduce__(self) -> tuple[type["SentencePieceBackend"], tuple[bytes]]:
        return type(self), (self.model,)

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        # A model may have more rows than the tokenizer has pieces, and sample one of them.
        size = self.vocab_size
        return self._processor.decode([token if token < size else self._processor.unk_id() for token in ids])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token) if token < self.vocab_size else UNKNOWN

    def text_of(self, token: int) -> str:
        return self.piece(token).replace(SPACE, " ")

    def control_ids(self) -> ControlIds | None:
        """As the model declares them; None where it has no beginning or no end."""
        processor = self._processor
        bos, eos, unk = processor.bos_id(), processor.eos_id(), processor.unk_id()
        if min(bos, eos) < 0:
            return None
        others = tuple(token for token in range(self.vocab_size) if processor.is_control(token))
        return ControlIds(bos, eos, _pad_id((processor.pad_id(), unk, *others), bos=bos, eos=eos), unk, others)

    def fast(self) -> tokenizers.Tokenizer:
        processor = self._processor
        pieces = [processor.id_to_piece(token) for token in range(self.vocab_size)]
        scores = {
            piece: processor.get_score(token)
            for token, piece in enumerate(pieces)
            if not (processor.is_control(token) or processor.is_unknown(token) or processor.is_byte(token))
        }
        special = [pieces[token] for token in (processor.unk_id(), processor.bos_id(), processor.eos_id())]
        return _fast_tokenizer({piece: token for token, piece in enumerate(pieces)}, _merges(scores), special)


class FastBackend:
    """A `tokenizer.json`, for a base that ships no SentencePiece model."""

    __slots__ = ("_encode", "_json", "_tokenizer", "is_byte_level")

    def __init__(self, tokenizer_json: str) -> None:
        self._json = tokenizer_json
        content = json.loads(tokenizer_json)
        self.is_byte_level = bool(_parts(content.get("decoder"), "ByteLevel"))  # each piece spells bytes, as GPT-2's
        self._tokenizer = tokenizer = self.fast()
        tokenizer.encode_special_tokens = True  # in this library's words: spelled control tokens stay text
        self._encode = lru_cache(REMEMBERED)(lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids))

    def __reduce__(self) -> tuple[type["FastBackend"], tuple[str]]:
        return type(self), (self._json,)

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=False)

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or UNKNOWN

    def text_of(self, token: int) -> str:
        return self._tokenizer.decode([token]) if self.is_byte_level else self.piece(token).replace(SPACE, " ")

    def control_ids(self, names: Mapping[str, str]) -> ControlIds | None:
        """The ids of the tokens of these names (`bos_token`, ...); None without a beginning or an end."""
        ids = {name: self._tokenizer.token_to_id(text) for name, text in names.items()}
        bos, eos, unk = ids.get("bos_token"), ids.get("eos_token"), ids.get("unk_token")
        if bos is None or eos is None:
            return None
        added = self._tokenizer.get_added_tokens_decoder()
        others = tuple(sorted(token for token, entry in added.items() if entry.special))
        return ControlIds(bos, eos, _pad_id((ids.get("pad_token"), unk, *others), bos=bos, eos=eos), unk, others)

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
        backend = FastBackend(content.decode()) if file.suffix == ".json" else SentencePieceBackend(content)
    except Exception as error:  # both libraries raise bare Exception or RuntimeError on a broken file
        raise TokenizerError(
            f"{file}: cannot be read as a tokenizer ({first_line(error)}). It must be the file that the base model "
            "was published with. Copy or download it again."
        ) from error
    if tuple(backend.piece(token) for token in range(len(SPECIAL_PIECES))) == SPECIAL_PIECES:
        return Tokenizer(backend)
    if isinstance(backend, SentencePieceBackend):
        control = backend.control_ids()
    else:
        names = _special_names(file.parent)
        backend = FastBackend(_with_control_tokens(content.decode(), [names.get("bos_token"), names.get("eos_token")]))
        control = backend.control_ids(names)
    if control is None:
        raise TokenizerError(
            f"{file}: names no token that begins a text and one that ends it (bos_token and eos_token in "
            f"tokenizer_config.json or special_tokens_map.json). The chat format puts a turn between the two. Name "
            f"them there, or take another base. {BASES_THAT_WORK}"
        )
    return Tokenizer(backend, control)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str) -> None:
    """Write the files with which `AutoTokenizer.from_pretrained(folder)` gives our ids, and the chat template.

    `chat_format.proof.prove_written` compares what was written with the tokenizer itself.
    """
    control = tokenizer.control
    named = {"bos_token": control.bos, "eos_token": control.eos, "unk_token": control.unk}
    if control.pad in control.every:  # naming a piece of text as the pad would make that text a control token
        named["pad_token"] = control.pad
    special = {name: tokenizer.pieces([token])[0] for name, token in named.items() if token is not None}
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
    ids = {"bos_token_id": control.bos, "eos_token_id": control.eos, "pad_token_id": control.pad}
    generation, model = folder / "generation_config.json", folder / "config.json"
    if generation.is_file():  # of a whole model: what ends an answer in programs that ask nothing else
        _write_json(generation, json.loads(generation.read_text(encoding="utf-8")) | ids)
    if control != LLAMA2_IDS and model.is_file():
        _write_json(model, json.loads(model.read_text(encoding="utf-8")) | ids)


def _special_names(folder: Path) -> dict[str, str]:
    """The texts of `bos_token` and so on, as a folder's files name them."""
    names: dict[str, str] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
            entry = content.get(name) if isinstance(content, dict) else None
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str):
                names[name] = text
    return names


def _pad_id(candidates: Sequence[int | None], *, bos: int, eos: int) -> int:
    """The first of these ids that neither begins nor ends a text; rows are masked by lengths, so any other id will do."""
    own = (token for token in candidates if token is not None and token >= 0 and token not in (bos, eos))
    return next(own, bos if bos != eos else int(eos == 0))


def _with_control_tokens(tokenizer_json: str, texts: Sequence[str | None]) -> str:
    """The same tokenizer with these pieces as control tokens, and with offsets that count the space before a word.

    Some files list none; without the spaces, transformers' mask of an answer would miss its first token.
    """
    content = json.loads(tokenizer_json)
    for part in _parts(content.get("post_processor"), "ByteLevel"):
        part["trim_offsets"] = False
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    known = [text for text in texts if text is not None and tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in known])
    return tokenizer.to_str()


def _parts(content: Any, kind: str) -> list[dict[str, Any]]:
    """The parts of this type in a component of a `tokenizer.json`, which may be a sequence of some."""
    if not isinstance(content, dict):
        return []
    component = cast(dict[str, Any], content)
    parts = [component] if component.get("type") == kind else []
    for name in ("decoders", "processors"):
        parts += [nested for part in component.get(name) or [] for nested in _parts(part, kind)]
    return parts


def _tokenizer_file(path: Path) -> Path:
    candidates = [path / "tokenizer.model", path / "tokenizer.json"] if path.is_dir() else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    reason = "has neither tokenizer.model nor tokenizer.json" if path.is_dir() else "does not exist"
    raise TokenizerError(
        f"{path}: {reason}. A tokenizer is a model folder with one of these files, or such a file. Give the folder of "
        "the base model or of an artifact."
    )


def _fast_tokenizer(
    vocab: dict[str, int], merges: list[tuple[str, str]], special: Sequence[str]
) -> tokenizers.Tokenizer:
    """The BPE of a SentencePiece model; `special` are its unknown piece, BOS and EOS."""
    unk, bos, _ = special
    tokenizer = tokenizers.Tokenizer(BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    # Prepended to each stretch between control tokens: the text after every `<s>` gets it, as each pair does with us.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, vocab[bos])]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
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
