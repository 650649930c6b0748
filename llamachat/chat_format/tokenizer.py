"""Conversion between text and token ids, and the tokenizer files of an artifact.

The base's SentencePiece model (`tokenizer.model`) computes the ids: Meta trained with it, and it keeps text that spells
`</s>` as text. A base with only a `tokenizer.json` is read by the `tokenizers` library with control tokens disabled in
text, and must pass the proof of `chat_format/proof.py` before training.
The BOS and EOS ids are read from the base's files; Llama 2 has `<unk>` 0, `<s>` 1 and `</s>` 2.
The merge order is a trap. SentencePiece merges the pair whose piece has the best score, the leftmost of equal scores
(Llama's runs of spaces all have -1e9); `tokenizers` merges by fixed rank. `_merges` converts scores to ranks. Ordering
by id, as common conversions do, breaks runs of spaces.
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
# Fills the rows of a batch, which are masked by length or isolated by positions, so any embedding row works.
FILLER_ID = 0
SPACE = "\u2581"

# Cache size for encoded texts: a dialog is measured, shortened and encoded, and pairs share their prompts.
REMEMBERED = 4096

BASES_THAT_WORK = (
    "Bases that work: Llama-2 7B, 13B and 70B, TinyLlama-1.1B, models derived from them that kept their tokenizer, "
    "and the bundled tiny base."
)


@dataclass(frozen=True, slots=True)
class ControlIds:
    """Ids that no text is encoded to: BOS, EOS, the pad and the tokenizer's other control tokens."""

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
    """Text <-> ids. No text is ever encoded to a control id.

    The pad is never EOS (Llama 2's is `<unk>`): a mask derived from padding would exclude the stop token.
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
        """The number of pieces; a model's embedding may have more rows."""
        return max(self.backend.vocab_size, self.bos_id + 1, self.eos_id + 1, self.pad_id + 1)

    @property
    def control_pieces(self) -> tuple[str, ...]:
        """The texts that spell a control token."""
        return tuple(self.pieces(sorted(self.control.every)))

    @property
    def sentencepiece_model(self) -> bytes | None:
        """The serialized SentencePiece model, if the base has one."""
        return self.backend.model if isinstance(self.backend, SentencePieceBackend) else None

    def encode(self, text: str) -> list[int]:
        """Encode the text without BOS and EOS."""
        return self.backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; BOS, EOS and the leading space that encoding adds are removed."""
        return self.backend.decode(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entry of each id, for display."""
        return [self.backend.piece(token) for token in ids]

    def text_of(self, token: int) -> str:
        """The text of one piece, if it consists of whole characters."""
        return self.backend.text_of(token)

    def fast(self) -> tokenizers.Tokenizer:
        """The equivalent `tokenizers.Tokenizer` for artifacts; unlike here, it parses `</s>` in a text as the token."""
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
        # A model may have more embedding rows than the tokenizer has pieces, and sample one of them.
        size = self.vocab_size
        return self._processor.decode([token if token < size else self._processor.unk_id() for token in ids])

    def piece(self, token: int) -> str:
        return self._processor.id_to_piece(token) if token < self.vocab_size else UNKNOWN

    def text_of(self, token: int) -> str:
        return self.piece(token).replace(SPACE, " ")

    def control_ids(self) -> ControlIds | None:
        """The control ids declared by the model; None if it has no BOS or no EOS."""
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
        self.is_byte_level = bool(_parts(content.get("decoder"), "ByteLevel"))  # pieces spell bytes, as in GPT-2
        self._tokenizer = tokenizer = self.fast()
        tokenizer.encode_special_tokens = True  # despite its name: spelled control tokens stay text
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
        """The control ids for tokens of these names (`bos_token`, ...); None without BOS or EOS."""
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
    """Load the tokenizer of a model folder, or a `tokenizer.model` or `tokenizer.json` file."""
    file = _tokenizer_file(Path(path))
    try:
        content = file.read_bytes()
        backend = FastBackend(content.decode()) if file.suffix == ".json" else SentencePieceBackend(content)
    except Exception as error:  # both libraries raise bare Exception or RuntimeError for a broken file
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
            f"{file}: does not name the tokens for the beginning and the end of a text (bos_token and eos_token in "
            f"tokenizer_config.json or special_tokens_map.json). The chat format puts a turn between the two. Name "
            f"them there, or use another base. {BASES_THAT_WORK}"
        )
    return Tokenizer(backend, control)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, chat_template: str) -> None:
    """Write files from which `AutoTokenizer.from_pretrained(folder)` gives our ids, and the chat template.

    `chat_format.proof.prove_written` compares them with the tokenizer.
    """
    control = tokenizer.control
    named = {"bos_token": control.bos, "eos_token": control.eos, "unk_token": control.unk}
    if control.pad in control.every:  # declaring a text piece as the pad would make it a control token
        named["pad_token"] = control.pad
    special = {name: tokenizer.pieces([token])[0] for name, token in named.items() if token is not None}
    # Not LlamaTokenizer: on loading, that class discards our merges and builds its own in another order.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special, "clean_up_tokenization_spaces": False}
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer.sentencepiece_model is not None:
        (folder / "tokenizer.model").write_bytes(tokenizer.sentencepiece_model)
    else:
        (folder / "tokenizer.model").unlink(missing_ok=True)  # another tokenizer's file would take precedence
    (folder / "tokenizer.json").write_text(tokenizer.fast().to_str(), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", {**config, "chat_template": chat_template})
    _write_json(folder / "special_tokens_map.json", special)
    ids = {"bos_token_id": control.bos, "eos_token_id": control.eos, "pad_token_id": control.pad}
    generation, model = folder / "generation_config.json", folder / "config.json"
    if generation.is_file():  # in a full model's folder: sets the stop ids for programs that read nothing else
        _write_json(generation, json.loads(generation.read_text(encoding="utf-8")) | ids)
    if control != LLAMA2_IDS and model.is_file():
        _write_json(model, json.loads(model.read_text(encoding="utf-8")) | ids)


def _special_names(folder: Path) -> dict[str, str]:
    """The texts of `bos_token` etc. according to the folder's files."""
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
    """The first candidate that is neither BOS nor EOS; rows are masked by length, so any other id works."""
    own = (token for token in candidates if token is not None and token >= 0 and token not in (bos, eos))
    return next(own, bos if bos != eos else int(eos == 0))


def _with_control_tokens(tokenizer_json: str, texts: Sequence[str | None]) -> str:
    """The tokenizer with these pieces as control tokens, and with offsets that include the space before a word.

    Some files list no control tokens. Without the spaces, transformers' answer mask would miss its first token.
    """
    content = json.loads(tokenizer_json)
    for part in _parts(content.get("post_processor"), "ByteLevel"):
        part["trim_offsets"] = False
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    known = [text for text in texts if text is not None and tokenizer.token_to_id(text) is not None]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in known])
    return tokenizer.to_str()


def _parts(content: Any, kind: str) -> list[dict[str, Any]]:
    """The parts of type `kind` in a component of a `tokenizer.json`, which may be a sequence."""
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
    """Build the BPE of a SentencePiece model; `special` are its unknown, BOS and EOS pieces."""
    unk, bos, _ = special
    tokenizer = tokenizers.Tokenizer(BPE(vocab, merges, unk_token=unk, fuse_unk=True, byte_fallback=True))
    # Prepended after each control token: the text after every `<s>` gets it, as each pair does in our encoding.
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
    """All merges of two pieces, in the order in which SentencePiece would choose them.

    SentencePiece takes the leftmost of equal scores, so a run of spaces grows from the left, one space at a time. With
    the longest piece first, extending the leftmost run outranks starting a new one.
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
