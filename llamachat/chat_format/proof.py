"""The proof that a tokenizer gives the ids of the chat format: run on a base at load, on an artifact's written files.

A model trained with an almost correct tokenizer answers slightly worse, without any error. So the ids are compared on
dialogs with known problem cases (runs of spaces, code, other scripts, emoji, digits, text that spells control tokens,
every piece of the vocabulary), and a single difference rejects the tokenizer.
The texts are in `proof.json` next to this file, escaped, since half of the characters are invisible. Its digests were
computed with Llama 2's `tokenizer.model` and must be recomputed when a text changes (a test compares them).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llamachat.chat_format import ChatFormat, TokenizedExample, TrainOn, load_chat_format
from llamachat.chat_format.dialog import Message, as_dicts
from llamachat.chat_format.tokenizer import BASES_THAT_WORK, LLAMA2_IDS, SPACE, Tokenizer, load_tokenizer
from llamachat.errors import TokenizerError

PIECES_PER_TEXT = 200

_CASES = json.loads(Path(__file__).with_name("proof.json").read_text(encoding="utf-8"))


def _dialogs(texts: Sequence[str]) -> tuple[tuple[Message, ...], ...]:
    """Dialogs of one to four pairs, some with system text, with every text once as a question and once as an answer."""
    dialogs: list[tuple[Message, ...]] = []
    systems = _CASES["systems"]
    for index in range(len(texts)):
        messages: list[Message] = []
        if index % 2:
            messages.append(Message("system", systems[index // 2 % len(systems)]))
        for turn in range(1 + index % 4):
            question, answer = texts[(index + turn) % len(texts)], texts[(7 * index + 3 * turn + 1) % len(texts)]
            messages += [Message("user", question), Message("assistant", answer)]
        dialogs.append(tuple(messages if index % 3 else [*messages, Message("user", texts[-1 - index])]))
    return tuple(dialogs)


PLAIN_DIALOGS = _dialogs(_CASES["texts"])
CONTROL_DIALOGS = _dialogs(_CASES["control_texts"])
LLAMA2_DIGESTS: tuple[str, ...] = tuple(_CASES["llama2_digests"])


@dataclass(frozen=True, slots=True)
class ProofReport:
    """The number of cases (dialogs, texts from the vocabulary) that passed, and the first failure."""

    subject: str
    cases: int
    equal: int
    first_difference: str | None
    has_own_ids: bool = False  # the format is correct, but the ids differ from Llama 2's

    @property
    def is_proved(self) -> bool:
        return self.equal == self.cases

    def __str__(self) -> str:
        result = (
            f"{self.subject}: {self.equal} of {self.cases} cases of the tokenizer proof give what the chat format wants"
        )
        return result + (f"; the first wrong: {self.first_difference}." if self.first_difference else ".")


def load_proved_format(
    path: Path, *, chat_format: str = "llama2", allow_unproved: bool = False
) -> tuple[ChatFormat, str | None]:
    """Load and prove the chat format of the tokenizer at `path`; a failure is a warning if the user allows it."""
    loaded = load_chat_format(chat_format, load_tokenizer(path))
    _check_rows(path / "config.json", loaded.tokenizer)
    return loaded, require_proof(prove_tokenizer(loaded, subject=str(path)), allow_unproved=allow_unproved)


def _check_rows(config: Path, tokenizer: Tokenizer) -> None:
    """Reject a model whose embedding has fewer rows than the tokenizer has pieces."""
    try:
        rows = json.loads(config.read_text(encoding="utf-8"))["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # an adapter's folder has no config; loading the model reports a broken one
    if isinstance(rows, int) and rows < tokenizer.vocab_size:
        raise TokenizerError(
            f"{config}: vocab_size is {rows}, but the tokenizer in the same folder has {tokenizer.vocab_size} pieces. A text"
            " with one of the last pieces could not be read. Put the model's own tokenizer there, or enlarge its"
            " embedding (resize_token_embeddings)."
        )


def prove_tokenizer(
    chat_format: ChatFormat, *, subject: str, reference_digests: Sequence[str] = LLAMA2_DIGESTS
) -> ProofReport:
    """Prove a base's tokenizer before anything is trained with it.

    A SentencePiece model's ids are the reference. The proof checks that text never becomes a control token, an answer
    leaves the ids of its prompt unchanged, decoding restores the text, and the tokenizer written to artifacts gives the
    same ids. Without a SentencePiece model, the ids must equal those of Llama 2's tokenizer (`ids_digest` of each);
    otherwise the report sets `has_own_ids`, and `prove_written` compares these ids with the artifact's.
    """
    dialogs = [*PLAIN_DIALOGS, *CONTROL_DIALOGS]
    is_llama2 = chat_format.tokenizer.control == LLAMA2_IDS
    own_control = [] if is_llama2 else _spelled(chat_format.tokenizer.control_pieces)
    has_model = chat_format.tokenizer.sentencepiece_model is not None
    assert has_model or len(reference_digests) == len(dialogs), "one digest a dialog of the proof set"
    differences = [_format_difference(chat_format, messages) for messages in [*dialogs, *own_control]]
    is_format_valid = not any(differences)
    if has_model:
        tokenizer, fast = chat_format.tokenizer, chat_format.tokenizer.fast()
        contents = [message.content for messages in PLAIN_DIALOGS for message in messages]
        for text in [*contents, *_vocabulary_texts(chat_format)]:
            got = fast.encode(text, add_special_tokens=False).ids
            differences.append(_ids_difference(tokenizer, got, tokenizer.encode(text)))
    else:
        pairs = zip(dialogs, reference_digests, differences[: len(dialogs)], strict=True)
        differences = [
            difference or _digest_difference(chat_format, messages, digest) for messages, digest, difference in pairs
        ]
    if has_model and not is_llama2:
        differences.append("its control tokens have other ids than those of Llama 2")
        is_format_valid = not any(differences[:-1])
    report = _report(subject, differences)
    return replace(report, has_own_ids=is_format_valid and not report.is_proved)


def prove_written(folder: Path, chat_format: ChatFormat) -> ProofReport:
    """Prove an artifact's tokenizer: reload its files and compare with `chat_format` on dialogs without control words.

    They are loaded both with `AutoTokenizer` and its chat template, as users will, and with our own loader.
    """
    from transformers import AutoTokenizer

    shipped = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    own = load_chat_format(chat_format.name, load_tokenizer(folder))
    vocabulary = [(Message("user", text), Message("assistant", text)) for text in _vocabulary_texts(chat_format)]
    differences: list[str | None] = []
    for messages in [*PLAIN_DIALOGS, *vocabulary]:
        expected = chat_format.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER)
        got = shipped.apply_chat_template(
            as_dicts(messages),
            return_assistant_tokens_mask=True,
            return_dict=True,
        )
        example = TokenizedExample(tuple(got["input_ids"]), tuple(bool(value) for value in got["assistant_masks"]))
        differences.append(_example_difference(chat_format.tokenizer, example, expected))
        example = own.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER)
        differences.append(_example_difference(chat_format.tokenizer, example, expected))
    return _report(str(folder), differences)


def proof_prompts(chat_format: ChatFormat) -> list[tuple[Message, ...]]:
    """The proof's dialogs up to the last question, and every vocabulary piece, for testing other servers.

    Control words are excluded, since such servers parse them as tokens. Texts are stripped, since languages differ in
    what counts as white space.
    """
    vocabulary = [(Message("user", text),) for text in _vocabulary_texts(chat_format)]
    questions = [messages if messages[-1].role == "user" else messages[:-1] for messages in PLAIN_DIALOGS]
    stripped = [
        tuple(Message(m.role, m.content if m.role == "system" else m.content.strip()) for m in messages)
        for messages in questions
    ]
    return [*stripped, *vocabulary]


def require_proof(report: ProofReport, *, allow_unproved: bool = False) -> str | None:
    """None if the proof passed, else a warning if the user allows it; otherwise raise `TokenizerError`."""
    if report.is_proved:
        return None
    if allow_unproved and report.has_own_ids:
        return (
            f"{report.subject}: the ids are this tokenizer's own, not those of Llama 2. The chat format works with it, "
            "and what a step publishes is reloaded and compared with it. Continuing, because "
            "base.allow_unproved_tokenizer is true."
        )
    why = "A model that is trained on one set of ids and served with another misreads its prompts."
    if allow_unproved:
        return f"{report} {why} Continuing, because base.allow_unproved_tokenizer is true."
    raise TokenizerError(
        f"{report} {why} {BASES_THAT_WORK} Take one of these, or set base.allow_unproved_tokenizer: true to use "
        "these ids."
    )


def ids_digest(ids: Sequence[int]) -> str:
    """Digest of a sequence of ids, eight hex digits, as stored in proof.json."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:8]


