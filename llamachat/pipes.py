"""Input that comes through a pipe: `<(zcat x.gz)`, a FIFO, `/dev/stdin`. It can be read once, and readers look
twice."""

import atexit
import io
import logging
import os
import select
import shutil
import stat
import tempfile
from pathlib import Path
from typing import BinaryIO

from llamachat.errors import UsageError

log = logging.getLogger(__name__)

_MAGIC = {b"PAR1": ".parquet", b"\x1f\x8b": ".jsonl.gz"}  # what the suffix of a file would say
_PATIENCE = 30.0  # seconds that a program has to open the other end of a named pipe
_copies: dict[tuple[int, int], Path] = {}  # by device and inode of the pipe


def regular_file(path: Path) -> Path:
    """The path itself; of a pipe a copy of all that comes through it, with a suffix that its content shows.

    A pipe is read once in a process, and its copy is deleted when the process ends. A device, a terminal among them,
    may have no end: `UsageError`.
    """
    try:
        state = path.stat()
    except (OSError, ValueError):
        return path  # the reader reports why it cannot be read
    if stat.S_ISCHR(state.st_mode) or stat.S_ISBLK(state.st_mode):
        raise UsageError(f"{path}: is a device or a terminal, but only files and pipes can be read. Name one of these.")
    if not stat.S_ISFIFO(state.st_mode):
        return path
    place = (state.st_dev, state.st_ino)
    if place not in _copies:
        log.info("%s: reading the pipe to its end", path)
        try:
            _copies[place] = _copied(path)
        except OSError as error:
            raise UsageError(
                f"{path}: the pipe cannot be read to its end ({error.strerror or error}). It is first copied to "
                f"{tempfile.gettempdir()}. Free space there, set TMPDIR, or write the data to a file and pass that."
            ) from error
    return _copies[place]


def _opened(path: Path) -> tuple[BinaryIO, bytes]:
    """The pipe, and what was already read from it; `UsageError` if it is a named pipe to which no program writes."""
    if not path.resolve().is_fifo():  # the pipe of a shell, whose other end is held
        return path.open("rb"), b""
    raw = io.FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
    poll = select.poll()
    poll.register(raw, select.POLLIN)
    head = b"" if poll.poll(1000 * _PATIENCE) else raw.read(1)  # None where a writer is there that has not written yet
    if head == b"" and not poll.poll(0):
        raw.close()
        raise UsageError(
            f"{path}: is a pipe to which no program wrote within {_PATIENCE:g} s. Start the writing program, and "
            "run the command again, or name a file."
        )
    os.set_blocking(raw.fileno(), True)
    return io.BufferedReader(raw), head or b""


def _copied(path: Path) -> Path:
    stream, head = _opened(path)
    with stream:
        head += stream.read(4 - len(head))
        suffix = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), ".jsonl")
        with tempfile.NamedTemporaryFile(prefix="llamachat-pipe-", suffix=suffix, delete=False) as copy:
            atexit.register(Path(copy.name).unlink, missing_ok=True)
            copy.write(head)
            shutil.copyfileobj(stream, copy)
    return Path(copy.name)
