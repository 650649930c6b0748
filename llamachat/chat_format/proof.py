"""The proof that a tokenizer gives the ids of the chat format: a base's at load, an artifact's on its written files.

With a tokenizer that is nearly right the model trains and answers, a little worse, and no error says why. So it is
compared on dialogs that hold what is known to go wrong (runs of spaces, code, other scripts, emoji, digits, text that
spells control tokens, and every piece of its own vocabulary), and one difference is enough to refuse it.
The dialogs are written with escapes, since half of the characters in question cannot be seen. `LLAMA2_DIGESTS` was made
with the `tokenizer.model` of Llama 2 and has to be made again when a dialog changes (a test compares the dialogs).
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llamachat.chat_format import ChatFormat, TokenizedExample, TrainOn, load_chat_format
from llamachat.chat_format.dialog import Message, as_dicts
from llamachat.chat_format.tokenizer import BASES_THAT_WORK, SPACE, SPECIAL_PIECES, Tokenizer, load_tokenizer
from llamachat.errors import TokenizerError

PIECES_PER_TEXT = 200

_TEXTS = (
    "What is the capital of France?",
    "The capital of France is Paris.",
    "  leading and trailing white space \n",
    "two  spaces,   three,    four,     five; a tab\tand\t\ttwo",
    "line one\nline two\n\nline four\r\nwindows\r\n\r\nend",
    "def f(x):\n    if x > 1:\n        return x ** 2\n    return    None",
    "\tfor (int i = 0; i < n; i++) {\n\t\ta[i] += b[i];  // sum\n\t}",
    "- item\n- item 2\n  - nested\n    - deeper\n\n1. one\n2. two",
    '{"key": [1, 2.5, -3e10], "other": null}',
    "https://example.org/a/b?c=d&e=f#g and name@example.org",
    "12345 + 67890 = 80235, 3.14159, 1,000,000, 007, 0x1F, 100%",
    "7",
    "!",
    "...and so on... ---- ==== ____ ****",
    "na\u00efve caf\u00e9 \u2013 \u201cquotes\u201d \u2018single\u2019 \u2026 \u20ac \u00a3 \u00df",
    "e\u0301 as two, \u00e9 as one, a\u0308\u0323 stacked, \u0301 alone",
    "\ufb01 \u00bd \u2126 \u212b \uff21\uff22\uff23 \u3392 \u00b2 change under NFKC",
    "no\u00a0break, em\u2003space, ideographic\u3000space, thin\u2009space, narrow\u202fone",
    "zero\u200bwidth, joiner\u200d, non\u200cjoiner, word\u2060joiner, mark\ufeff, soft\u00adhyphen",
    "\u200bstarts and ends with what strip() leaves\u200b",
    "\u00a0\u3000starts and ends with what strip() takes\u2028\x1f",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3002"
    "\u4e2d\u6587\u6587\u672c\uff0c\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645, "
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e, \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! "
    "\u0393\u03b5\u03b9\u03ac \u03c3\u03bf\u03c5 \u039a\u03cc\u03c3\u03bc\u03b5",
    "\U0001f642 \U0001f44d\U0001f3fd \U0001f1eb\U0001f1f7 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f",
    "\U0001f469\u200d\U0001f4bb",
    "\U00020000\U0002a6d6 rare, \U0001d54f\U0001d550 letters, \ue000 private, \ufffd unknown",
    "\u202eright to left\u202c and \u200eleft to right\u200f",
    "\u2581underline\u2581 \u2581\u2581 twice",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa abababababababab xxxxxxxxxxxxxxxxx",
    "spaces" + " " * 17 + "seventeen" + " " * 33 + "thirty-three" + " " * 64 + "sixty-four",
    "lines" + "\n" * 9 + "nine" + "\t" * 7 + "seven" + " \n" * 5 + "mixed",
    "ends with spaces and a newline   \n   \n",
    "control \x01\x02\x7f\x85 characters \x0b\x0c",
    "I'm, you're, it's, we'll, THEY'D; don't; O'Neill's \"quoted\" `code`",
    "supercalifragilisticexpialidocious antidisestablishmentarianism Donaudampfschiff",
    "<tag> </div> [INS T] almost a tag [/ INST] << SYS >> <0x0A> <|im_start|> <pad>",
    "C++ & C# @user #topic $x^2 + y_1$ \\frac{a}{b} ~/path\\to\\file",
    "A longer answer.\n\nIt has paragraphs, with a list:\n\n* first\n* second\n\n```python\nprint('hi')\n```\n\nDone.",
)

_CONTROL_TEXTS = (
    "</s>",
    "<s>",
    "<unk>",
    "a<s>b</s>c<unk>d",
    " </s> <s> spelled </s><s>twice",
    "He wrote </s>\nand then <s> again   </s>   ",
)

_SYSTEMS = (
    "Always answer with Haiku.",
    "",
    " ",
    "\n  Be brief.\n\n",
    "\u65e5\u672c\u8a9e\u3067\u3002",
    "Use    code\n\n",
)


def _dialogs(texts: tuple[str, ...]) -> tuple[tuple[Message, ...], ...]:
    """Every text once as a question and once as an answer, in dialogs of one to four pairs, some with system text."""
    dialogs: list[tuple[Message, ...]] = []
    for index in range(len(texts)):
        messages: list[Message] = []
        if index % 2:
            messages.append(Message("system", _SYSTEMS[index // 2 % len(_SYSTEMS)]))
        for turn in range(1 + index % 4):
            question, answer = texts[(index + turn) % len(texts)], texts[(7 * index + 3 * turn + 1) % len(texts)]
            messages += [Message("user", question), Message("assistant", answer)]
        dialogs.append(tuple(messages if index % 3 else [*messages, Message("user", texts[-1 - index])]))
    return tuple(dialogs)


PLAIN_DIALOGS = _dialogs(_TEXTS)
CONTROL_DIALOGS = _dialogs(_CONTROL_TEXTS)

_LLAMA2_DIGESTS = (
    "6c40d715 d33b8c0d ef4e024c 77ca17c0 f86fe598 4732edf4 d25b05c9 d230d9b0 01eb6888 0b3e2143 25eb6613 "
    "cbc78016 48fd2380 8c5c2c56 12d37144 8f4c97b0 9b22f0c0 650a8e23 bb2d4720 029daa11 448fffdd 691da638 "
    "57c94c3b 5093e4a3 49e941c9 857ca50d d94ab63c 63bb02c8 eeab897b 9a3560e4 6de49d85 7867df30 7b79818c "
    "b717b30b c6e491a6 a1ad953d 22057edd 8e0ed760 6a0b668d 65c1cf4e 4b2080cb 17403dfd 07b772ab 6aeae1fc "
    "89930d65 83cb1d70 "
)
LLAMA2_DIGESTS = tuple(_LLAMA2_DIGESTS.split())


@dataclass(frozen=True, slots=True)
class ProofReport:
    """How many cases of the proof (dialogs, texts made of the vocabulary) came out right; the first wrong one."""

    subject: str
    cases: int
    equal: int
    first_difference: str | None

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
    """The chat format on the tokenizer at `path`, proved; with a warning where it failed and the user allows that."""
    loaded = load_chat_format(chat_format, load_tokenizer(path))
    return loaded, require_proof(prove_tokenizer(loaded, subject=str(path)), allow_unproved=allow_unproved)


def prove_tokenizer(
    chat_format: ChatFormat, *, subject: str, reference_digests: Sequence[str] = LLAMA2_DIGESTS
) -> ProofReport:
    """Prove the tokenizer that a base brings, before anything is trained with it.

    With a SentencePiece model its ids are the reference; what is proved is that text becomes no control token, that an
    answer leaves its prompt's ids as they are, that decoding gives the text back, and that the tokenizer written into
    artifacts gives equal ids. Without one, the ids must be those of Llama 2's own tokenizer (`ids_digest` of each).
    """
    dialogs = [*PLAIN_DIALOGS, *CONTROL_DIALOGS]
    has_model = chat_format.tokenizer.sentencepiece_model is not None
    assert has_model or len(reference_digests) == len(dialogs), "one digest a dialog of the proof set"
    differences = [_format_difference(chat_format, messages) for messages in dialogs]
    if has_model:
        texts = [*_contents(PLAIN_DIALOGS), *_vocabulary_texts(chat_format)]
        differences += _shipped_differences(chat_format.tokenizer, texts)
    else:
        pairs = zip(dialogs, reference_digests, differences, strict=True)
        differences = [found or _digest_difference(chat_format, messages, digest) for messages, digest, found in pairs]
    return _report(subject, differences)


def prove_written(folder: Path, chat_format: ChatFormat) -> ProofReport:
    """Prove what an artifact ships: its files, loaded again, against `chat_format` on dialogs without control words.

    Loaded both as others will (`AutoTokenizer` and the chat template) and as we do.
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
    """The proof's dialogs up to their last question, and every piece of the vocabulary, for servers of other makers.

    Control words are left out: such servers take them for the tokens. Texts come stripped, since what counts as white
    space differs among languages.
    """
    vocabulary = [(Message("user", text),) for text in _vocabulary_texts(chat_format)]
    questions = [messages if messages[-1].role == "user" else messages[:-1] for messages in PLAIN_DIALOGS]
    stripped = [
        tuple(Message(m.role, m.content if m.role == "system" else m.content.strip()) for m in messages)
        for messages in questions
    ]
    return [*stripped, *vocabulary]