def _format_difference(chat_format: ChatFormat, messages: Sequence[Message]) -> str | None:
    """The first violation of what the format requires of any tokenizer, whatever its ids."""
    tokenizer = chat_format.tokenizer
    example = chat_format.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    questions = sum(message.role == "user" for message in messages)
    expected = Counter({tokenizer.bos_id: questions}) + Counter({tokenizer.eos_id: len(answers)})  # may be one id
    counts = Counter(token for token in example.input_ids if token in tokenizer.control.every)
    if counts != expected:
        return f"text became a control token in {_excerpt(messages)}"
    for index in answers:
        prompt_ids = chat_format.encode_prompt(messages[:index])
        closed = chat_format.encode_dialog(messages[: index + 1], train_on=TrainOn.LAST_ANSWER)
        if list(closed.input_ids[: len(prompt_ids)]) != prompt_ids:
            return f"a piece joins a prompt with its answer in {_excerpt(messages)}"
        # SentencePiece uses this very character for a space, so decoding cannot distinguish the two.
        text = messages[index].content.replace(SPACE, " ").strip()
        decoded = chat_format.decode_answer(closed.input_ids[len(prompt_ids) :])
        if decoded.replace(SPACE, " ").strip() != text:
            return f"decoding does not give the answer back in {_excerpt(messages)}"
    return None


