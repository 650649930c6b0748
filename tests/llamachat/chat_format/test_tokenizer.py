"""The tokenizer and the files it ships: equal to SentencePiece where it matters, refused where it is not."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer, LlamaConfig

from llamachat.chat_format import ChatFormat, TrainOn, load_chat_format
from llamachat.chat_format.dialog import Message
from llamachat.chat_format.proof import (
    CONTROL_DIALOGS,
    LLAMA2_DIGESTS,
    PLAIN_DIALOGS,
    ids_digest,
    load_proved_format,
    prove_tokenizer,
    prove_written,
    require_proof,
)
from llamachat.chat_format.tokenizer import (
    FastBackend,
    SentencePieceBackend,
    Tokenizer,
    load_tokenizer,
    write_tokenizer,
)
from llamachat.errors import TokenizerError
from tests.fakes import reference_dialog, train_sentencepiece, write_byte_level
from tests.llamachat.chat_format.test_chat_format import dialogs

CONTROL_WORDS = ("<s>", "</s>", "<unk>")
TEXTS = st.text(st.sampled_from([*"   \n\tab=-.the cat1\u2581\u00a0\u00e9\u0301\u65e5"]) | st.characters(codec="utf-8"))


def _format(model: bytes) -> ChatFormat:
    return load_chat_format("llama2", Tokenizer(SentencePieceBackend(model)))


def _proto(model: bytes) -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # generated code


def _with_llama_spaces(model: bytes) -> bytes:
    """The model with runs of up to nine spaces as its last pieces, all of the score that Llama's have."""
    proto = _proto(model)
    pieces = {piece.piece: piece for piece in proto.pieces}
    for length in (4, 8, 5, 3, 9, 6, 7, 2):
        run = "\u2581" * length
        piece = pieces[run] if run in pieces else proto.pieces.add(piece=run)
        piece.score = -1e9
    return proto.SerializeToString()


@pytest.fixture(scope="module", params=["trained", "llama_spaces"])
def model(request: pytest.FixtureRequest, tiny_sentencepiece: bytes) -> bytes:
    return tiny_sentencepiece if request.param == "trained" else _with_llama_spaces(tiny_sentencepiece)


@pytest.fixture(scope="module")
def shipped_folder(tmp_path_factory: pytest.TempPathFactory, model: bytes) -> Path:
    """What an artifact ships, beside the configuration of a Llama model, which must not change how it loads."""
    folder = tmp_path_factory.mktemp("artifact")
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    write_tokenizer(Tokenizer(SentencePieceBackend(model)), folder, _format(model).chat_template)
    return folder


@pytest.fixture(scope="module")
def shipped(shipped_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(shipped_folder), local_files_only=True)


