"""The Llama 2 chat format against strings written by hand and against a second implementation of Meta's code."""

import gzip
import json
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from llamachat.chat_format import ChatFormat, TrainOn, load_chat_format
from llamachat.chat_format.dialog import DialogError, Message, as_dicts, parse_messages
from llamachat.chat_format.tokenizer import SPACE, Tokenizer
from llamachat.data.tokens import write_tokens
from llamachat.errors import ConfigError, DataError, TokenizerError, UsageError
from tests.fakes import reference_dialog

ROOT = Path(__file__).resolve().parents[3]
TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
TWO_PAIRS = (
    Message("system", "Be brief."),
    Message("user", " Hi\n"),
    Message("assistant", "Hello. "),
    Message("user", "Bye"),
    Message("assistant", "See you."),
)


def _write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def tokenizer_dir(tmp_path: Path, tiny_sentencepiece: bytes) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(tiny_sentencepiece)
    return folder


# Where encoders go wrong: runs of spaces, what strip() takes and leaves, control words, bytes, other scripts.
_SPACES = [
    *(" ", "  ", "   ", " " * 9, " " * 21, "\n", "\r\n"),
    *("\t", "\u00a0", "\u3000", "\u200b", "\u2581", "\x00", "\x1f"),
]
_WORDS = ["</s>", "<s>", "<unk>", "<0x0A>", "[INS", "ST]", "    return x", "12345", "aaaa", "====", "the cat", "'s"]
_SCRIPTS = ["e\u0301", "\ufb01", "\u65e5\u672c", "\U0001f469\u200d\U0001f467", "\u0645\u0631", "\ufffd", "\U0010ffff"]
_FRAGMENTS = st.sampled_from([*_SPACES, *_WORDS, *_SCRIPTS])
_TEXTS = (
    st.lists(_FRAGMENTS | st.text(st.characters(exclude_categories=["Cs"]), max_size=4), min_size=1, max_size=12)
    .map("".join)
    .filter(lambda text: text.strip() and not any(tag in text for tag in TAGS))
)


@st.composite
def dialogs(draw: st.DrawFn) -> list[dict[str, str]]:
    """A conversation of one to three pairs, the last one open or closed, with or without system text."""
    messages = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(_TEXTS | st.sampled_from(["", " ", "\n"]))})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(_TEXTS)})
        messages.append({"role": "assistant", "content": draw(_TEXTS)})
    return messages[:-1] if draw(st.booleans()) else messages


def test_each_pair_is_one_string_with_its_own_bos_and_eos(tiny_format: ChatFormat, tiny_sentencepiece: bytes) -> None:
    encode = sentencepiece.SentencePieceProcessor(model_proto=tiny_sentencepiece).encode
    first = encode("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n Hi [/INST] Hello. ")
    second = encode("[INST] Bye [/INST] See you. ")
    example = tiny_format.encode_dialog(TWO_PAIRS, train_on=TrainOn.EVERY_ANSWER)
    assert list(example.input_ids) == [1, *first, 2, 1, *second, 2]
    # An open turn has BOS, but neither EOS nor a space at its end.
    assert tiny_format.encode_prompt([Message("user", " Hi ")]) == [1, *encode("[INST] Hi [/INST]")]
    with pytest.raises(DialogError, match=r"messages\[4\].role: is 'assistant' at the end"):
        tiny_format.encode_prompt(TWO_PAIRS)


