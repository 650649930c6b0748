"""`tokenizer.model` for a base that was published with `tokenizer.json` alone.

llama.cpp's converter reads pieces and scores from that file; without it, it gives every piece the same score, and text
comes apart into other tokens. A piece's score is the rank of the first merge that makes it, which is how SentencePiece
orders its joins. What was made is held against the tokenizer on the texts of the proof.
"""

import json
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

from llamachat.chat_format import ChatFormat, load_chat_format
from llamachat.chat_format.proof import proof_prompts
from llamachat.chat_format.tokenizer import BOS_ID, EOS_ID, UNK_ID, SentencePieceBackend, Tokenizer
from llamachat.errors import TokenizerError


def sentencepiece_model(chat_format: ChatFormat, tokenizer_json: str) -> bytes:
    """The serialized model that gives the ids of `chat_format`, which was read from `tokenizer_json`."""
    model = _model(json.loads(tokenizer_json)["model"])
    made = load_chat_format(chat_format.name, Tokenizer(SentencePieceBackend(model)))
    prompts = proof_prompts(chat_format)
    wrong = sum(made.encode_prompt(messages) != chat_format.encode_prompt(messages) for messages in prompts)
    if wrong:
        raise TokenizerError(
            f"tokenizer.json: a SentencePiece model made of it gives other ids in {wrong} of {len(prompts)} texts. "
            "llama.cpp reads such a model, and would feed the policy other tokens than those it learnt. Put the "
            "tokenizer.model of the original base beside tokenizer.json in the artifact, and export again."
        )
    return model


def _model(bpe: Mapping[str, Any]) -> bytes:
    pieces = sorted(bpe["vocab"], key=bpe["vocab"].get)
    scores = _scores(bpe["merges"])
    proto: Any = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    kinds = proto.SentencePiece
    for token, piece in enumerate(pieces):
        kind = kinds.BYTE if _is_byte(piece) else kinds.NORMAL
        kind = {UNK_ID: kinds.UNKNOWN, BOS_ID: kinds.CONTROL, EOS_ID: kinds.CONTROL}.get(token, kind)
        proto.pieces.add(
            piece=piece, score=scores.get(piece, -len(scores) - 1.0 if kind == kinds.NORMAL else 0.0), type=kind
        )
    proto.trainer_spec.model_type = proto.trainer_spec.BPE
    proto.trainer_spec.vocab_size = len(pieces)
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = UNK_ID, BOS_ID, EOS_ID
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return proto.SerializeToString()


def _scores(merges: Sequence[str | Sequence[str]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        piece = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        found.setdefault(piece, -float(rank))
    return found


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
