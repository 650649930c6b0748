"""Input that comes through a pipe: `<(zcat x.gz)`, a FIFO, `/dev/stdin`. It can be read once, and readers look twice."""

import atexit
import logging
import shutil
import stat
import tempfile
from pathlib import Path

from llamachat.errors import UsageError

log = logging.getLogger(__name__)

_MAGIC = {b"PAR1": ".parquet", b"\x1f\x8b": ".jsonl.gz"}  # what the suffix of a file would say
_copies: dict[tuple[int, int], Path] = {}  # by device and inode of the pipe


def regular_file(path: Path) -> Path:
    """The path itself; of a pipe a copy of all that comes through it, with a suffix that its content shows.

    A pipe is read once in a process, and its copy is deleted when the process ends. A device, a terminal among them, may
    have no end: `UsageError`.
    """
    try:
        state = path.stat()
    except (OSError, ValueError):
        return path  # the reader reports why it cannot be read
    if stat.S_ISCHR(state.st_mode) or stat.S_ISBLK(state.st_mode):
        raise UsageError(f"{path}: is a device or a terminal. Files and pipes are read. Name one of these.")
    if not stat.S_ISFIFO(state.st_mode):
        return path
    place = (state.st_dev, state.st_ino)
    if place not in _copies:
        log.info("%s: reading the pipe to its end", path)
        try:
            _copies[place] = _copied(path)
        except OSError as error:
            raise UsageError(
                f"{path}: the pipe cannot be read whole ({error.strerror or error}). It is first copied to "
                f"{tempfile.gettempdir()}. Make room there, set TMPDIR, or write it to a file and name that."
            ) from error
    return _copies[place]


def _copied(path: Path) -> Path:
    with path.open("rb") as stream:
        head = stream.read(4)
        suffix = next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), ".jsonl")
        with tempfile.NamedTemporaryFile(prefix="llamachat-pipe-", suffix=suffix, delete=False) as copy:
            atexit.register(Path(copy.name).unlink, missing_ok=True)
            copy.write(head)
            shutil.copyfileobj(stream, copy)
    return Path(copy.name)
