"""`llamachat tokens`: the token ids and loss mask of each dialog in a file, as used in training.

Reads dialogs (`{"messages": [...]}` a line, `.jsonl` or `.jsonl.gz`; other keys and blank lines are skipped) and writes
`{"input_ids": [...], "loss_mask": [0 or 1, ...]}` per line, in the same order. A dialog may end with an open user turn,
which is encoded but has no targets. If any line is bad, nothing is written and all bad lines are reported.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from shlex import quote

from llamachat.chat_format import ChatFormat, TokenizedExample, TrainOn
from llamachat.chat_format.dialog import DialogError, parse_messages
from llamachat.chat_format.proof import load_proved_format
from llamachat.chat_format.tokenizer import SPACE
from llamachat.data.files import BYTE_ORDER_MARK, decode_line, file_problem, is_blank, numbered_lines
from llamachat.data.problems import converted_path, problem
from llamachat.errors import DataError, kind_word
from llamachat.pipes import regular_file
from llamachat.runs.outputs import check_folder, check_output, written_beside

MOST_SHOWN = 100  # bad lines printed in one error


@dataclass(frozen=True, slots=True)
class TokensReport:
    """Counts of what was written, and a warning if the user allowed an unproved tokenizer."""

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
    overwrite: bool = False,
) -> TokensReport:
    """Encode every dialog in `dialogs_in` to `out`; with `show`, also print them with the trained tokens coloured."""
    check_output(out, [dialogs_in, tokenizer_dir], overwrite=overwrite)
    check_folder(out)
    loaded, warning = load_proved_format(tokenizer_dir, chat_format=chat_format, allow_unproved=allow_unproved)
    dialogs = tokens = trained = 0
    problems: list[str] = []
    _check_form(dialogs_in)
    with written_beside(out) as stream:
        for number, line in numbered_lines(dialogs_in):
            text = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if is_blank(text):
                continue
            try:
                example = _encode_line(loaded, text, number, train_on)
            except DialogError as error:
                problems.append(f"{dialogs_in}:{number}: {error}")
                continue
            row = {"input_ids": example.input_ids, "loss_mask": [int(is_trained) for is_trained in example.loss_mask]}
            stream.write(json.dumps(row).encode() + b"\n")
            dialogs, tokens, trained = dialogs + 1, tokens + len(row["input_ids"]), trained + sum(row["loss_mask"])
            if show and not problems:
                _show(loaded, example, number)
        if problems:
            more = len(problems) - MOST_SHOWN
            rest = [f"... and {more} more lines."] if more > 0 else []
            raise DataError("\n".join([*problems[:MOST_SHOWN], *rest, "Nothing was written."]))
    return TokensReport(dialogs, tokens, trained, warning)


def _check_form(path: Path) -> None:
    """Raise `DataError` if the file as a whole is not JSON Lines."""
    fault = file_problem(path)
    problems = fault.problems if fault else ()
    if not problems and regular_file(path).suffix == ".parquet":
        command = f"llamachat data convert {quote(str(path))} {quote(str(converted_path(path)))}"
        problems = (problem(0, "file", "is parquet, but JSON Lines are read here.", f"Convert it: `{command}`."),)
    if problems:
        raise DataError("\n".join(fault.at(path) for fault in problems))


def _encode_line(chat_format: ChatFormat, line: bytes, number: int, train_on: TrainOn) -> TokenizedExample:
    row = decode_line(line, number)
    for fault in row.problems:
        raise DialogError(fault.field, fault.reason, fault.fix)
    fix = 'Write one object a line: {"messages": [...]}.'
    if not isinstance(row.value, Mapping):
        raise DialogError("line", f"is {kind_word(row.value)}, but a dialog is an object.", fix)
    if "messages" not in row.value:
        present = ", ".join(map(repr, row.value)) or "nothing"
        raise DialogError("messages", f"is missing; the line holds {present}.", "Name the list of turns 'messages'.")
    return chat_format.encode_dialog(parse_messages(row.value["messages"]), train_on=train_on)


def _show(chat_format: ChatFormat, example: TokenizedExample, number: int) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text(f"{number}: ", style="bold")
    pairs = zip(chat_format.tokenizer.pieces(example.input_ids), example.loss_mask, strict=True)
    for is_trained, run in groupby(pairs, key=lambda pair: pair[1]):
        text.append(_readable([piece for piece, _ in run]), style="not bold green" if is_trained else "not bold dim")
    Console(highlight=False).print(text, soft_wrap=True)


def _readable(pieces: list[str]) -> str:
    """Join pieces into text: byte pieces decoded, control characters escaped for the terminal."""
    raw = b"".join(
        bytes([int(piece[3:5], 16)]) if re.fullmatch("<0x..>", piece) else piece.replace(SPACE, " ").encode()
        for piece in pieces
    )
    text = raw.decode(errors="replace")
    return "".join(ch if ch.isprintable() or ch in "\n\t" else ascii(ch)[1:-1] for ch in text)