@pytest.mark.parametrize(
    ("train_on", "marks", "trained"),
    [
        (TrainOn.EVERY_ANSWER, (None, None), [" Hello. </s>", " See you. </s>"]),
        (TrainOn.EVERY_ANSWER, (False, True), [" See you. </s>"]),
        (TrainOn.EVERY_ANSWER, (True, False), [" Hello. </s>"]),
        (TrainOn.LAST_ANSWER, (None, None), [" See you. </s>"]),
        (TrainOn.LAST_ANSWER, (True, None), [" See you. </s>"]),
        (TrainOn.LAST_ANSWER, (None, False), []),
    ],
)
def test_the_trained_strings_are_answers_and_their_eos(
    tiny_format: ChatFormat, train_on: TrainOn, marks: tuple[bool | None, bool | None], trained: list[str]
) -> None:
    system, hi, hello, bye, see_you = TWO_PAIRS
    hello, see_you = Message("assistant", hello.content, marks[0]), Message("assistant", see_you.content, marks[1])
    example = tiny_format.encode_dialog((system, hi, hello, bye, see_you), train_on=train_on)
    pieces = zip(tiny_format.tokenizer.pieces(example.input_ids), example.loss_mask, strict=True)
    stretches = [
        (learnt, "".join(piece for piece, _ in run)) for learnt, run in groupby(pieces, key=lambda pair: pair[1])
    ]
    assert [text.replace(SPACE, " ") for learnt, text in stretches if learnt] == trained


@settings(max_examples=150, deadline=None)
@given(messages=dialogs())
def test_ids_and_mask_equal_the_reference(
    tiny_format: ChatFormat, tiny_sentencepiece: bytes, messages: list[dict[str, str]]
) -> None:
    ids, mask = reference_dialog(tiny_sentencepiece, messages)
    example = tiny_format.encode_dialog(parse_messages(messages), train_on=TrainOn.EVERY_ANSWER)
    assert list(example.input_ids) == ids
    assert list(example.loss_mask) == [bool(value) for value in mask]
    # Control tokens are those of the structure: none comes from a text that spells one.
    roles = [message["role"] for message in messages]
    assert [ids.count(token) for token in (0, 1, 2)] == [0, roles.count("user"), roles.count("assistant")]


@settings(max_examples=50, deadline=None)
@given(messages=dialogs())
def test_a_prompt_is_what_stands_before_its_answer(tiny_format: ChatFormat, messages: list[dict[str, str]]) -> None:
    closed = [*messages, {"role": "assistant", "content": "Yes."}] if messages[-1]["role"] == "user" else messages
    example = tiny_format.encode_dialog(parse_messages(closed), train_on=TrainOn.LAST_ANSWER)
    prompt_ids = tiny_format.encode_prompt(parse_messages(closed[:-1]))
    assert list(example.input_ids[: len(prompt_ids)]) == prompt_ids
    assert example.loss_mask.index(True) == len(prompt_ids)


def test_an_answer_decodes_to_its_text_up_to_the_stop(tiny_format: ChatFormat) -> None:
    messages = (Message("user", "Hi"), Message("assistant", "  Na\u00efve  caf\u00e9\n\U0001f642 done."))
    example = tiny_format.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER)
    answer = [token for token, is_trained in zip(example.input_ids, example.loss_mask, strict=True) if is_trained]
    assert tiny_format.decode_answer(answer) == "Na\u00efve  caf\u00e9\n\U0001f642 done."
    assert tiny_format.decode_answer([*answer, *answer]) == "Na\u00efve  caf\u00e9\n\U0001f642 done."
    assert tiny_format.decode_answer(answer[:-1]) == "Na\u00efve  caf\u00e9\n\U0001f642 done."
    assert tiny_format.stop_ids == (2,)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_tag_inside_a_message_is_refused(tiny_format: ChatFormat, tag: str, index: int) -> None:
    messages = list(TWO_PAIRS[:3])
    messages[index] = Message(messages[index].role, f"ab {tag} c")
    for refuse in (
        tiny_format.check_text,
        lambda messages: tiny_format.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER),
        lambda messages: tiny_format.shorten(messages, max_tokens=100),
    ):
        with pytest.raises(DialogError) as caught:
            refuse(messages)
        assert caught.value.field == f"messages[{index}].content"
        assert f"'{tag}' at character 3" in caught.value.reason
        assert tag in tiny_format.forbidden