def test_special_ids_are_llamas_and_the_pad_is_not_eos(tiny_tokenizer: Tokenizer) -> None:
    ids = (tiny_tokenizer.control.unk, tiny_tokenizer.bos_id, tiny_tokenizer.eos_id, tiny_tokenizer.pad_id)
    assert ids == (0, 1, 2, 0)
    assert tiny_tokenizer.pieces([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert tiny_tokenizer.vocab_size == 420


def test_an_id_beyond_the_vocabulary_decodes_as_unknown(tiny_tokenizer: Tokenizer) -> None:
    # Models are often padded to more rows than the tokenizer has pieces.
    assert tiny_tokenizer.decode([999]) == tiny_tokenizer.decode([0])
    assert tiny_tokenizer.pieces([999]) == ["<unk>"]


@settings(max_examples=200, deadline=None)
@given(messages=dialogs().filter(lambda messages: not any(word in str(messages) for word in CONTROL_WORDS)))
def test_the_shipped_tokenizer_gives_the_reference_ids_and_mask(
    model: bytes, shipped: Any, messages: list[dict[str, str]]
) -> None:
    got = shipped.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert (got["input_ids"], got["assistant_masks"]) == reference_dialog(model, messages)


@pytest.mark.parametrize("length", range(1, 40))
def test_runs_of_spaces_merge_as_sentencepiece_merges_them(model: bytes, shipped: Any, length: int) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for text in (f"a{' ' * length}return", f"x{' ' * length}\n{' ' * length}[ b", " " * length):
        assert shipped(text, add_special_tokens=False)["input_ids"] == processor.encode(text)


def test_the_shipped_mask_leaves_out_an_answer_marked_so(shipped: Any, model: bytes) -> None:
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    messages = [question, {**answer, "train": False}, question, {**answer, "train": True}]
    got = shipped.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = reference_dialog(model, messages)
    second = ids.index(1, 1)
    assert (got["input_ids"], got["assistant_masks"]) == (ids, [0] * second + mask[second:])


@pytest.mark.parametrize(
    "roles", [["system"], ["assistant"], ["user", "user"], ["user", "assistant", "assistant"], ["user", "system"]]
)
def test_the_template_refuses_wrong_roles(shipped: Any, roles: list[str]) -> None:
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(Exception, match=r"at least one user turn|Roles must be"):
        shipped.apply_chat_template(messages)


def test_the_shipped_special_tokens(shipped: Any) -> None:
    names = (shipped.unk_token_id, shipped.bos_token_id, shipped.eos_token_id, shipped.pad_token_id)
    assert names == (0, 1, 2, 0)
    assert shipped("Hi")["input_ids"][0] == 1
    assert shipped.decode(shipped("caf\u00e9  x\n")["input_ids"], skip_special_tokens=True) == "caf\u00e9  x\n"


def test_what_was_shipped_survives_save_pretrained(tmp_path: Path, shipped: Any, model: bytes) -> None:
    shipped.save_pretrained(str(tmp_path))
    again = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    messages = [{"role": "user", "content": "  if x:    return  None"}, {"role": "assistant", "content": "a  b\n\n c"}]
    got = again.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert (got["input_ids"], got["assistant_masks"]) == reference_dialog(model, messages)


def test_base_and_artifact_are_proved(shipped_folder: Path, model: bytes) -> None:
    chat_format, warning = load_proved_format(shipped_folder)
    assert chat_format.tokenizer.sentencepiece_model == model
    assert warning is None
    report = prove_written(shipped_folder, chat_format)
    assert report.is_proved
    assert report.cases >= 2 * len(PLAIN_DIALOGS)
    assert require_proof(report) is None


def test_merges_in_the_order_of_ids_are_caught(tmp_path: Path, tiny_sentencepiece: bytes) -> None:
    # The common conversion: right for words, wrong where Llama's runs of spaces meet one.
    chat_format = _format(_with_llama_spaces(tiny_sentencepiece))
    write_tokenizer(chat_format.tokenizer, tmp_path, chat_format.chat_template)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    merges = content["model"]["merges"]
    spaces = [pair for pair in merges if set("".join(pair)) == {"\u2581"}]
    content["model"]["merges"] = spaces + [pair for pair in merges if pair not in spaces]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    report = prove_written(tmp_path, chat_format)
    assert 0 < report.equal < report.cases
    with pytest.raises(
        TokenizerError, match=r"\d+ of \d+ cases .*the first wrong: at token \d+ the pieces are .*TinyLlama"
    ):
        require_proof(report)
    warning = require_proof(report, allow_unproved=True)
    assert warning is not None
    assert f"{report.equal} of {report.cases}" in warning


def test_a_mask_that_misses_the_space_before_an_answer_is_caught(tmp_path: Path, tiny_format: ChatFormat) -> None:
    mark = "{%- generation -%}{{- answer -}}"
    assert mark in tiny_format.chat_template
    template = tiny_format.chat_template.replace(mark, "{{- ' ' -}}{%- generation -%}{{- answer[1:] -}}")
    write_tokenizer(tiny_format.tokenizer, tmp_path, template)
    report = prove_written(tmp_path, tiny_format)
    assert report.first_difference is not None
    assert report.first_difference.startswith("the mask is wrong at token")


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"byte_fallback": False, "vocab_size": 150}, "text became a control token"),
        ({"normalization_rule_name": "nmt_nfkc"}, "decoding does not give the answer back"),
        ({"remove_extra_whitespaces": True}, "decoding does not give the answer back"),
        ({"add_dummy_prefix": False}, "the pieces are"),
    ],
)
def test_a_base_that_cannot_hold_the_format_is_refused(options: dict[str, Any], difference: str) -> None:
    report = prove_tokenizer(_format(train_sentencepiece(**options)), subject="base")
    assert report.first_difference is not None
    assert difference in report.first_difference
    with pytest.raises(TokenizerError, match=r"^base: .*base.allow_unproved_tokenizer: true"):
        require_proof(report)


def test_a_piece_that_joins_prompt_and_answer_is_refused(tiny_sentencepiece: bytes) -> None:
    proto = _proto(tiny_sentencepiece)
    proto.pieces.add(piece="]\u2581", score=1.0)
    report = prove_tokenizer(_format(proto.SerializeToString()), subject="base")
    assert report.first_difference is not None
    assert report.first_difference.startswith("a piece joins a prompt with its answer")


@pytest.fixture
def json_only(tmp_path: Path, tiny_format: ChatFormat) -> Path:
    """A base as some are published: `tokenizer.json` and no SentencePiece model."""
    folder = tmp_path / "json-only"
    write_tokenizer(tiny_format.tokenizer, folder, tiny_format.chat_template)
    (folder / "tokenizer.model").unlink()
    return folder


@settings(max_examples=100, deadline=None)
@given(text=TEXTS | st.sampled_from(CONTROL_WORDS).map(lambda word: f"a{word} b {word}"))
def test_a_base_without_a_sentencepiece_model_gives_the_same_ids(tiny_tokenizer: Tokenizer, text: str) -> None:
    assert Tokenizer(FastBackend(tiny_tokenizer.fast().to_str())).encode(text) == tiny_tokenizer.encode(text)


