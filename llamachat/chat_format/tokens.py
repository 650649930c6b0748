"""`llamachat tokens`: the ids and the loss mask of each dialog of a file, as training sees them.

Reads dialogs (`{"messages": [...]}` a line, `.jsonl` or `.jsonl.gz`; other keys are let be) and writes
`{"input_ids": [...], "loss_mask": [0 or 1, ...]}` a line, in the same order. A dialog may end with an open user
turn: it is encoded too, with nothing to learn in it. One bad line and nothing is written; all bad lines are told.
"""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from llamachat.chat_format import ChatFormat, TokenizedExample, TrainOn
from llamachat.chat_format.dialog import DialogError, parse_messages
from llamachat.chat_format.proof import load_proved_format
from llamachat.chat_format.tokenizer import SPACE
from llamachat.errors import DataError, UsageError

MAX_TOLD = 100
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class TokensReport:
    """What was written, and the warning of an unproved tokenizer where the user allowed one."""

    dialogs: int
    tokens: int
    trained_tokens: int
    warning: str | None


def write_tokens(
    tokenizer_dir: Path,
    dialogs_in: Path,
    out: Path,
    *,
    train_on: TrainOn = TrainOn.EVERY_ANSWER,
    show: bool = False,
    chat_format: str = "llama2",
    allow_unproved: bool = False,
) -> TokensReport:
    """Encode every dialog of `dialogs_in` into `out`; `show` prints them too, the trained tokens coloured."""
    loaded, warning = load_proved_format(tokenizer_dir, chat_format=chat_format, allow_unproved=allow_unproved)
    dialogs = tokens = trained = 0
    problems: list[str] = []
    with _written_beside(out) as stream:
        for number, line in _numbered_lines(dialogs_in):
            try:
                example = _encode_line(loaded, line, train_on)
            except DialogError as error:
                problems.append(f"{dialogs_in}:{number}: {error}")
                continue
            row = {"input_ids": example.input_ids, "loss_mask": [int(is_trained) for is_trained in example.loss_mask]}
            stream.write(json.dumps(row).encode() + b"\n")
            dialogs, tokens, trained = dialogs + 1, tokens + len(row["input_ids"]), trained + sum(row["loss_mask"])
            if show and not problems:
                _show(loaded, example, number)
        if problems:
            raise DataError(_all_problems(problems))
    return TokensReport(dialogs, tokens, trained, warning)


def _encode_line(chat_format: ChatFormat, line: bytes, train_on: TrainOn) -> TokenizedExample:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        raise DialogError(
            "line", f"is not JSON in UTF-8 ({error}).", 'Write one object a line: {"messages": [...]}.'
        ) from error
    if not isinstance(record, dict):
        raise DialogError("line", "is not an object.", 'Write one object a line: {"messages": [...]}.')
    if "messages" not in record:
        held = ", ".join(map(repr, record)) or "nothing"
        raise DialogError("messages", f"is missing; the line holds {held}.", "Name the list of turns 'messages'.")
    return chat_format.encode_dialog(parse_messages(record["messages"]), train_on=train_on)


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that hold something, numbered from 1."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                text = line.removeprefix(_BOM).strip() if number == 1 else line.strip()
                if text:
                    yield number, text
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(
            f"{path}:{number + 1}: cannot be read ({reason}). Dialogs are read from a .jsonl or .jsonl.gz file. "
            "Check the path, or write the file again."
        ) from error


@contextmanager
def _written_beside(out: Path) -> Iterator[IO[bytes]]:
    """A stream whose content appears under the name `out` whole, and only if nothing was raised."""
    side = out.with_name(f".incoming-{os.getpid()}-{out.name}")
    try:
        raw = side.open("wb")
    except OSError as error:
        raise UsageError(
            f"{out}: cannot be written ({error.strerror}). The ids are written beside it and renamed. Make the "
            "folder, or choose another one."
        ) from error
    try:
        with raw:
            if out.suffix == ".gz":
                # No name and no time inside: equal dialogs give equal files.
                with gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
                    yield cast(IO[bytes], packed)
            else:
                yield raw
        side.replace(out)
    finally:
        side.unlink(missing_ok=True)


def _all_problems(problems: list[str]) -> str:
    told = problems[:MAX_TOLD]
    if len(problems) > len(told):
        told.append(f"... and {len(problems) - len(told)} more lines.")
    return "\n".join([*told, "Nothing was written."])


def _show(chat_format: ChatFormat, example: TokenizedExample, number: int) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text(f"{number}: ", style="bold")
    for stretch, is_trained in _stretches(chat_format, example):
        text.append(stretch, style="not bold green" if is_trained else "not bold dim")
    Console(highlight=False).print(text, soft_wrap=True)


def _stretches(chat_format: ChatFormat, example: TokenizedExample) -> Iterator[tuple[str, bool]]:
    """Neighbouring tokens of equal mask as one text."""
    pieces = chat_format.tokenizer.pieces(example.input_ids)
    start = 0
    for end in range(1, len(pieces) + 1):
        if end == len(pieces) or example.loss_mask[end] != example.loss_mask[start]:
            yield _readable(pieces[start:end]), example.loss_mask[start]
            start = end


def _readable(pieces: list[str]) -> str:
    """Pieces as text: byte pieces joined to characters, and no control character that a terminal would obey."""
    raw = b"".join(
        bytes([int(piece[3:5], 16)]) if _is_byte(piece) else piece.replace(SPACE, " ").encode() for piece in pieces
    )
    text = raw.decode(errors="replace")
    return "".join(ch if ch.isprintable() or ch in "\n\t" else ascii(ch)[1:-1] for ch in text)


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