@pytest.mark.parametrize("has_system", [False, True])
@pytest.mark.parametrize("is_open", [False, True])
def test_too_long_loses_the_oldest_pairs_and_keeps_system_and_last_turn(
    tiny_format: ChatFormat, tiny_sentencepiece: bytes, has_system: bool, is_open: bool
) -> None:
    texts = ["What is the capital of France?", "Paris.", "And the weather?", "I like to talk about the weather."]
    texts += ["Thanks!", "You are welcome."]
    turns = [Message("assistant" if index % 2 else "user", text) for index, text in enumerate(texts)]
    system = [Message("system", "Always answer in one sentence.")] if has_system else []
    turns = turns[:-1] if is_open else turns
    candidates = [tuple(system + turns[start:]) for start in (0, 2, 4)]
    lengths = [len(reference_dialog(tiny_sentencepiece, as_dicts(kept))[0]) for kept in candidates]
    assert lengths == sorted(lengths, reverse=True)
    for max_tokens in range(lengths[2] - 2, lengths[0] + 3):
        fitting = [kept for kept, length in zip(candidates, lengths, strict=True) if length <= max_tokens]
        expected = fitting[0] if fitting else None
        assert tiny_format.shorten(candidates[0], max_tokens=max_tokens) == expected


def test_an_unknown_chat_format_is_refused_with_the_known_ones(tiny_tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match=r"base.chat_format: unknown chat format 'chatml'.*llama2"):
        load_chat_format("chatml", tiny_tokenizer)


def test_only_one_file_knows_the_tags() -> None:
    packages = [folder for folder in ROOT.iterdir() if (folder / "__init__.py").is_file() and folder.name != "tests"]
    assert ROOT / "llamachat" in packages
    holders = {
        str(path.relative_to(ROOT))
        for folder in packages
        for path in folder.rglob("*.py")
        if any(tag in path.read_text(encoding="utf-8") for tag in TAGS)
    }
    assert holders == {"llamachat/chat_format/llama2.py"}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_tokens_writes_ids_and_mask_of_each_dialog(
    tmp_path: Path, tokenizer_dir: Path, tiny_sentencepiece: bytes, suffix: str
) -> None:
    closed = as_dicts(TWO_PAIRS)
    opened = [{"role": "user", "content": "</s> a <s>"}]
    lines = [json.dumps({"messages": closed, "other": 1}), "", json.dumps({"messages": opened}), " "]
    content = ("\ufeff" + "\r\n".join(lines)).encode()
    source, out = tmp_path / f"dialogs{suffix}", tmp_path / f"ids{suffix}"
    source.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    report = write_tokens(tokenizer_dir, source, out)
    written = gzip.decompress(out.read_bytes()) if suffix.endswith("gz") else out.read_bytes()
    rows = [json.loads(line) for line in written.decode().splitlines()]
    expected = [reference_dialog(tiny_sentencepiece, messages) for messages in (closed, opened)]
    assert [(row["input_ids"], row["loss_mask"]) for row in rows] == expected
    assert (report.dialogs, report.tokens) == (2, sum(len(ids) for ids, _ in expected))
    assert report.trained_tokens == sum(sum(mask) for _, mask in expected)
    assert report.warning is None


def test_tokens_reads_a_tokenizer_file_and_the_last_answer_alone(
    tmp_path: Path, tokenizer_dir: Path, tiny_sentencepiece: bytes
) -> None:
    source = _write(tmp_path / "dialogs.jsonl", {"messages": as_dicts(TWO_PAIRS)})
    write_tokens(tokenizer_dir / "tokenizer.model", source, tmp_path / "ids.jsonl", train_on=TrainOn.LAST_ANSWER)
    row = json.loads((tmp_path / "ids.jsonl").read_text())
    ids, mask = reference_dialog(tiny_sentencepiece, as_dicts(TWO_PAIRS))
    second = ids.index(1, 1)
    assert row == {"input_ids": ids, "loss_mask": [0] * second + mask[second:]}