def require_proof(report: ProofReport, *, allow_unproved: bool = False) -> str | None:
    """None where the proof holds; else a warning where the user allows it, or `TokenizerError`."""
    if report.is_proved:
        return None
    why = "A model trained on other ids than those it is served with reads its prompts wrongly."
    if allow_unproved:
        return f"{report} {why} Going on, because base.allow_unproved_tokenizer is true."
    raise TokenizerError(
        f"{report} {why} {BASES_THAT_WORK} Take one of these, or set base.allow_unproved_tokenizer: true to go on with "
        "these ids."
    )


def ids_digest(ids: Sequence[int]) -> str:
    """Eight hex digits that stand for a sequence of ids in the committed proof."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:8]


def _format_difference(chat_format: ChatFormat, messages: Sequence[Message]) -> str | None:
    """What the format promises of any tokenizer, whatever its ids are."""
    tokenizer = chat_format.tokenizer
    example = chat_format.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    questions = sum(message.role == "user" for message in messages)
    counts = tuple(example.input_ids.count(token) for token in (tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id))
    if counts != (0, questions, len(answers)):
        return f"text became a control token in {_excerpt(messages)}"
    for index in answers:
        prompt_ids = chat_format.encode_prompt(messages[:index])
        closed = chat_format.encode_dialog(messages[: index + 1], train_on=TrainOn.LAST_ANSWER)
        if list(closed.input_ids[: len(prompt_ids)]) != prompt_ids:
            return f"a piece joins a prompt with its answer in {_excerpt(messages)}"
        # SentencePiece writes a space as this very character, so it cannot tell the two apart on the way back.
        text = messages[index].content.replace(SPACE, " ").strip()
        if chat_format.decode_answer(closed.input_ids[len(prompt_ids) :]) != text:
            return f"decoding does not give the answer back in {_excerpt(messages)}"
    return None


def _shipped_differences(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[str | None]:
    fast = tokenizer.fast()
    for text in texts:
        got, expected = fast.encode(text, add_special_tokens=False).ids, tokenizer.encode(text)
        yield _ids_difference(tokenizer, got, expected)


def _digest_difference(chat_format: ChatFormat, messages: Sequence[Message], digest: str) -> str | None:
    ids = chat_format.encode_dialog(messages, train_on=TrainOn.EVERY_ANSWER).input_ids
    return None if ids_digest(ids) == digest else f"the ids are not those of Llama 2 in {_excerpt(messages)}"


def _example_difference(tokenizer: Tokenizer, got: TokenizedExample, expected: TokenizedExample) -> str | None:
    found = _ids_difference(tokenizer, got.input_ids, expected.input_ids)
    if found or got.loss_mask == expected.loss_mask:
        return found
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


def _contents(dialogs: Iterable[Sequence[Message]]) -> Iterator[str]:
    return (message.content for messages in dialogs for message in messages)


def _vocabulary_texts(chat_format: ChatFormat) -> Iterator[str]:
    """Every piece of the vocabulary as text, so that a piece which only one of two tokenizers makes is seen."""
    tokenizer = chat_format.tokenizer
    refused = (*chat_format.forbidden, *SPECIAL_PIECES)
    pieces = tokenizer.pieces(range(len(SPECIAL_PIECES), tokenizer.vocab_size))
    texts = [piece.replace(SPACE, " ") for piece in pieces if not any(text in piece for text in refused)]
    for start in range(0, len(texts), PIECES_PER_TEXT):
        yield "Pieces: " + " ".join(texts[start : start + PIECES_PER_TEXT])


def _report(subject: str, differences: Sequence[str | None]) -> ProofReport:
    found = [difference for difference in differences if difference]
    return ProofReport(subject, len(differences), len(differences) - len(found), found[0] if found else None)


def _excerpt(messages: Sequence[Message]) -> str:
    return ascii(messages[-1].content[:60])