def _digest_difference(chat_format: ChatFormat, messages: Sequence[Message], digest: str) -> str | None:
    ids = chat_format.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER).input_ids
    return None if ids_digest(ids) == digest else f"the ids are not those of Llama 2 in {_excerpt(messages)}"


def _example_difference(tokenizer: Tokenizer, got: TokenizedExample, expected: TokenizedExample) -> str | None:
    difference = _ids_difference(tokenizer, got.input_ids, expected.input_ids)
    if difference or got.loss_mask == expected.loss_mask:
        return difference
    index = next(i for i, pair in enumerate(zip(got.loss_mask, expected.loss_mask, strict=True)) if pair[0] != pair[1])
    return f"the mask is wrong at token {index} ({tokenizer.pieces([expected.input_ids[index]])[0]!a})"


def _ids_difference(tokenizer: Tokenizer, got: Sequence[int], expected: Sequence[int]) -> str | None:
    if list(got) == list(expected):
        return None
    length = min(len(got), len(expected))
    index = next((i for i in range(length) if got[i] != expected[i]), length)
    start, end = max(0, index - 2), index + 3
    was, due = tokenizer.pieces(got[start:end]), tokenizer.pieces(expected[start:end])
    return f"at token {index} the pieces are {was!a}, but should be {due!a}"


def _vocabulary_texts(chat_format: ChatFormat) -> Iterator[str]:
    """Every vocabulary piece as text, to detect pieces that only one of two tokenizers produces."""
    tokenizer = chat_format.tokenizer
    refused = (*chat_format.forbidden, *tokenizer.control_pieces)
    pieces = [tokenizer.text_of(token) for token in range(tokenizer.vocab_size) if token not in tokenizer.control.every]
    texts = [piece for piece in pieces if not any(text in piece for text in refused)]
    for start in range(0, len(texts), PIECES_PER_TEXT):
        yield "Pieces: " + " ".join(texts[start : start + PIECES_PER_TEXT])


def _spelled(pieces: Sequence[str]) -> list[tuple[Message, ...]]:
    """Dialogs with texts that spell the tokenizer's own control tokens."""
    texts = [f"{piece} a{piece}b {piece}" for piece in pieces]
    return [(Message("user", text), Message("assistant", text)) for text in texts]


def _report(subject: str, differences: Sequence[str | None]) -> ProofReport:
    mismatches = [difference for difference in differences if difference]
    return ProofReport(
        subject, len(differences), len(differences) - len(mismatches), mismatches[0] if mismatches else None
    )


def _excerpt(messages: Sequence[Message]) -> str:
    return ascii(messages[-1].content[:60])