def test_tokens_tells_all_bad_lines_and_writes_nothing(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = tmp_path / "dialogs.jsonl"
    good = json.dumps({"messages": as_dicts(TWO_PAIRS)})
    tag = json.dumps({"messages": [{"role": "user", "content": "a [INST] b"}]})
    lines = [good, '{"messages": [', "[1]", '{"text": "x"}', '{"messages": 3}', tag, good]
    source.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    out = tmp_path / "ids.jsonl"
    out.write_text("before")
    with pytest.raises(DataError) as caught:
        write_tokens(tokenizer_dir, source, out, show=False, overwrite=True)
    reported = str(caught.value).splitlines()
    expected = [
        (2, "column 15: is the end of the line in the middle of a record"),
        (3, "line: is a list"),
        (4, "messages: is missing; the line holds 'text'"),
        (5, "messages: is a number"),
        (6, "messages[0].content: holds '[INST]' at character 2"),
        (8, "byte 1: is 0xff, which is not UTF-8"),
    ]
    assert len(reported) == len(expected) + 1
    for line, (number, reason) in zip(reported, expected, strict=False):
        assert line.startswith(f"{source}:{number}: {reason}")
    assert reported[-1] == "Nothing was written."
    assert out.read_text() == "before"
    assert not list(tmp_path.glob(".incoming*"))


def test_tokens_tells_a_hundred_bad_lines_and_counts_the_rest(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = _write(tmp_path / "dialogs.jsonl", *[[]] * 103)
    with pytest.raises(DataError) as caught:
        write_tokens(tokenizer_dir, source, tmp_path / "ids.jsonl")
    lines = str(caught.value).splitlines()
    assert lines[99].startswith(f"{source}:100:")
    assert lines[100:] == ["... and 3 more lines.", "Nothing was written."]


def test_tokens_refuses_files_it_cannot_read_or_write(tmp_path: Path, tokenizer_dir: Path) -> None:
    source = _write(tmp_path / "dialogs.jsonl", {"messages": as_dicts(TWO_PAIRS)})
    with pytest.raises(DataError, match=r"missing.jsonl: file: does not exist"):
        write_tokens(tokenizer_dir, tmp_path / "missing.jsonl", tmp_path / "ids.jsonl")
    with pytest.raises(UsageError, match=r"ids.jsonl' cannot be written \(No such file.*the folder"):
        write_tokens(tokenizer_dir, source, tmp_path / "nowhere" / "ids.jsonl")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(source.read_bytes())[:-12])
    with pytest.raises(DataError, match=r"cut.jsonl.gz:\d+: file: cannot be read .*write the file again"):
        write_tokens(tokenizer_dir, cut, tmp_path / "ids.jsonl")
    (tmp_path / "array.json").write_text(json.dumps([{"messages": as_dicts(TWO_PAIRS)}]))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    for name, reason in {
        "array.json": "is one JSON array.*llamachat data convert",
        "empty.jsonl": "is empty",
        "table.parquet": "is parquet.*llamachat data convert",
    }.items():
        with pytest.raises(DataError, match=f"{name}: file: {reason}"):
            write_tokens(tokenizer_dir, tmp_path / name, tmp_path / "ids.jsonl")
    with pytest.raises(TokenizerError, match=r"has neither tokenizer.model nor tokenizer.json"):
        write_tokens(tmp_path, source, tmp_path / "ids.jsonl")


def test_show_escapes_control_characters(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = as_dicts([Message("user", "caf\u00e9 [red] \U0001f642"), Message("assistant", "a\x1b[31mb")])
    source = _write(tmp_path / "in.jsonl", {"messages": messages})
    write_tokens(tokenizer_dir, source, tmp_path / "out.jsonl", show=True)
    shown = capsys.readouterr().out
    assert "1: <s> [INST] caf\u00e9 [red] \U0001f642 [/INST] a\\x1b[31mb </s>" in shown