def test_a_base_without_a_sentencepiece_model_needs_the_ids_of_llama_2(
    json_only: Path, tmp_path: Path, tiny_sentencepiece: bytes
) -> None:
    chat_format = load_chat_format("llama2", load_tokenizer(json_only))
    assert chat_format.tokenizer.sentencepiece_model is None
    with pytest.raises(TokenizerError, match=r"json-only: 0 of 46 cases .*the ids are not those of Llama 2"):
        load_proved_format(json_only)
    assert load_proved_format(json_only, allow_unproved=True)[1] is not None
    digests = [
        ids_digest(reference_dialog(tiny_sentencepiece, [{"role": m.role, "content": m.content} for m in messages])[0])
        for messages in [*PLAIN_DIALOGS, *CONTROL_DIALOGS]
    ]
    assert prove_tokenizer(chat_format, subject="base", reference_digests=digests).is_proved
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "tokenizer.model").write_bytes(b"left over")
    write_tokenizer(chat_format.tokenizer, tmp_path / "artifact", chat_format.chat_template)
    assert prove_written(tmp_path / "artifact", chat_format).is_proved


def test_both_kinds_survive_pickling(tiny_tokenizer: Tokenizer, json_only: Path) -> None:
    for tokenizer in (tiny_tokenizer, load_tokenizer(json_only)):
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode("a </s> b  c") == tiny_tokenizer.encode("a </s> b  c")
        assert copy.decode(copy.encode("a </s> b  c")) == "a </s> b  c"
        assert copy.pieces([1, 999]) == ["<s>", "<unk>"]
        assert copy.vocab_size == 420


def test_tokenizers_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="nowhere: does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"has neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(b"{broken")
        with pytest.raises(TokenizerError, match=rf"{name}: cannot be read as a tokenizer .*download it again"):
            load_tokenizer(tmp_path)


@pytest.mark.parametrize("changes", [{}, {"trim": True}, {"eos": "<|begin|>"}])
def test_a_byte_level_tokenizer_is_let_in_with_its_own_ids(tmp_path: Path, changes: dict[str, Any]) -> None:
    write_byte_level(tmp_path, **changes)
    with pytest.raises(TokenizerError, match="not those of Llama 2"):
        load_proved_format(tmp_path)
    chat_format, warning = load_proved_format(tmp_path, allow_unproved=True)
    tokenizer = chat_format.tokenizer
    assert warning is not None
    assert "this tokenizer's own" in warning
    eos = 1 if "eos" in changes else 2
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, chat_format.stop_ids) == (1, eos, 0, (eos,))
    plain = tokenizers.Tokenizer.from_str((tmp_path / "tokenizer.json").read_text())
    messages = [Message("user", "caf\u00e9 12  x"), Message("assistant", "\u65e5 ok")]
    example = chat_format.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER)
    begun = plain.encode("[INST] caf\u00e9 12  x [/INST]").ids
    answer = plain.encode(" \u65e5 ok ").ids
    assert example.input_ids == (1, *begun, *answer, eos)
    assert example.loss_mask == (False,) * (1 + len(begun)) + (True,) * (len(answer) + 1)
    spelled = "<|begin|> <|end|><|other|>"
    assert not {0, 1, 2} & set(tokenizer.encode(spelled)) or "eos" in changes
    assert tokenizer.decode(tokenizer.encode(spelled)) == spelled
    written = tmp_path / "artifact"
    written.mkdir()
    (written / "generation_config.json").write_text("{}")
    write_tokenizer(tokenizer, written, chat_format.chat_template)
    assert prove_written(written, chat_format).is_proved
    shipped = AutoTokenizer.from_pretrained(str(written), local_files_only=True)
    assert (shipped.bos_token_id, shipped.eos_token_id, shipped.pad_token_id) == (1, eos, 0)
    assert json.loads((written / "generation_config.json").read_text())["eos_token_id"] == eos


def test_a_sentencepiece_model_with_other_control_ids(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(bos_id=2, eos_id=1))
    with pytest.raises(TokenizerError, match=r"other ids than those of Llama 2.*Llama-2 7B.*TinyLlama-1.1B"):
        load_proved_format(tmp_path)
    chat_format, _ = load_proved_format(tmp_path, allow_unproved=True)
    assert chat_format.tokenizer.encode("x") and chat_format.stop_ids == (1,)
    write_tokenizer(chat_format.tokenizer, tmp_path / "artifact", chat_format.chat_template)
    assert prove_written(tmp_path / "artifact", chat_format).is_proved


def test_a_tokenizer_without_beginning_and_end_is_refused(tmp_path: Path) -> None:
    (write_byte_level(tmp_path) / "tokenizer_config.json").unlink()
    with pytest.raises(TokenizerError, match="bos_token and eos_token in"):
        load_tokenizer(tmp_path)


def test_the_proof_set_stands_still() -> None:
    # LLAMA2_DIGESTS holds what Llama 2's tokenizer makes of these very dialogs: change them and the digests must be recomputed.
    content = json.dumps([[(m.role, m.content) for m in messages] for messages in [*PLAIN_DIALOGS, *CONTROL_DIALOGS]])
    assert len(LLAMA2_DIGESTS) == len(PLAIN_DIALOGS) + len(CONTROL_DIALOGS) == 46
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == "5c980a5252400a4f"
