"""Typing to `llamachat chat` in a terminal: a real pseudo-terminal, and no model."""

import os
import pty
import subprocess
import sys
from pathlib import Path

READ_TWICE = (
    "from pipelines.cli.talk import edit_lines; edit_lines(); print(repr(input('> '))); print(repr(input('> ')))"
)


def test_pasted_lines_are_one_message_and_the_arrow_brings_it_back():
    ours, theirs = pty.openpty()
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "TERM": "xterm", "INPUTRC": os.devnull}
    with subprocess.Popen(
        [sys.executable, "-c", READ_TWICE], cwd=root, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as reader:
        os.close(theirs)
        os.write(ours, b"\x1b[200~one\ntwo\x1b[201~\r\x1b[A!\r")
        shown = b""
        while shown.count(b"'one") < 2:
            shown += os.read(ours, 1000)
        reader.kill()
    os.close(ours)
    assert rb"'one\ntwo'" in shown and rb"'one\ntwo!'" in shown
